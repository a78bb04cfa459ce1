"""`pruneval bench`: what a method saves in time and memory, measured, with vanilla beside it in the same process."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneval import methods
from pruneval.harness import budgets, dimensions, models
from pruneval.harness.errors import UserError, unknown

OUT = Path("reports/measured")
DEFAULT_ROUNDS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pruneval bench`."""
    add = parser.add_argument
    add("--model", required=True, help="a model of `pruneval list models`, or a folder")
    add("--method", action="append", metavar="M", help="of `pruneval list methods`; may be repeated; default: all")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter; goes with one --method")
    add("--keep", type=float, nargs="+", metavar="K", help="budgets: each method's own knob is set to them in turn")
    add("--no-weights", action="store_true", help="random weights of full size: needs no files")
    add("--width", type=float, default=1.0, metavar="F", help="with --no-weights: a fraction of the model's width")
    add("--depth", type=float, default=1.0, metavar="F", help="with --no-weights: a fraction of its layers")
    for name, default, what in (
        ("visual-tokens", None, "about so many visual tokens (default: what published costs assume)"),
        ("batch", 1, "prompts at once"),
        ("new-tokens", 5, "tokens to generate, at least 2 (default: 5)"),
    ):
        add(f"--{name}", type=int, nargs="+", default=default and [default], metavar="N", help=what)
    add("--text-tokens", type=int, default=75, metavar="N", help="all other tokens of a prompt (default: 75)")
    add("--rounds", type=int, default=DEFAULT_ROUNDS, metavar="N", help="timed generations of each (default: 7)")
    add("--warm-up", type=int, default=2, metavar="N", help="generations before the first round, besides three")
    add("--energy", action="store_true", help="also energy, where the machine has a counter")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", help="float32, float16, bfloat16 (default: float32 on a CPU, else the model's own)")
    add("--kernel", help="attention of all contestants: sdpa, eager, flash_attention_2 (default: sdpa)")
    add("--out", type=Path, metavar="FILE", help=f"where the numbers go, as JSON (default: in {OUT}/)")
    add("--json", action="store_true", help="print that document instead of tables")


def main(args: argparse.Namespace) -> int:
    """Run `pruneval bench` with parsed arguments; 1 when nothing could be measured."""
    names = _checked(args)
    from pruneval.harness import contests
    from pruneval.harness.machine import load
    from pruneval.harness.records import write_atomically

    subject = contests.subject(args)
    path = args.out or OUT / f"{subject.label}_{time.strftime('%Y%m%d-%H%M%S')}.json"
    document = contests.head(subject, args)
    for setting in contests.settings(subject, args):
        document["settings"].append(contests.run(subject, names, setting, args))
        document["machine"]["load_after"] = load()
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())  # what is measured is kept
        if not args.json:
            _show(document, document["settings"][-1])
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(f"written to {path}")
    return int(not any(setting["contestants"] for setting in document["settings"]))


def _show(document: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
    from pruneval.reports.bench import to_markdown

    print(to_markdown(document, setting), flush=True)


def _checked(args: argparse.Namespace) -> list[str]:
    """The methods asked for, after everything that can be refused without a model has been."""
    names = list(dict.fromkeys(args.method or methods.names()))
    for name in names:
        if name not in methods.names():
            raise unknown("method", name, methods.names())
    if args.set and len(names) != 1:
        raise UserError("--set goes with one --method")
    methods_given = budgets.parameters(args.set)
    if len(names) == 1:
        _built(names[0], methods_given)
    models.check_options(args.device, args.dtype, args.kernel)
    least = {"batch": 1, "new_tokens": 2, "visual_tokens": 1}
    for name, low in least.items():
        _at_least(name, min(getattr(args, name) or [low]), low)
    for name, low in (("text_tokens", 4), ("rounds", 3), ("warm_up", 0)):
        _at_least(name, getattr(args, name), low)
    if any(not 0 < keep <= 1 for keep in args.keep or ()):
        raise UserError("--keep takes numbers above 0 and up to 1")
    if (args.width, args.depth) != (1.0, 1.0) and not args.no_weights:
        raise UserError("--width and --depth go with --no-weights")
    if args.no_weights and args.model not in dimensions.names():
        raise unknown("model", args.model, dimensions.names())
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder, not a file")
    return [name for name in names if name != "vanilla"]


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")


def _built(name: str, params: Mapping[str, Any]) -> methods.Method:
    try:
        return methods.build(name, params)
    except methods.MethodError as error:
        raise UserError(str(error)) from None


def with_knob(name: str, given: Mapping[str, Any], keep: float | None) -> methods.Method:
    """The method at a budget: its knob at `keep`, its defaults for None. Raises: UserError."""
    knob = methods.method_class(name).knob
    if keep is None:
        return _built(name, given)
    if knob not in methods.method_class(name).__dataclass_fields__:
        raise UserError(f"{name} has no single parameter that sets a budget")
    return _built(name, {**given, knob: keep})


def plan(names: Sequence[str], given: Mapping[str, Any], keep: float | None) -> tuple[list[Any], list[dict[str, str]]]:
    """The methods that exist at a budget, and those that do not with the reason."""
    built, left_out = [], []
    for name in names:
        try:
            built.append(with_knob(name, given, keep))
        except UserError as error:
            left_out.append({"method": name, "reason": str(error)})
    return built, left_out
