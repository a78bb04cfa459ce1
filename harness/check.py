"""`pruneval check`: the engine's promises, for every method on every family, or for one method on one model."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pruneval import methods
from pruneval.harness.errors import UserError, unknown

FAMILIES = (
    "llava", "llava_next", "llava_onevision", "llava_next_video", "video_llava", "internvl", "qwen2_5_vl", "qwen3_vl",
)  # fmt: skip
"""The families of `harness/subjects.py`, named here so that the options can be checked without torch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pruneval check`."""
    parser.add_argument("--all", action="store_true", help="every method on every family, on tiny random models")
    parser.add_argument(
        "--method", action="append", metavar="M", help="a method of `pruneval list methods`; repeatable"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    parser.add_argument("--family", action="append", metavar="F", help=f"one of {', '.join(FAMILIES)}; may be repeated")
    parser.add_argument("--model", help="a model of `pruneval list models`, or a folder, instead of tiny ones")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="one JSON document, for programs")


def main(args: argparse.Namespace) -> int:
    """Run `pruneval check` with parsed arguments; 1 when a promise is broken."""
    if not (args.all or args.method):
        raise UserError("say what to check: --all, or --method M (and --model or --family)")
    names = args.method or methods.names()
    for name in names:
        try:
            methods.method_class(name)
        except methods.MethodError as error:
            raise UserError(str(error)) from None
    given = _given(args.set)
    if given and len(names) != 1:
        raise UserError("--set goes with one --method")
    if args.model and (args.family or args.all):
        raise UserError("--model is checked by itself; leave out --all and --family")
    for family in args.family or ():
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    start = time.monotonic()
    if args.model:
        found = _on_model(args.model, names, given)
    else:
        found = _on_families(names, args.family or FAMILIES, given, args.jobs or os.cpu_count() or 1)
    if args.json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(verdict) for verdict in found], indent=1))
    else:
        print(to_text(found))
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return int(any(verdict.status == "fail" for verdict in found))


def _given(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set takes NAME=VALUE, not {pair!r}")
    return tuple(tuple(pair.split("=", 1)) for pair in pairs)  # type: ignore[misc]


def _pair(family: str, name: str, given: tuple[tuple[str, str], ...]) -> list[Any]:
    """The verdicts of one method on one family's tiny model (in a worker process)."""
    from pruneval.harness import subjects
    from pruneval.harness.cases import Case
    from pruneval.harness.conformance import verdicts

    given = given or subjects.PARAMS.get(name, ())
    return list(verdicts(Case(name, subjects.subject(family), given=given)))


def _one_thread() -> None:
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _on_families(names: Sequence[str], families: Sequence[str], given: tuple, jobs: int) -> list[Any]:
    from rich.progress import track

    pairs = [(family, name) for family in families for name in names]
    found: list[Any] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        waiting = [pool.submit(_pair, family, name, given) for family, name in pairs]
        for future in track(waiting, "checking", console=_console()):
            found += future.result()
    return found


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _on_model(name: str, names: Sequence[str], given: tuple) -> list[Any]:
    from rich.progress import track

    from pruneval.harness.cases import Case
    from pruneval.harness.conformance import verdicts
    from pruneval.harness.subjects_real import subject_of

    subject = subject_of(name, dict(given).get("helper"))
    cases = [Case(method, subject, given=given) for method in names]
    found: list[Any] = []
    for case in track(cases, "checking", console=_console()):
        found += verdicts(case)
    return found


MARK = {"pass": "ok", "fail": "FAIL", "n/a": "-"}


def to_text(found: Iterable[Any]) -> str:
    """A table per family: a row per method, a column per promise; under it what failed and why cells are empty."""
    found = list(found)
    blocks = []
    for subject in dict.fromkeys(verdict.subject for verdict in found):
        mine = [verdict for verdict in found if verdict.subject == subject]
        columns = list(dict.fromkeys(verdict.check for verdict in mine if verdict.check != "*"))
        width = max(12, *(len(verdict.method) for verdict in mine))
        lines = [subject, "  " + "method".ljust(width) + "".join(f"  {column:>9}" for column in columns)]
        for name in dict.fromkeys(verdict.method for verdict in mine):
            row = {verdict.check: MARK[verdict.status] for verdict in mine if verdict.method == name}
            lines.append("  " + name.ljust(width) + "".join(f"  {row.get(column, '-'):>9}" for column in columns))
        notes: dict[tuple[str, str], list[str]] = {}
        for verdict in mine:
            if verdict.note:
                where = "all" if verdict.check == "*" else verdict.check
                notes.setdefault((verdict.status, verdict.note), []).append(f"{verdict.method}/{where}")
        lines += [f"    {MARK[status]:>4} {', '.join(where)}: {note}" for (status, note), where in notes.items()]
        blocks.append("\n".join(lines))
    counts = {status: sum(verdict.status == status for verdict in found) for status in MARK}
    total = f"{counts['pass']} passed, {counts['fail']} failed, {counts['n/a']} not applicable (reasons above)"
    return "\n\n".join([*blocks, total])


@functools.cache
def promises() -> dict[str, str]:
    """What each column promises."""
    from pruneval.harness.conformance import CHECKS

    return {name: (check.__doc__ or "").strip() for name, check in CHECKS.items()}
