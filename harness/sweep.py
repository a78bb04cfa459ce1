"""`pruneval sweep`: all cells of a study, one after another, each model loaded once; nothing finished is done twice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError

DESCRIPTION = """\
Runs every cell of a study file: methods x budgets x models x benchmarks. Cells that are done are reused; a cell that
fails is recorded and the sweep goes on; an interrupted sweep goes on where it stopped. Image features are computed once
per batch and serve every method that prunes behind the vision tower.

a study file:
  models: [pocket-llava]
  methods: [random, {fastv: {layer: 2}}, {pact: {keep: 0.12}}]
  budgets: [{keep: 0.5}, {avg_in: 48}]
  suites: [pocket]
"""
EXAMPLES = """\
examples:
  pruneval sweep study.yaml --dry-run           what would run, what is done, what can't and why
  pruneval sweep study.yaml --out runs && pruneval report --out runs
"""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("study", type=Path, help="the study file")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the cells and leave")
    add("--batch-size", type=int, default=8, metavar="B", help="changes no answer (default: 8)")
    add("--no-reuse", action="store_true", help="compute the image features of every cell anew")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", help="float32, float16, bfloat16 (default: float32 on a CPU, else the model's own)")


def main(args: argparse.Namespace) -> int:
    """Run the study; 0 when every cell that can run is done, 1 when one failed."""
    from pruneval.harness import models, study

    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    models.check_options(args.device, args.dtype, None)
    plans = study.plans(study.read(args.study), device=args.device, dtype=args.dtype)
    if args.dry_run:
        for plan in plans:
            _tell(plan, args.out)
        return 0
    return max(_run(plan, args) for plan in plans)


def _tell(plan: Any, out: Path) -> None:
    from pruneval.harness.records import RecordError, read_record

    open_cells = 0
    for cell in plan.cells:
        try:
            record = read_record(out / cell.spec.hash)
            state = "done" if record is not None and record.done else "to run"
        except RecordError:
            state = "damaged, to run again"
        open_cells += state != "done"
        print(f"{state:>7}  {cell.spec.model}  {cell.spec.benchmark}  {cell.spec.method_signature}")
    for what, reason in plan.refused:
        print(f"  can't  {plan.located.entry.name}  {what}: {reason}")
    print(f"{len(plan.cells)} cells on {plan.located.entry.name}, {open_cells} to run, {len(plan.refused)} that can't")


def _run(plan: Any, args: argparse.Namespace) -> int:
    from pruneval.harness import models, run
    from pruneval.harness.progress import progress
    from pruneval.harness.reuse import reusing

    show = progress()
    for what, reason in plan.refused:
        show.say(f"can't run {what}: {reason}")
    device, dtype, kernel = models.resolve(plan.located.entry, args.device, args.dtype, None)
    with ExitStack() as stack:

        def load() -> Any:
            loaded = models.load(plan.located, device, dtype, kernel)
            if not args.no_reuse:
                stack.enter_context(reusing(loaded.adapter))
            return loaded

        records, missed = run.run_cells(
            plan.cells, args.out, load, batch_size=args.batch_size, show=show, keep_going=True
        )
    return _told(plan, args.out, records, missed)


def _told(plan: Any, out: Path, records: Sequence[Any], missed: Sequence[Any]) -> int:
    failed = [(record.spec, f"failed at sample {record.error['sample']}") for record in records if not record.done]
    failed += [(cell.spec, cell.reason) for cell in missed]
    done = len(plan.cells) - len(failed)
    print(f"{done} of {len(plan.cells)} cells of {plan.located.entry.name} are done in {out}")
    for spec, reason in failed:
        print(f"not done: {spec.benchmark}, {spec.method_signature}: {reason}", file=sys.stderr)
    return 1 if failed else 0
