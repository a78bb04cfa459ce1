"""`pruneval search`: finds a method's strategy on a few samples and writes it as a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.harness.search import recipe

DESCRIPTION = """\
Finds what a method leaves to a search: G-Search's shares per layer, P-Sigmoid's slope, VFlowOpt's six knobs, FitPrune's
deletions, VTW's layer. The result is a small JSON file, used as --set recipe=FILE. Beside it lie the trials
(FILE.trials), from which a search that was interrupted goes on, and a plot (FILE.png).
"""
EXAMPLES = """\
examples:
  pruneval search --method gsearch --out recipes/gsearch.json
  pruneval search --method psigmoid --budget avg_in=48 --out recipes/psigmoid.json
  pruneval search --method psigmoid --match "fastv(layer=2,keep=0.125)" --out recipes/psigmoid.json
  pruneval search --method fitprune --keep 0.4 --samples 50 --out recipes/fitprune.json
  pruneval search --method vtw --data pocket-scienceqa --samples 20 --first 1 --out recipes/vtw.json
  pruneval eval --method gsearch --set recipe=recipes/gsearch.json
"""
SAMPLES = {"gsearch": 300, "psigmoid": 300, "vflowopt": 30, "fitprune": 50, "vtw": 20}


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--method", required=True, choices=sorted(SAMPLES), help="whose strategy to find")
    add("--model", default="pocket-llava", help="a name of `pruneval list models`, or a folder (default: %(default)s)")
    add(
        "--data",
        default="pocket",
        help="pocket (training questions of all pocket editions), pocket-gqa ..., or a folder, file or hub id with "
        "columns image, question, answer; :split behind it (default: %(default)s)",
    )
    add("--samples", type=int, metavar="N", help=f"calibration samples (default: {SAMPLES})")
    add("--budget", metavar="CURRENCY=VALUE", help="psigmoid, vflowopt: avg_in=48; psigmoid also tflops=...")
    add("--match", metavar="METHOD(...)", help="psigmoid: the budget is this method's TFLOPs, as fastv(keep=0.125)")
    add("--keep", type=float, help="fitprune: share of the visual tokens' FLOPs to keep (default: 0.4)")
    add(
        "--trials",
        type=int,
        metavar="T",
        help="gsearch: suggestions per boundary behind 10 initial ones (15); others: in all",
    )
    add("--stride", type=int, default=3, help="gsearch: boundaries from one search to the next (default: %(default)s)")
    add("--eta", type=float, default=0.003, help="vtw: threshold of the divergence (default: %(default)s)")
    add("--first", type=int, default=5, help="vtw: first layer tried (default: %(default)s)")
    add("--target", default="last", choices=("last", "mean", "first", "top3"), help="vflowopt: tokens compared")
    add("--batch-size", type=int, default=16, metavar="B", help="changes no result (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of samples and suggestions (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1")
    add("--dtype", help="float32, float16, bfloat16")
    add("--out", type=Path, required=True, metavar="FILE", help="the recipe to write")


def main(args: argparse.Namespace) -> int:
    """Run the search; returns the exit code."""
    if args.out.suffix != ".json":
        raise UserError(f"--out must end in .json, not {args.out.name}")
    for name in ("samples", "trials", "stride", "first", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    _fits(args)

    from pruneval.harness import dimensions, models
    from pruneval.harness.search import data
    from pruneval.harness.search.bayes import Study
    from pruneval.harness.search.objective import Objective
    from pruneval.harness.search.strategies import SEARCHES, Search
    from pruneval.harness.search.view import View

    located = models.locate(args.model)
    calibration = data.load(args.data, args.samples or SAMPLES[args.method], args.seed)
    loaded = models.load(located, args.device, args.dtype, None)
    objective = Objective(loaded, calibration, args.batch_size, args.seed)
    tokens = objective.tokens()
    content = {
        "method": args.method,
        "model": located.entry.name,
        "revision": loaded.revision,
        "layers": loaded.adapter.shape.layers,
        "tokens": tokens,
        "data": {"name": calibration.name, "hash": calibration.digest, "samples": len(calibration.samples)},
        "seed": args.seed,
        "trials": _trials(args.out).name,
    }
    journal = _continue(args, content)
    named = located.entry.name in dimensions.names()
    source = located.entry.name if named else str(located.folder)
    with View(f"{args.method} on {located.entry.name}") as show, objective.sharing() as kept:
        search = Search(args, objective, loaded.adapter.shape, tokens, source, Study(journal, args.seed), show)
        found = SEARCHES[args.method](search, kept)
    recipe.write(args.out, content | found)
    show.plot(args.out.with_suffix(".png"))
    print(f"{args.out}: {show.summary()}")
    print(f"use it: pruneval eval --model {args.model} --method {args.method} --set recipe={args.out}")
    return 0


def _fits(args: argparse.Namespace) -> None:
    """Refuses options that mean nothing for the method."""
    takes = {"budget": ("psigmoid", "vflowopt"), "match": ("psigmoid",), "keep": ("fitprune",)}
    for name, of in takes.items():
        if getattr(args, name) is not None and args.method not in of:
            raise UserError(f"--{name} is for {' and '.join(of)}, not for {args.method}")
    if args.method in takes["budget"] and (args.budget is None) == (args.match is None):
        raise UserError(
            f"{args.method} needs --budget" + (" or --match, not both" if args.method == "psigmoid" else "")
        )
    if args.keep is not None and not 0 < args.keep < 1:
        raise UserError(f"--keep must lie between 0 and 1, not {args.keep:g}")


def _trials(out: Path) -> Path:
    return out.with_name(f"{out.stem}.trials")


def _continue(args: argparse.Namespace, content: dict[str, Any]) -> Path:
    """The journal of trials; one of another search is refused."""
    import json

    journal, settings = _trials(args.out), args.out.with_name(f"{args.out.stem}.settings")
    asked = content | {
        name: getattr(args, name) for name in ("budget", "match", "keep", "stride", "eta", "first", "target")
    }
    text = json.dumps(asked, sort_keys=True)
    if journal.exists() and settings.exists() and settings.read_text() != text:
        raise UserError(f"{journal} holds the trials of another search; give another --out, or delete it")
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(text)
    return journal
