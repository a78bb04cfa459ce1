"""Records of a whole study, drawn at random: every method at three budgets on every pocket benchmark of images.

Run as a program it writes them into a folder, to look at their report.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pruneval import methods
from pruneval.harness.records import RunRecord, RunSpec, write_record
from pruneval.methods.base import MethodError
from pruneval.tasks import benchmark, suite

TOKENS, LAYERS = 144, 8
KEEPS = (0.5, 0.25, 0.11)
SPEC = RunSpec(
    model="pocket-llava", revision="0123456789ab", method="vanilla", params={}, given={}, benchmark="pocket-mme",
    edition="pocket", data="d", limit=None, seed=0, dtype="float32", kernel="sdpa", positions="original",
    prompt_key="pruneval", version="0.1",
)  # fmt: skip
POOL = 12
"""Different ways to answer a benchmark; to write one per record takes longer than all the rest."""


class Samples:
    """A record's samples whose file is written once, as `write_record` takes them."""

    def __init__(self, correct: np.ndarray) -> None:
        rows = range(len(correct))
        frame = pd.DataFrame({"doc_id": rows, "prompt_hash": "p", "image": [f"{at // 2}" for at in rows]})
        buffer = io.BytesIO()
        frame.assign(correct=correct).to_parquet(buffer, index=False)
        self.correct, self.bytes = correct, buffer.getvalue()

    def __len__(self) -> int:
        return len(self.correct)

    def to_parquet(self, buffer: io.BytesIO, index: bool) -> None:
        buffer.write(self.bytes)


def study() -> list[tuple[str, dict[str, Any]]]:
    """Every method with its parameters, at each budget it can have."""
    found = [("vanilla", {})]
    for name in methods.names():
        for keep in KEEPS:
            try:
                found.append((name, dict(methods.build(name, {"keep": keep}).params)))
            except MethodError:
                continue
    return found


def write(
    out: Path, rows: int = 50, kinds: Iterable[tuple[str, Mapping[str, Any]]] | None = None,
    names: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Records of these methods on these benchmarks, with so many questions each; returns how many."""
    draw = np.random.default_rng(0)
    names = names or suite("pocket-image")
    shares = np.linspace(0.35, 0.95, POOL)
    pool = {name: [Samples((draw.random(rows) < share).astype(float)) for share in shares] for name in names}
    count = 0
    for method, params in study() if kinds is None else kinds:
        keep = float(params.get("keep", 0.25)) if method != "vanilla" else 1.0
        kept = TOKENS * keep * (1 if method in ("vanilla", "random") else draw.uniform(0.95, 1.05))
        implied = _implied(method, keep)
        for name in names:
            row = benchmark(name)
            samples = pool[name][POOL - 1 if method == "vanilla" else int(draw.integers(POOL))]
            share = float(samples.correct.mean())
            spec = dataclasses.replace(SPEC, method=method, params=dict(params), benchmark=name)
            stderr = None if row.maximum > 100 else row.maximum * (share * (1 - share) / rows) ** 0.5
            record = RunRecord(
                spec=spec,
                status="done",
                scores={row.metric: {"value": share * row.maximum, "n": rows, "stderr": stderr}},
                budget={"avg_in": kept, "kept_after": kept, "visual_tokens": float(TOKENS), "keep": kept / TOKENS},
                implied=implied,
            )
            write_record(out / spec.hash, record, samples)  # type: ignore[arg-type]
            count += 1
    return count


def _implied(method: str, keep: float) -> dict[str, Any]:
    inside = method in ("fastv", "pdrop", "sparsevlm", "psigmoid")
    counts = [TOKENS if inside and layer < 2 else round(TOKENS * keep) for layer in range(LAYERS)]
    linear = 1.8e5 * sum(counts)
    macs = {"vision_linear": 1.2e8, "projector": 6.6e6, "llm_linear": linear, "head_all": 1.2e5 * counts[-1]}
    return {"tflops": 2e-12 * sum(macs.values()), "per_layer": counts, "visual": TOKENS, "macs": macs}


if __name__ == "__main__":
    import sys

    print(write(Path(sys.argv[1])), "records in", sys.argv[1])
