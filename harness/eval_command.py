"""`pruneval eval`: a method beside vanilla on benchmarks, and the table that compares them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pruneval.harness import ranks
from pruneval.harness.batching import size_of
from pruneval.harness.errors import UserError

DESCRIPTION = """\
The method and vanilla are run on every benchmark, and compared in a table. What is done already is reused; what was
interrupted goes on where it stopped. exit codes: 0 done, 1 a sample failed, 2 bad input, 130 interrupted.
"""
EXAMPLES = """\
examples:
  pruneval eval --method fastv --set keep=0.5 --set layer=2
  pruneval eval --method visionzip --benchmark pocket-mme --benchmark pocket-pope --limit 40
  pruneval eval --model /path/to/llava-1.5-7b-hf --method fastv --suite core5 --dtype float16
  pruneval eval --model llava-1.5-7b --method fastv --suite core5 --processes 8
"""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--model", default="pocket-llava", help="a name of `pruneval list models`, or a folder (default: %(default)s)")
    add("--method", required=True, help="a name of `pruneval list methods`")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; may be repeated")
    add("--preset", metavar="P", help="a published setting of the method, as llava-1.5-7b@192; --set goes over it")
    add(
        "--budget",
        metavar="CURRENCY=VALUE",
        help="solve the method's knob for avg_in=128, or kept_after, final, tflops, kv_bytes",
    )
    where = options.add_mutually_exclusive_group()
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
    add(
        "--processes",
        type=_whole("--processes"),
        default=1,
        metavar="N",
        help="share the questions of a benchmark, each with the model on its own GPU (default: 1)",
    )
    add("--frames", type=_whole("--frames"), default=8, metavar="N", help="of each video, evenly spaced (default: 8)")
    add("--data-root", type=Path, metavar="DIR", help="benchmarks' data (default: PRUNEVAL_DATA or ~/.cache/pruneval)")
    add("--dry-run", action="store_true", help="say what would run, and what it would need")
    add("--kernel", help="attention: sdpa, eager, flash_attention_2 (default: sdpa)")
    add("--seed", type=_whole("--seed", 0), default=0, metavar="S", help="of methods that draw at random (default: 0)")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
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
