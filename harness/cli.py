"""The command line. Nothing heavy is imported before it is needed: help and lists answer at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from pruneval.harness import ranks
from pruneval.harness.errors import UserError

EXAMPLES = """\
examples:
  pruneval eval --method fastv                              pocket-llava on the pocket suite, beside vanilla
  pruneval eval --method random --set keep=0.25 --limit 20
  pruneval eval --model llava-1.5-7b --method fastv --suite core5 --device cuda
  pruneval list methods                                     also: models, suites, benchmarks, layouts; --json
  pruneval report                                           every table of a results folder
"""

OUT = Path("runs")
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait make a small model many times slower on a machine that has other work.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Set for every command, before torch is imported, where the user has not set it."""
SHARED = ("eval", "sweep")
"""Commands that several processes may run together."""
MODULES = {  # commands with a module of their own, imported when the command is used: `add_arguments` and `main`
    "eval": ("pruneval.harness.eval_command", "run a method beside vanilla and print the table"),
    "measure": ("pruneval.harness.measure", "what a method costs on a model, computed from dimensions"),
    "bench": ("pruneval.harness.bench", "time and memory of methods beside vanilla, measured in turns"),
    "sweep": ("pruneval.harness.sweep", "run a study: many methods, budgets, models and benchmarks"),
    "data": ("pruneval.harness.data_command", "the benchmarks' data: what is here, what is missing, fetching it"),
    "train": ("pruneval.harness.search.train_command", "train what a method needs trained: IF-Prune's helper"),
    "runs": ("pruneval.harness.runs", "list, show, compare and clear the cells of a results folder"),
    "search": ("pruneval.harness.search.command", "find a method's strategy on calibration samples"),
    "report": ("pruneval.reports.command", "print the tables of a results folder"),
    "analyze": ("pruneval.harness.analyze", "how a model's layers rank visual tokens and attend to them"),
    "show": ("pruneval.harness.show", "draw which patches of an image a run kept"),
    "check": ("pruneval.harness.check", "prove the engine's promises for a method on a model"),
}


class Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Say it and leave with 2."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parser(command: str = "") -> argparse.ArgumentParser:
    """The command line's grammar; a command with a module of its own has its options only when it is `command`."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(
        prog="pruneval",
        description="Compare visual-token pruning methods for multimodal language models: quality and cost.",
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version and leave")
    commands = top.add_subparsers(dest="command", metavar="command")

    for name, (module, what) in MODULES.items():
        options = commands.add_parser(name, help=what, allow_abbrev=False)
        if name == command:
            import_module(module).add_arguments(options)
    listing = commands.add_parser("list", help="methods, models, suites, benchmarks, layouts", allow_abbrev=False)
    listing.add_argument("what", choices=("methods", "models", "suites", "benchmarks", "layouts"))
    listing.add_argument("--json", action="store_true", help="a list of objects, for programs")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not argv or argv[0] not in SHARED:
        return _main(argv)
    member = ranks.here()
    with ranks.quiet_unless_first(member):
        code = _main(argv)
    return ranks.ended(member, code)


def _main(argv: list[str]) -> int:
    out = OUT
    try:
        grammar = parser(argv[0] if argv else "")
        args = grammar.parse_args(argv)
        if args.version:
            from importlib.metadata import version

            print(f"pruneval {version('pruneval')}")
            return 0
        if not args.command:
            grammar.print_help()
            return 0
        out = args.out if args.command in ("eval", "report") else out
        args.argv = argv
        if args.command in MODULES:
            return int(import_module(MODULES[args.command][0]).main(args))
        return _list(args)
    except UserError as error:
        print(f"pruneval: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("pruneval: interrupted; finished answers are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"pruneval: internal error: {message}\npruneval: the full traceback is in {_log(out)}", file=sys.stderr)
        return 1


def _log(out: Path) -> str:
    from pruneval.harness.records import write_atomically

    path = out / "logs" / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = traceback.format_exc()
    try:
        write_atomically(path, text.encode())
    except OSError:
        print(text, file=sys.stderr)
        return "the lines above"
    return str(path)


def _list(args: argparse.Namespace) -> int:
    rows = listing(args.what)
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        mark = f" [provisional: {row['provisional']}]" if row.get("provisional") else ""
        print(f"{row['name']:<{width}}  {row['summary']}{mark}")
    return 0


def listing(what: str) -> list[dict[str, Any]]:
    """What there is, as plain data; every object has `name` and `summary`."""
    from dataclasses import asdict

    from pruneval import tasks

    if what == "methods":
        from pruneval import methods

        return [
            {**asdict(methods.card(name)), "parameters": _fields(methods.method_class(name))}
            for name in methods.names()
        ]
    if what == "models":
        from pruneval.harness import models

        rows = models.cards()
        return [{**row, "summary": f"{row['title']}: {row['hub_id'] or 'comes with the package'}"} for row in rows]
    if what == "suites":
        return [{"name": name, "benchmarks": list(of), "summary": ", ".join(of)} for name, of in tasks.suites().items()]
    if what == "layouts":
        from pruneval.reports import layout as layouts

        return [{"name": name, "summary": layouts.load(name).title} for name in layouts.names()]
    known = tasks.benchmarks().values()
    return [{**asdict(row), "summary": f"{row.title}: {row.n} questions, {row.unit}"} for row in known]


def _fields(method: type) -> dict[str, Any]:
    from dataclasses import MISSING, fields

    return {item.name: None if item.default is MISSING else item.default for item in fields(method)}


if __name__ == "__main__":
    sys.exit(main())
