"""`pruneval measure`: what a method costs on a model.

The implied path needs no weights: dimensions are shipped as facts, a method declares how many visual tokens enter
each layer, and the ledger does the rest. Every number says under which convention it is printed and what that
convention leaves out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruneval import methods
from pruneval.harness import conventions, models, published
from pruneval.harness.declared import declared
from pruneval.harness.dimensions import Dimensions, load, names
from pruneval.harness.dimensions_config import FAMILIES, read
from pruneval.harness.errors import UserError, unknown
from pruneval.harness.flops import Lengths, ledger, lengths_of
from pruneval.harness.kv_cache import kv_bytes, kv_bytes_full_heads, kv_ratio
from pruneval.harness.measure_text import to_markdown, to_text


def implied(
    model: str,
    method: str = "vanilla",
    params: Mapping[str, Any] | None = None,
    *,
    convention: str = "gsearch",
    tiles: int | None = None,
    frames: int | None = None,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    new_tokens: int = 1,
    helper: str | None = None,
) -> dict[str, Any]:
    """The implied cost of one sample, from declared lengths.

    Args:
        model: a shipped model's name, or a folder with a transformers `config.json`.
        method: a method's name.
        params: its parameters.
        convention: what `tflops` and `tmacs` mean.
        tiles: tiles of the image; like the next three, what published costs assume if not given.
        frames: frames of the video.
        visual_tokens: visual tokens at the LLM input.
        text_tokens: all other tokens.
        new_tokens: tokens to generate.
        helper: the helper model of a method that has one, likewise; what its parameter says if not given.

    Returns:
        `model`, `method`, `params`, `signature`, what `cost` returns, `unpruned_tflops`, `lengths_from`, and `tower`:
        what enters each layer of the vision tower, as groups of (how many, tokens of each) that attend to each other.
    """
    conventions.convention(convention)
    dimensions = dimensions_for(model)
    built = _build(method, params)
    whole = lengths_of(
        dimensions, tiles=tiles, frames=frames, visual=visual_tokens, text=text_tokens, new_tokens=new_tokens
    )
    overrides = {"tiles": tiles, "frames": frames, "visual tokens": visual_tokens, "text tokens": text_tokens}
    helper = helper or built.params.get("helper")
    lengths, left = declared(built, dimensions, whole, dimensions_for(helper) if helper else None)
    found = cost(dimensions, lengths, convention)
    found["not_counted"] += left
    return {
        "model": model,
        "method": method,
        "params": built.params,
        "signature": built.signature,
        **found,
        "unpruned_tflops": cost(dimensions, whole, convention)["tflops"],
        "tower": [[list(group) for group in groups] for groups in lengths.vision],
        "lengths_from": "; ".join(
            [
                dimensions.input.source,
                *(f"{name} given as {count}" for name, count in overrides.items() if count is not None),
            ]
        ),
    }


def cost(
    dimensions: Dimensions, lengths: Lengths, convention: str = "gsearch", bytes_per_value: int = 2
) -> dict[str, Any]:
    """The cost of one sample from its lengths, declared or observed, as a flat dictionary ready for JSON.

    `tflops` and `tmacs` are the prefill under the convention, `decode_tflops` the tokens after the first, `macs`
    every part of the ledger in multiply-adds, `kv_bytes` the cache after the prefill and `kv_bytes_end` after the
    last token.
    """
    chosen = conventions.convention(convention)
    counted = ledger(dimensions, lengths)
    macs = chosen.macs(dimensions, lengths, counted)
    covered = tuple(dimensions.params) if chosen.whole_params else dimensions.published_params
    left = [
        f"parameters of the {part} part ({count / 1e9:.4g} B)"
        for part, count in dimensions.params.items()
        if part not in covered
    ]
    return {
        "convention": chosen.name,
        "convention_title": chosen.title,
        "tflops": chosen.factor * macs / 1e12,
        "tmacs": macs / 1e12,
        "decode_tflops": chosen.factor * chosen.decode_macs(counted) / 1e12,
        "params_b": sum(dimensions.params[part] for part in covered) / 1e9,
        "params_parts": list(covered),
        "kv_ratio": kv_ratio(_visual(lengths, 0), lengths.given),
        "kv_ratio_end": kv_ratio(_visual(lengths, -1), lengths.given),
        "kv_bytes": kv_bytes(dimensions.decoder, lengths.stored(0), bytes_per_value),
        "kv_bytes_end": kv_bytes(dimensions.decoder, lengths.stored(lengths.steps), bytes_per_value),
        "kv_bytes_full_heads": kv_bytes_full_heads(dimensions.decoder, lengths.stored(0), bytes_per_value),
        "visual": lengths.given,
        "text": lengths.text,
        "patches": lengths.patches,
        "projected": lengths.projector,
        "new_tokens": lengths.new_tokens,
        "avg_in": lengths.avg_in,
        "kept_after": lengths.visual[-1],
        "keep": lengths.avg_in / lengths.given,
        "per_layer": list(lengths.visual),
        "macs": counted.as_dict(),
        "scoring": {work.name: work.macs for work in lengths.scoring},
        "helpers": {work.name: work.macs for work in lengths.helpers},
        "helper_tflops": chosen.factor * counted.helpers / 1e12,
        "tflops_with_helpers": chosen.factor * (macs + counted.helpers * ("helpers" not in chosen.parts)) / 1e12,
        "not_counted": [*chosen.not_counted(counted), *left],
    }


def _visual(lengths: Lengths, step: int) -> tuple[int, ...]:
    return lengths.cached[step] if lengths.cached else lengths.visual


def dimensions_for(model: str) -> Dimensions:
    """Shipped facts, or those of a model that comes with the package or lies in a folder."""
    if model not in names() and model in models.names():
        return read(models.packaged(model), name=model)
    return read(Path(model), name=model) if Path(model, "config.json").is_file() else load(model)


def _build(method: str, params: Mapping[str, Any] | None) -> Any:
    if method not in methods.names():
        raise unknown("method", method, methods.names())
    try:
        return methods.build(method, params)
    except ValueError as error:
        raise UserError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pruneval measure`."""
    parser.add_argument("--model", help="a model of `pruneval list models`")
    parser.add_argument("--method", default="vanilla", help="a method of `pruneval list methods`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; may be repeated"
    )
    parser.add_argument("--preset", metavar="P", help="a published setting of the method, as llava-1.5-7b@192")
    parser.add_argument(
        "--budget",
        metavar="CURRENCY=VALUE",
        help="solve the method's knob for it: avg_in=128, or kept_after, final, tflops, kv_bytes",
    )
    parser.add_argument("--implied", action="store_true", help="compute from dimensions; needs no weights")
    parser.add_argument(
        "--published", metavar="TABLE", help=f"a published table beside the ledger: {', '.join(published.TABLES)}"
    )
    parser.add_argument(
        "--check",
        metavar="FAMILY",
        help="a tiny random model of the family, counted by the ledger, torch and calflops side by side",
    )
    parser.add_argument(
        "--convention", default="gsearch", metavar="NAME", help=f"one of {', '.join(conventions.CONVENTIONS)}"
    )
    for name, what in (
        ("tiles", "tiles of the image"),
        ("frames", "frames of the video"),
        ("visual-tokens", "visual tokens at the LLM input"),
        ("text-tokens", "all other tokens of the prompt"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--new-tokens", type=int, default=1, metavar="N", help="tokens to generate; the first comes out of the prefill"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def main(args: argparse.Namespace) -> int:
    """Run `pruneval measure` with parsed arguments."""
    if args.published:
        rows = published.compare(args.published)
        print(json.dumps([row.as_dict() for row in rows], indent=1) if args.json else to_markdown(args.published, rows))
        return 0
    from pruneval.harness import budgets  # it prices with this module

    if args.check:
        return _check(args.check, args.method, budgets.parameters(args.set), args.json)
    if not args.implied:
        raise UserError("say --implied, --published TABLE or --check FAMILY; what needs a run is `pruneval bench`")
    if not args.model:
        raise UserError("say which model: --model NAME")
    found = implied(
        args.model,
        args.method,
        budgets.choose(args.method, args.preset, budgets.parameters(args.set), args.budget, args.model),
        convention=args.convention,
        tiles=args.tiles,
        frames=args.frames,
        visual_tokens=args.visual_tokens,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
    )
    print(json.dumps(found, indent=1) if args.json else to_text(found))
    return 0


def _check(family: str, method: str, given: Mapping[str, Any], as_json: bool) -> int:
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    _build(method, given)  # refuses what does not exist before anything heavy is imported
    from pruneval.harness import counters

    counts = counters.compare(family, method, given)
    text = [count.as_dict() for count in counts]
    print(json.dumps(text, indent=1) if as_json else counters.to_text(family, method, counts))
    return 0
