"""Time to render 2,000 records with 100,000 sample rows, tested and as one HTML page."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pruneval.harness.records import RunRecord, RunSpec, write_record
from pruneval.reports.command import main

BENCHMARKS = {
    "pocket-mme": "mme_total_score",
    "pocket-gqa": "exact_match,none",
    "pocket-pope": "pope_f1_score,none",
    "pocket-scienceqa": "exact_match,none",
    "pocket-textvqa": "exact_match,none",
}
SPEC = RunSpec(
    model="pocket-llava", revision="0123456789ab", method="vanilla", params={}, given={}, benchmark="pocket-mme",
    edition="pocket", data="d", limit=None, seed=0, dtype="float32", kernel="sdpa", positions="original",
    prompt_key="pruneval", version="0.1",
)  # fmt: skip


def write(out: Path, methods: int = 400, rows: int = 50) -> int:
    """Records of `methods` methods on five benchmarks; returns how many."""
    draw = np.random.default_rng(0)
    count = 0
    for number in range(methods):
        budget = (72.0, 36.0, 16.0)[number % 3]
        name = "vanilla" if number == 0 else "random" if number <= 3 else f"method{number}"
        params = {} if number == 0 else {"keep": budget / 144}
        for benchmark, metric in BENCHMARKS.items():
            spec = dataclasses.replace(SPEC, method=name, params=params, benchmark=benchmark)
            correct = (draw.random(rows) < draw.uniform(0.4, 0.9)).astype(float)
            samples = pd.DataFrame(
                {"doc_id": range(rows), "prompt_hash": "p", "image": [f"{i // 2}" for i in range(rows)]}
            ).assign(correct=correct)
            record = RunRecord(
                spec=spec,
                status="done",
                scores={metric: {"value": float(correct.mean()), "n": rows, "stderr": 0.05}},
                budget={"avg_in": 144.0 if number == 0 else budget, "visual_tokens": 144.0},
                implied={"tflops": budget / 1000},
            )
            write_record(out / spec.hash, record, samples)
            count += 1
    return count


if __name__ == "__main__":
    import argparse

    with tempfile.TemporaryDirectory() as folder:
        count = write(Path(folder))
        start = time.perf_counter()
        arguments = argparse.Namespace(out=Path(folder), layout=None, show="ours", format="html")
        main(arguments)
        print(f"{count} records with {count * 50} rows: {time.perf_counter() - start:.1f} s", file=sys.stderr)
