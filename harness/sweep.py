"""`pruneval sweep`: all cells of a study, in this process or on Ray; nothing finished is done twice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pruneval.harness import ranks
from pruneval.harness.batching import size_of
from pruneval.harness.errors import UserError

DESCRIPTION = """\
Runs every cell of a study file: methods x budgets x models x benchmarks. Cells that are done are reused; a cell that
fails is recorded and the sweep goes on; an interrupted sweep goes on where it stopped. Image features are computed once
per image and serve every method that does not change what the vision tower does.

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
  pruneval sweep study.yaml --processes 8       each cell's questions shared by eight processes, a GPU each
  pruneval sweep study.yaml --engine ray --workers 4
  pruneval sweep study.yaml --engine ray --address head:6379 --out /shared/runs
"""
ENGINES = ("serial", "ray")


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("study", type=Path, help="the study file")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the cells and leave")
    add("--batch-size", type=size_of, default=8, metavar="B", help="or auto; changes no answer (default: 8)")
    add(
        "--engine",
        choices=ENGINES,
        default="serial",
        help="one cell after another, or workers on Ray (default: serial)",
    )
    add("--workers", type=int, metavar="N", help="with ray (default: one per GPU, without GPUs one per four CPUs)")
    add("--processes", type=int, default=1, metavar="N", help="share each cell's questions; not with ray (default: 1)")
    add("--address", metavar="HOST:PORT", help="a Ray cluster that runs already (default: Ray is started here)")
    add("--no-reuse", action="store_true", help="compute the image features of every cell anew")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", help="float32, float16, bfloat16 (default: float32 on a CPU, else the model's own)")


def main(args: argparse.Namespace) -> int:
    """Run the study; 0 when every cell that can run is done, 1 when one failed."""
    from pruneval.harness import models, study

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    if args.engine != "ray" and (args.workers or args.address):
        raise UserError("--workers and --address are for --engine ray")
    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, not {args.processes}")
    if args.engine == "ray" and args.processes > 1:
        raise UserError("--processes is for the serial engine; ray has --workers")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    models.check_options(args.device, args.dtype, None)
    read = study.read(args.study)
    if args.engine == "ray":
        from pruneval.harness.cluster import connected, device_of

        with connected(args.address) as ray:
            args.device = device_of(ray, args.device)
            plans = study.plans(read, dtype=args.dtype, elsewhere=args.device)
            return _dry(plans, args.out) if args.dry_run else _on_ray(plans, args, ray)
    plans = study.plans(read, device=ranks.device(args.device, args.processes), dtype=args.dtype)
    if args.dry_run:
        return _dry(plans, args.out)
    if args.processes > 1 and ranks.here().count == 1:
        return ranks.launch(args.argv, args.processes)
    return max(_run(plan, args) for plan in plans)


def _dry(plans: Sequence[Any], out: Path) -> int:
    for plan in plans:
        _tell(plan, out)
    return 0


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
    with ExitStack() as stack:

        def load() -> Any:
            loaded = models.load(plan.located, plan.device, plan.dtype, plan.kernel)
            if not args.no_reuse:
                stack.enter_context(reusing(loaded.adapter))
            return loaded

        records, missed = run.run_cells(
            plan.cells, args.out, load, batch_size=args.batch_size, show=show, keep_going=True, ranks=ranks.here()
        )
    return _told(plan, args.out, records, missed)


def _on_ray(plans: Sequence[Any], args: argparse.Namespace, ray: Any) -> int:
    from pruneval.harness import cluster, run, runner
    from pruneval.harness.progress import progress
    from pruneval.harness.ray_engine import Engine
    from pruneval.harness.waiting import Task
    from pruneval.harness.worker import Setup

    show, tasks, setups = progress(), {}, []
    ended: dict[str, Any] = {}  # records, and cells that were not run
    for number, plan in enumerate(plans):
        for what, reason in plan.refused:
            show.say(f"can't run {what}: {reason}")
        missing = run.missing_data(plan.cells, args.out)
        for place, cell in enumerate(plan.cells, 1):
            title = run.title_of(cell, place, len(plan.cells))
            if (record := runner.finished(args.out / cell.spec.hash, show)) is not None:
                show.say(f"{title}: done before, reused")
                ended[cell.spec.hash] = record
            elif cell.benchmark.name in missing:
                ended[cell.spec.hash] = run.NotRun(cell.spec, str(missing[cell.benchmark.name]))
            else:
                tasks[cell.spec.hash] = Task(number, cell, title)
        setups.append(
            Setup(
                plan.located, plan.device, plan.dtype, plan.kernel, args.out.resolve(), args.batch_size,
                not args.no_reuse,
            )
        )  # fmt: skip
    workers, asks = cluster.resources(ray, args.device, args.workers)
    ended |= Engine(ray, setups, workers, asks, show).run(list(tasks.values()))
    codes = []
    for plan in plans:
        found = [ended[cell.spec.hash] for cell in plan.cells]
        missed = [one for one in found if isinstance(one, run.NotRun)]
        codes.append(_told(plan, args.out, [one for one in found if not isinstance(one, run.NotRun)], missed))
    return max(codes)


def _told(plan: Any, out: Path, records: Sequence[Any], missed: Sequence[Any]) -> int:
    failed = [(record.spec, _why(record.error)) for record in records if not record.done]
    failed += [(cell.spec, cell.reason) for cell in missed]
    done = len(plan.cells) - len(failed)
    print(f"{done} of {len(plan.cells)} cells of {plan.located.entry.name} are done in {out}")
    for spec, reason in failed:
        print(f"not done: {spec.benchmark}, {spec.method_signature}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _why(error: dict[str, str]) -> str:
    return f"failed at sample {error['sample']}" if error["sample"] else error["message"]
