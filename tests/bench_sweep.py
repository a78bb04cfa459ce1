"""What reuse and batching are worth in a study: the same cells as a sweep runs them, and one by one without either.

    python tests/bench_sweep.py [--methods M ...] [--keep 0.5 0.25 0.1] [--benchmarks B ...] [--limit 24] [--out FILE]

Once as `pruneval sweep --batch-size auto` does it: one model for all cells, questions prepared once, image features
kept. Once with batches of one, every cell preparing and encoding everything itself. Both run in one process, cell by
cell in turns, every other cell in reversed order, so that a drift of the machine hits both. Imports are counted for
neither side, though one by one as commands every cell would pay for them. Loading the model, which a sweep does once
and single cells do each, is timed apart: the ratio is given without and with it. All answers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

METHODS = ("random", "fastv", "sparsevlm", "dart", "divprune", "visionzip", "hiprune", "vispruner")
WAYS = ("sweep", "one by one")
BENCHMARKS = ("pocket-mme", "pocket-gqa", "pocket-textvqa")


def cells(located: Any, args: argparse.Namespace) -> list[Any]:
    """The subset of a study: vanilla, and every method at every budget, on every benchmark."""
    from pruneval.harness import bench, run

    built = [run.build_method("vanilla")]
    built += [bench.with_knob(name, {}, keep) for name in args.methods for keep in args.keep]
    return run.expand(located, built, args.benchmarks, limit=args.limit)


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every cell both ways, and how many answers are the same."""
    from pruneval.harness import lmms_model, models, preparing
    from pruneval.harness.reuse import reusing
    from pruneval.harness.runner import Runner

    located = models.locate(model)
    together = models.load(located, device="cpu")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(reusing(together.adapter))
        sweep = Runner(out / "sweep", lambda: together, batch_size="auto")
        alone = models.load(located, device="cpu")

        def run(way: str, cell: Any) -> Any:
            title = f"{way}: {cell.spec.benchmark}, {cell.spec.method_signature}"
            if way == "sweep":
                return sweep.run(cell, title)
            with patch.object(lmms_model.PrunevalModel, "_sharing", nullcontext):
                return Runner(out / "alone", lambda: alone, batch_size=1).run(cell, title)

        for way in WAYS:  # the warm-up: another cell, whose questions are forgotten
            args_warm = argparse.Namespace(**{**vars(args), "limit": 4, "methods": []})
            run(way, cells(located, args_warm)[0])
        preparing.forget(together.processor)
        for number, cell in enumerate(cells(located, args)):
            row: dict[str, Any] = {"benchmark": cell.spec.benchmark, "method": cell.spec.method_signature}
            records = {}
            alone, row["load"] = clocked(lambda: models.load(located, device="cpu"))
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                records[way], row[way] = clocked(lambda way=way, cell=cell: run(way, cell))
            row["batch_size"] = records["sweep"].environment["batch_size"]
            row["same_answers"], row["questions"] = same(cell, out / "sweep", out / "alone")
            row["same_scores"] = records["sweep"].scores == records["one by one"].scores
            rows.append(row)
    return {"model": model, "cells": rows, "features": {"served": store.hits, "computed": store.misses}}


def clocked(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What comes of it; seconds by the wall clock and of this process's own time."""
    wall, own = time.perf_counter(), time.process_time()
    made = work()
    return made, {"wall": time.perf_counter() - wall, "process": time.process_time() - own}


def same(cell: Any, *outs: Path) -> tuple[int, int]:
    """Answers that are the same both ways, of how many."""
    import pandas as pd

    one, other = (pd.read_parquet(out / cell.spec.hash / "samples.parquet").answer for out in outs)
    return int((one == other).sum()), len(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS))
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--out", type=Path, help="also write the numbers and the machine's description, as JSON")
    args = parser.parse_args()
    import torch

    from pruneval.harness.machine import load, machine
    from pruneval.harness.records import write_atomically

    document: dict[str, Any] = {"what": __doc__.split("\n")[0], "machine": machine(torch.device("cpu"))}
    document |= {"limit": args.limit, **measure(args.model, args)}
    document["machine"]["load_after"] = load()
    rows = document["cells"]
    clocks = ("wall", "process")
    total = {way: {clock: sum(row[way][clock] for row in rows) for clock in clocks} for way in (*WAYS, "load")}
    document["seconds"] = total
    document["ratio"] = {clock: total["one by one"][clock] / total["sweep"][clock] for clock in clocks}
    once = {clock: total["load"][clock] / len(rows) for clock in clocks}
    document["ratio_with_loading"] = {
        clock: (total["one by one"][clock] + total["load"][clock]) / (total["sweep"][clock] + once[clock])
        for clock in clocks
    }
    for row in rows:
        ratio = row["one by one"]["process"] / row["sweep"]["process"]
        print(f"{row['benchmark']:18} {row['method']:44} {ratio:6.2f} x by process time, batch {row['batch_size']}")
    slow, fast = total["one by one"]["wall"], total["sweep"]["wall"]
    loading = document["ratio_with_loading"]
    print(
        f"{len(rows)} cells: {document['ratio']['wall']:.2f} x by the clock ({slow:.0f} s against {fast:.0f} s), "
        f"{document['ratio']['process']:.2f} x by process time; with loading the model "
        f"{loading['wall']:.2f} x and {loading['process']:.2f} x; same answers: "
        f"{sum(row['same_answers'] for row in rows)} of {sum(row['questions'] for row in rows)}"
    )
    if args.out:
        write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
