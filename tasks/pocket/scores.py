"""Scores of a folder of weights on the pocket editions of images, by the project's own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pruneval import tasks

SUITE = "pocket-image"


def measure(model: Path, out: Path) -> dict[str, float]:
    """Evaluate the unpruned model on every edition of the suite; results go to ``out`` (see `read`).

    Raises:
        subprocess.CalledProcessError: the evaluation failed; it has said why.
    """
    program = Path(sys.executable).with_name("pruneval")
    options = ["--method", "vanilla", "--suite", SUITE, "--model", str(model), "--out", str(out)]
    subprocess.run([program, "eval", *options], check=True)
    return read(out)


def read(out: Path) -> dict[str, float]:
    """Title of each benchmark -> score as it is printed, from the records of one model in ``out``."""
    found: dict[str, float] = {}
    rows = tasks.benchmarks()
    for path in out.glob("*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        row = rows[record["spec"]["benchmark"]]
        found[f"{row.title.replace(', pocket)', ')').replace(' (pocket)', '')} [{row.unit}]"] = (
            record["scores"][row.metric]["value"] * row.scale
        )
    return dict(sorted(found.items()))
