"""From a command to records: expand it into cells, run those that are not done, write one record each.

A cell that has a record with a score is not run again. A cell that was interrupted goes on from its journal. A cell in
which a sample failed ends as failed, without a score, and is tried again the next time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pruneval import methods
from pruneval.harness import data, interrupt, judge, models
from pruneval.harness.environment import environment
from pruneval.harness.errors import SampleFailure, UserError, unknown
from pruneval.harness.progress import Progress, progress
from pruneval.harness.records import Journal, RecordError, RunRecord, StorageError, claim, read_record, write_record
from pruneval.harness.spec import FRAMES, RunSpec, code_version, sampling
from pruneval.tasks import Benchmark, benchmark

FILES = ("recipe", "checkpoint")
"""Parameters of methods that name files."""
HELPER = "helper"
"""The parameter that names a second model."""
BUDGETS = ("visual_tokens", "avg_in", "kept_after", "final", "keep", "early")


@dataclass(frozen=True)
class Cell:
    """A spec with what it takes to run it."""

    spec: RunSpec
    method: methods.Method
    benchmark: Benchmark
    frames: int = FRAMES
    """Of each video."""


@dataclass(frozen=True)
class NotRun:
    """A cell that could not be tried; nothing is recorded."""

    spec: RunSpec
    reason: str


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
    for name in benchmarks:
        row = benchmark(name)
        for method in built:
            spec = RunSpec(
                model=located.entry.name,
                revision=located.revision,
                method=method.card.name,
                params=identified(method.params),
                given=identified(method.given),
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
            )
            cells.append(Cell(spec, method, row, frames))
    return cells


def identified(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a record names them: a file by its name and content, wherever it lies; a model by its revision.

    Raises: UserError when a helper model is not named or not there.
    """
    named = {name: _content(value) if name in FILES else value for name, value in params.items()}
    return named | {name: _model(named[name]) for name in named if name == HELPER}


def _model(name: str) -> str:
    if not name:
        raise UserError("the method needs a helper model: --set helper=NAME, of `pruneval list models` or a folder")
    found = models.locate(name)
    return f"{found.entry.name}@{found.revision[:8]}"


def _content(value: Any) -> Any:
    path = Path(str(value))
    if not value or not path.exists():
        return value  # a shipped recipe's name
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    seen = hashlib.sha256()
    for file in files:
        seen.update(file.name.encode() + file.read_bytes())
    return f"{path.name}@{seen.hexdigest()[:8]}"


def run_cells(
    cells: Iterable[Cell],
    out: Path,
    load: Callable[[], models.LoadedModel],
    *,
    batch_size: int = 8,
    evaluate: Callable[..., Any] | None = None,
    show: Progress | None = None,
) -> tuple[list[RunRecord], list[NotRun]]:
    """Every cell's record, in the order of the cells, and the cells that could not be tried.

    Args:
        out: the results folder.
        load: gives the model; called at most once, and not at all when every cell is done.
        batch_size: samples per `generate`.
        evaluate: `harness.evaluate.evaluate`, or a stand-in.
        show: where progress goes.
    """
    show = show or progress()
    evaluate = evaluate or _evaluate
    loaded: models.LoadedModel | None = None
    records, missed = [], []
    cells = list(cells)
    for number, cell in enumerate(cells, 1):
        interrupt.obey()
        title = f"[{number}/{len(cells)}] {cell.benchmark.title}, {cell.spec.method_signature}"
        folder = out / cell.spec.hash
        try:
            with claim(folder):
                record = _finished(folder, show)
                if record is not None:
                    show.say(f"{title}: done before, reused")
                    records.append(record)
                    continue
                if reason := judge.lacking(cell.benchmark):
                    show.say(f"{title}: not run: {reason}")
                    missed.append(NotRun(cell.spec, reason))
                    continue
                if loaded is None:
                    _ready(cells[number - 1 :], out)
                    show.say(f"loading {cell.spec.model} and lmms-eval")
                    loaded = load()
                records.append(_run(cell, folder, loaded, batch_size, evaluate, show, title))
        except StorageError:
            raise
        except UserError as error:
            if loaded is None:
                raise
            show.say(f"{title}: not run: {error}")
            missed.append(NotRun(cell.spec, str(error)))
    return records, missed


def _ready(cells: Iterable[Cell], out: Path) -> None:
    """Before a model is loaded: the data of all that may still run is there. Raises: UserError."""
    from pruneval.harness.data_check import demand

    waiting = {cell.benchmark: cell.spec.limit for cell in cells if not (out / cell.spec.hash / "record.json").exists()}
    for row, limit in waiting.items():
        if row.edition == "full" and not judge.lacking(row):
            demand(row, limit)


def _evaluate(*args: Any, **options: Any) -> Any:
    from pruneval.harness.evaluate import evaluate

    return evaluate(*args, **options)


def _finished(folder: Path, show: Progress) -> RunRecord | None:
    """The record of a scored cell; a failed or damaged one is to be run again."""
    try:
        record = read_record(folder)
    except RecordError as error:
        show.say(f"{error}; running it again")
        return None
    return record if record is not None and record.done else None


def _run(
    cell: Cell,
    folder: Path,
    loaded: models.LoadedModel,
    batch_size: int,
    evaluate: Callable[..., Any],
    show: Progress,
    title: str,
) -> RunRecord:
    journal = Journal(folder)
    resumed = len(journal.answers())
    if resumed:
        show.say(f"{title}: goes on, {resumed} answers are there already")
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    adapter = models.adapter_of(loaded, cell.method)
    reason = adapter.supports(cell.method) if adapter is not None else None
    if reason:
        raise UserError(f"{cell.spec.method} does not run on {cell.spec.model}: {reason}")
    error, outcome = None, None
    with show.cell(title) as tell, interrupt.graceful():
        try:
            outcome = evaluate(
                loaded,
                cell.method,
                cell.benchmark,
                limit=cell.spec.limit,
                seed=cell.spec.seed,
                batch_size=batch_size,
                num_beams=cell.spec.num_beams,
                frames=cell.frames,
                journal=journal,
                on_progress=tell,
            )
        except SampleFailure as failure:
            error = {"sample": failure.key, "message": failure.message}
    record = RunRecord(
        spec=cell.spec,
        status="failed" if outcome is None else "done",
        error=error,
        scores=outcome.scores if outcome else {},
        budget=_budget(outcome.samples) if outcome else {},
        implied=_implied(cell, loaded, outcome.samples) if outcome else None,
        environment={
            **environment(),
            "device": str(loaded.device),
            "batch_size": outcome.batch_size if outcome and outcome.batch_size else batch_size,
        },
        timing={"started": started, "seconds": time.monotonic() - clock, "resumed": resumed},
    )
    record = write_record(folder, record, outcome.samples if outcome else None)
    if record.done:
        journal.remove()
    else:
        show.say(f"{title}: FAILED at sample {error['sample']}: {error['message']}" if error else f"{title}: FAILED")
    return record


def _budget(samples: Any) -> dict[str, float]:
    """Means over the samples, where every sample has one."""
    columns = [name for name in BUDGETS if name in samples and len(samples) and samples[name].notna().all()]
    return {name: float(samples[name].mean()) for name in columns}


def _implied(cell: Cell, loaded: models.LoadedModel, samples: Any) -> dict[str, Any] | None:
    """The cost of the median sample, from dimensions and the method's declared schedule; None where unknown."""
    from pruneval.harness import measure

    try:
        visual = round(float(samples["visual_tokens"].median()))
        counts = [len(ids) for ids in loaded.processor.tokenizer(list(samples["prompt"]))["input_ids"]]
        text = sorted(counts)[len(counts) // 2] - 1  # the image's placeholder is one token before it is expanded
        helper = models.helper_of(loaded, cell.method)
        found = measure.implied(
            str(loaded.folder), cell.spec.method, cell.method.params, visual_tokens=visual, text_tokens=text,
            helper=None if helper is None else str(helper.folder),
        )  # fmt: skip
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {**found, "model": cell.spec.model, "params": cell.spec.params, "signature": cell.spec.method_signature}
