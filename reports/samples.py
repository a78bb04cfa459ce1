"""The questions behind a record, read once and no more of them than the tests need."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pruneval.harness.records import RunRecord, read_samples

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("doc_id", "prompt_hash", "correct", "image")


def reader(out: Path | str) -> Callable[[RunRecord], pd.DataFrame | None]:
    """A function from a record of this results folder to its samples' `NEEDED` columns; None when it has none."""

    @cache
    def read(name: str) -> pd.DataFrame | None:
        record = known[name]
        rows = read_samples(Path(out) / name, record)
        return rows[[column for column in NEEDED if column in rows]]

    known: dict[str, RunRecord] = {}

    def samples(record: RunRecord) -> pd.DataFrame | None:
        if record.samples is None:
            return None
        known[record.spec.hash] = record
        return read(record.spec.hash)

    return samples
