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
from pruneval.harness.batching import size_of
from pruneval.harness.errors import UserError

EXAMPLES = """\
examples:
  pruneval eval --method fastv                              pocket-llava on the pocket suite, beside vanilla
  pruneval eval --method random --set keep=0.25 --limit 20
  pruneval eval --model llava-1.5-7b --method fastv --suite core5 --device cuda
  pruneval list methods                                     also: models, suites, benchmarks, layouts; --json
  pruneval report                                           every table of a results folder
"""

EVAL = """\
The method and vanilla are run on every benchmark, and compared in a table. What is done already is reused; what was
interrupted goes on where it stopped. exit codes: 0 done, 1 a sample failed, 2 bad input, 130 interrupted.

examples:
  pruneval eval --method fastv --set keep=0.5 --set layer=2
  pruneval eval --method visionzip --benchmark pocket-mme --benchmark pocket-pope --limit 40
  pruneval eval --model /path/to/llava-1.5-7b-hf --method fastv --suite core5 --dtype float16
"""


PROCESSES = "share the questions of a benchmark, each with the model on its own GPU (default: 1)"
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

    run = commands.add_parser(
        "eval",
        help="run a method beside vanilla and print the table",
        epilog=EVAL,
        formatter_class=raw,
        allow_abbrev=False,
    )
    add = run.add_argument
    add("--model", default="pocket-llava", help="a name of `pruneval list models`, or a folder (default: %(default)s)")
    add("--method", required=True, help="a name of `pruneval list methods`")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; may be repeated")
    add("--preset", metavar="P", help="a published setting of the method, as llava-1.5-7b@192; --set goes over it")
    add(
        "--budget",
        metavar="CURRENCY=VALUE",
        help="solve the method's knob for avg_in=128, or kept_after, final, tflops, kv_bytes",
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--suite", help="a name of `pruneval list suites` (default: pocket)")
    where.add_argument("--benchmark", action="append", metavar="B", help="of `list benchmarks`; may be repeated")
    add("--limit", type=_whole("--limit"), metavar="N", help="only the first N questions of each benchmark")
    add("--batch-size", type=size_of, default=8, metavar="B", help="or auto; changes no answer (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", help="float32, float16, bfloat16 (default: float32 on a CPU, else the model's own)")
    add(
        "--num-beams",
        type=_whole("--num-beams"),
        metavar="N",
        help="beam search (default: as the benchmark's task says)",
    )
    add("--processes", type=_whole("--processes"), default=1, metavar="N", help=PROCESSES)
    add("--frames", type=_whole("--frames"), default=8, metavar="N", help="of each video, evenly spaced (default: 8)")
    add("--data-root", type=Path, metavar="DIR", help="benchmarks' data (default: PRUNEVAL_DATA or ~/.cache/pruneval)")
    add("--dry-run", action="store_true", help="say what would run, and what it would need")
    add("--kernel", help="attention: sdpa, eager, flash_attention_2 (default: sdpa)")
    add("--seed", type=_whole("--seed", 0), default=0, metavar="S", help="of methods that draw at random (default: 0)")

    add("--out", type=Path, default=OUT, metavar="DIR", help="results folder (default: %(default)s)")

    listing = commands.add_parser("list", help="methods, models, suites, benchmarks, layouts", allow_abbrev=False)
    listing.add_argument("what", choices=("methods", "models", "suites", "benchmarks", "layouts"))
    listing.add_argument("--json", action="store_true", help="a list of objects, for programs")

    for name, (module, what) in MODULES.items():
        options = commands.add_parser(name, help=what, allow_abbrev=False)
        if name == command:
            import_module(module).add_arguments(options)
    return top


def _whole(name: str, least: int = 1) -> Any:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise UserError(f"{name} must be a whole number of at least {least}, not {text!r}")
        return number

    return parse


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
        return {"eval": _eval, "list": _list}[args.command](args)
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


def _eval(args: argparse.Namespace) -> int:
    from pruneval.harness import budgets, data_command, dimensions, models, plan, run
    from pruneval.harness.search import recipe
    from pruneval.tasks import benchmark, pocket_suite, suite

    data_command.use_root(args)
    names = list(dict.fromkeys(args.benchmark or suite(args.suite or "pocket")))
    for name in names:
        benchmark(name)
    given = budgets.parameters(args.set)
    if args.budget is None:  # nothing about the model is needed to refuse a parameter
        run.build_method(args.method, budgets.choose(args.method, args.preset, given, None, ""))
    models.check_options(args.device, args.dtype, args.kernel)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    located = models.locate(args.model)
    member = ranks.here()
    starts = args.processes > 1 and member.count == 1
    if args.suite and located.entry.packaged and (pocket := list(pocket_suite(args.suite))) != names:
        names = pocket
        told = f"{located.entry.name} knows the pocket world only: {args.suite} in its pocket editions"
        if not starts:
            print(told, file=sys.stderr)
    place = ranks.device(args.device, args.processes)
    device, dtype, kernel = models.resolve(located.entry, place, args.dtype, args.kernel)
    source = (
        str(located.folder) if located.folder and located.entry.name not in dimensions.names() else located.entry.name
    )
    chosen = budgets.choose(args.method, args.preset, given, args.budget, source)
    if chosen.get("recipe"):
        recipe.check(chosen["recipe"], args.method, located.entry.name)
    built = [run.build_method(args.method, chosen)]
    if args.method != "vanilla":
        built.insert(0, run.build_method("vanilla"))
    cells = run.expand(
        located, built, names, limit=args.limit, seed=args.seed, dtype=dtype, kernel=kernel, num_beams=args.num_beams,
        frames=args.frames,
    )  # fmt: skip
    if args.dry_run:
        print("\n".join(plan.plan(cells, args.out)))
        return 0
    if starts:
        return ranks.launch(args.argv, args.processes)
    records, missed = run.run_cells(
        cells, args.out, lambda: models.load(located, device, dtype, kernel), batch_size=args.batch_size, ranks=member
    )
    label = args.suite or ("-".join(names) if args.benchmark else "pocket")
    title = f"{located.entry.name}_{label}_{built[-1].signature}{f'_limit{args.limit}' if args.limit else ''}"
    if member.first:
        _show(records, [(cell.spec, cell.reason) for cell in missed], args.out, title)
    if missed:
        return 2
    return 0 if all(record.done for record in records) else 1


def _show(records: list[Any], missed: list[Any], out: Path, title: str) -> None:
    from pruneval.harness.records import write_atomically
    from pruneval.reports.comparison import comparison
    from pruneval.reports.markdown import to_markdown

    text = to_markdown(comparison(records, missed))
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in title)
    path = out / "tables" / f"{name[:200]}.md"
    write_atomically(path, text.encode())
    print(text)
    print(f"written to {path}", file=sys.stderr)


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
