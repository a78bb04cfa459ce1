"""Whether a benchmark's data are complete: shards, rows, columns, videos. Nothing is decoded or loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pruneval.harness import data
from pruneval.harness.errors import UserError
from pruneval.tasks import Benchmark


def problems(benchmark: Benchmark, limit: int | None = None) -> Iterator[str]:
    """What is wrong with a full edition's data, one line each; the first is enough to stop.

    Args:
        limit: only so many questions of each part will be asked: only their videos must be there.
    """
    found = 0
    for place in range(len(benchmark.tasks)):
        try:
            source = data.source(benchmark, place)
            table = _Table(source, benchmark)
        except UserError as error:
            yield str(error)
            continue
        missing = [column for column in benchmark.columns if column not in table.columns]
        if missing:
            yield f"benchmark {benchmark.name!r}: {table.where} has no column {', '.join(missing)}"
            continue
        found += table.count(benchmark.only)
        if benchmark.videos:
            yield from _videos(benchmark, place, table, limit)
    if found and found != benchmark.n:
        yield f"benchmark {benchmark.name!r}: {found} questions in {data.root() / benchmark.dataset}, not {benchmark.n}"
    if benchmark.images is not None:
        try:
            _Table(data.image_table(benchmark), benchmark)
        except UserError as error:
            yield str(error)


def demand(benchmark: Benchmark, limit: int | None = None) -> None:
    """Raise the first problem of a full edition's data as a UserError."""
    data.require(benchmark)
    for problem in problems(benchmark, limit):
        raise UserError(problem)


def _videos(benchmark: Benchmark, place: int, table: _Table, limit: int | None) -> Iterator[str]:
    wanted, lost, folder = 0, [], data.video_folder(benchmark)
    for row in table.rows()[: limit or None]:
        wanted += 1
        try:
            (path,) = data.video_of(row, benchmark=benchmark, place=place, folder=folder)
            if Path(path).stat().st_size:
                continue
        except FileNotFoundError:
            path = str(folder / benchmark.video_path(row, place))
        lost.append(path)
    if lost:
        which = f" of {benchmark.parts[place]}" if benchmark.parts else ""
        yield f"benchmark {benchmark.name!r}: {len(lost)} of {wanted} videos{which} are missing or empty, as {lost[0]}"


class _Table:
    """Columns and rows of a table's files, images left out."""

    def __init__(self, source: data.Source, benchmark: Benchmark) -> None:
        self.kind, self.files = source.builder, [Path(file) for file in source.files]
        self.where = self.files[0].parent if len(self.files) > 1 else self.files[0]
        self.answers = benchmark.answers and benchmark.edition == "full"
        self.benchmark = benchmark
        try:
            self.columns = self._columns()
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"benchmark {benchmark.name!r}: {self.where} is damaged ({reason})") from error

    def count(self, only: dict[str, list[str]]) -> int:
        """Rows that count."""
        if self.kind == "parquet" and not only:
            return sum(self._read(file).num_rows for file in self.files)
        return sum(all(row[column] in values for column, values in only.items()) for row in self.rows(tuple(only)))

    def rows(self, columns: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The rows' named columns; of videos all that their paths may need."""
        if self.kind == "json":
            return [row for file in self.files for row in _json(file)]
        import pyarrow.parquet as pq

        names = list(columns or [name for name in self.benchmark.columns if f"{{{name}}}" in self.benchmark.videos])
        return [row for file in self.files for row in pq.read_table(file, columns=names).to_pylist()]

    def _columns(self) -> set[str]:
        if self.kind == "json":
            names = set.intersection(*(set(row) for file in self.files for row in _json(file)))
            return names | {"answer"} if self.answers else names
        return set.intersection(*(set(self._read(file).schema.to_arrow_schema().names) for file in self.files))

    @staticmethod
    def _read(file: Path) -> Any:
        import pyarrow.parquet as pq

        if not file.stat().st_size:
            raise ValueError(f"{file.name} is empty")
        return pq.read_metadata(file)


def _json(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line] if file.suffix == ".jsonl" else json.loads(text)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file.name} holds no list of rows")
    return rows
