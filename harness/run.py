"""From a command to records: expand it into cells, and run those that are not done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneval import methods
from pruneval.harness import data, interrupt, judge, models
from pruneval.harness.batching import BatchSize
from pruneval.harness.errors import UserError, unknown
from pruneval.harness.progress import Progress, progress
from pruneval.harness.ranks import ALONE, Ranks
from pruneval.harness.records import RunRecord, StorageError
from pruneval.harness.runner import NotRun, Runner
from pruneval.harness.spec import FRAMES, RunSpec, code_version, sampling
from pruneval.methods.recipe import file_of
from pruneval.tasks import Benchmark, benchmark

FILES = ("recipe", "checkpoint")
"""Parameters of methods that name files."""
HELPER = "helper"
"""The parameter that names a second model."""


@dataclass(frozen=True)
class Cell:
    """A spec with what it takes to run it."""

    spec: RunSpec
    method: methods.Method
    benchmark: Benchmark
    frames: int = FRAMES
    """Of each video."""


def build_method(name: str, params: Mapping[str, Any] | None = None) -> methods.Method:
    """A method, or one clear line. Raises: UserError."""
    if name not in methods.names():
        raise unknown("method", name, methods.names())
    try:
        return methods.build(name, params)
    except methods.MethodError as error:
        raise UserError(str(error)) from error


def expand(
    located: models.Located,
    built: Iterable[methods.Method],
    benchmarks: Iterable[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    kernel: str = "sdpa",
    num_beams: int | None = None,
    frames: int = FRAMES,
) -> list[Cell]:
    """One cell per method and benchmark, benchmarks outermost."""
    cells = []
    built, asked = list(built), judge.configured()
    tower = models.text_tower_revision(located) if any(method.card.clip for method in built) else ""
    for name in benchmarks:
        row = benchmark(name)
        for method in built:
            spec = RunSpec(
                model=located.entry.name,
                revision=located.revision,
                method=method.card.name,
                params=identified(method.card.name, method.params),
                given=identified(method.card.name, method.given),
                benchmark=row.name,
                edition=row.edition,
                data=data.revision(row),
                limit=limit,
                seed=seed,
                dtype=dtype,
                kernel=kernel,
                num_beams=num_beams,
                positions=method.position_ids,
                prompt_key="pruneval",
                version=code_version(),
                frames=sampling(frames) if row.videos else "",
                judge=asked.name if row.judge and asked else "",
                text_tower=tower if method.card.clip else "",
            )
            cells.append(Cell(spec, method, row, frames))
    return cells


def identified(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """A method's parameters as a record names them: a file by name and content, wherever it lies; a model by revision.

    Raises: UserError when a helper model is not named or not there.
    """
    named = {name: _content(method, value) if name in FILES else value for name, value in params.items()}
    return named | {name: _model(named[name]) for name in named if name == HELPER}


def _model(name: str) -> str:
    if not name:
        raise UserError("the method needs a helper model: --set helper=NAME, of `pruneval list models` or a folder")
    found = models.locate(name)
    return f"{found.entry.name}@{found.revision[:8]}"


def _content(method: str, value: Any) -> Any:
    path = file_of(method, str(value))
    if not value or not path.exists():
        return value
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    seen = hashlib.sha256()
    for file in files:
        seen.update(file.name.encode() + file.read_bytes())
    return f"{Path(str(value)).name}@{seen.hexdigest()[:8]}"


def run_cells(
    cells: Iterable[Cell],
    out: Path,
    load: Callable[[], models.LoadedModel],
    *,
    batch_size: BatchSize = 8,
    evaluate: Callable[..., Any] | None = None,
    show: Progress | None = None,
    keep_going: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[list[RunRecord], list[NotRun]]:
    """Every cell's record, in the order of the cells, and the cells that could not be tried.

    Args:
        cells: of one model.
        out, load, batch_size, evaluate, show, ranks: see `Runner`.
        keep_going: what is wrong with a cell is its trouble alone; otherwise missing data, or anything wrong before the
            model is loaded, ends it all.
    """
    show = show or progress()
    runner = Runner(out, load, batch_size=batch_size, evaluate=evaluate, show=show, ranks=ranks)
    records, missed = [], []
    cells = list(cells)
    missing = ranks.once(lambda: missing_data(cells, out), "data")
    if missing and not keep_going:
        raise next(iter(missing.values()))
    with show.sweep(cells[0].spec.model if cells else "") as tell:
        for number, cell in enumerate(cells, 1):
            interrupt.obey()
            tell(number - 1, len(cells))
            title = title_of(cell, number, len(cells))
            if cell.benchmark.name in missing:
                ended: RunRecord | NotRun = NotRun(cell.spec, str(missing[cell.benchmark.name]))
            elif keep_going:
                ended = runner.attempt(cell, title)
            else:
                ended = _strict(runner, cell, title)
            if isinstance(ended, NotRun):
                show.say(f"{title}: not run: {ended.reason}")
                missed.append(ended)
            else:
                records.append(ended)
    return records, missed


def _strict(runner: Runner, cell: Cell, title: str) -> RunRecord | NotRun:
    try:
        return runner.run(cell, title)
    except UserError as error:
        if runner.loaded is None or isinstance(error, StorageError):
            raise
        return NotRun(cell.spec, str(error))


def title_of(cell: Cell, number: int, count: int) -> str:
    """How a cell is called while it runs."""
    return f"[{number}/{count}] {cell.benchmark.title}, {cell.spec.method_signature}"


def missing_data(cells: Iterable[Cell], out: Path) -> dict[str, UserError]:
    """What is wrong with the data of cells that may still run, by benchmark; looked at before a model is loaded."""
    from pruneval.harness.data_check import demand

    waiting = {cell.benchmark: cell.spec.limit for cell in cells if not (out / cell.spec.hash / "record.json").exists()}
    missing = {}
    for row, limit in waiting.items():
        if row.edition == "full" and not judge.lacking(row):
            try:
                demand(row, limit)
            except UserError as error:
                missing[row.name] = error
    return missing
