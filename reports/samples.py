"""The questions behind a record, read once and no more of them than the tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pruneval.harness.records import RunRecord
from pruneval.reports.statistics import Answers, answers

NEEDED = ("doc_id", "prompt_hash", "correct", "image")


def reader(out: Path | str) -> Callable[[RunRecord], Answers | None]:
    """A function from a record of this results folder to its answers; None when it has none.

    The records come from `read_records`, which has verified the files.
    """
    found: dict[str, Answers] = {}

    def samples(record: RunRecord) -> Answers | None:
        if record.samples is None:
            return None
        name = record.spec.hash
        if name not in found:
            from pyarrow.parquet import ParquetFile

            with ParquetFile(Path(out) / name / record.samples["file"]) as file:
                known = file.schema_arrow.names
                columns = [column for column in NEEDED if column in known]
                table = file.read(columns, use_threads=False)  # threads cost more than so small files take
            found[name] = answers({column: table[column].to_numpy() for column in columns})
        return found[name]

    return samples
