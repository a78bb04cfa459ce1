"""Running cells on a model: claim, reuse, resume, evaluate, one record each.

A cell that has a record with a score is not run again. A cell that was interrupted goes on from its journal. A cell in
which a sample failed ends as failed, without a score, and is tried again the next time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness import interrupt, judge, models
from pruneval.harness.environment import environment
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.progress import Progress, progress
from pruneval.harness.ranks import ALONE, Ranks
from pruneval.harness.records import Journal, RecordError, RunRecord, StorageError, claim, read_record, write_record
from pruneval.harness.spec import RunSpec

if TYPE_CHECKING:
    from pruneval.harness.batching import BatchSize
    from pruneval.harness.run import Cell

BUDGETS = ("visual_tokens", "avg_in", "kept_after", "final", "keep", "early")


@dataclass(frozen=True)
class NotRun:
    """A cell that could not be tried; nothing is recorded."""

    spec: RunSpec
    reason: str


class Runner:
    """Runs cells of one model, which is loaded when the first of them needs it and then kept.

    Args:
        out: the results folder.
        load: gives the model; called at most once, also when it fails, and not at all when every cell is done.
        batch_size: samples per `generate`.
        evaluate: `harness.evaluate.evaluate`, or a stand-in.
        show: where progress goes.
        ranks: this process among those that run the same cells.
    """

    def __init__(
        self,
        out: Path,
        load: Callable[[], models.LoadedModel],
        *,
        batch_size: BatchSize = 8,
        evaluate: Callable[..., Any] | None = None,
        show: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.out, self.batch_size, self.ranks = out, batch_size, ranks
        self.evaluate, self.show = evaluate or _evaluate, show or progress()
        self.loaded: models.LoadedModel | None = None
        self._load = load
        self._unloadable: Exception | None = None

    def run(self, cell: Cell, title: str) -> RunRecord | NotRun:
        """The cell's record, of this run or an earlier one, or why it was not tried.

        Raises:
            UserError: another process runs the cell, the model can't be loaded, or the method does not fit.
            StorageError: results can't be written.
        """
        folder = self.out / cell.spec.hash
        with ExitStack() as held:
            ended = self.ranks.once(lambda: self._ended(cell, folder, title, held), "claim")
            if ended is not None:
                return ended
            return self._run(cell, folder, self._model(cell), title)

    def _ended(self, cell: Cell, folder: Path, title: str, held: ExitStack) -> RunRecord | NotRun | None:
        """The cell's record or why it can't be run; None when it is to be run, claimed while `held`."""
        held.enter_context(claim(folder))
        record = finished(folder, self.show)
        if record is not None:
            self.show.say(f"{title}: done before, reused")
            return record
        reason = judge.lacking(cell.benchmark)
        return NotRun(cell.spec, reason) if reason else None

    def attempt(self, cell: Cell, title: str) -> RunRecord | NotRun:
        """`run`, whose trouble is the reason why the cell was not tried. Raises: StorageError."""
        try:
            return self.run(cell, title)
        except StorageError:
            raise
        except UserError as error:
            return NotRun(cell.spec, str(error))
        except Exception as error:
            return NotRun(cell.spec, f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _model(self, cell: Cell) -> models.LoadedModel:
        if self._unloadable is not None:
            raise self._unloadable
        if self.loaded is None:
            self.show.say(f"loading {cell.spec.model} and lmms-eval")
            try:
                self.loaded = self.ranks.agree(self._load, "load")
            except Exception as error:
                self._unloadable = error
                raise
            interrupt.obey()
        return self.loaded

    def _run(self, cell: Cell, folder: Path, loaded: models.LoadedModel, title: str) -> RunRecord:
        ranks, show = self.ranks, self.show
        journal = Journal(folder, ranks.number)
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
                outcome = ranks.agree(
                    lambda: self.evaluate(
                        loaded,
                        cell.method,
                        cell.benchmark,
                        limit=cell.spec.limit,
                        seed=cell.spec.seed,
                        batch_size=self.batch_size,
                        num_beams=cell.spec.num_beams,
                        frames=cell.frames,
                        journal=journal,
                        on_progress=tell,
                        ranks=ranks,
                    ),
                    "evaluate",
                )
            except SampleFailure as failure:
                error = {"sample": failure.key, "message": failure.message}

        def write() -> RunRecord:
            timing = {"started": started, "seconds": time.monotonic() - clock, "resumed": resumed}
            where = {"device": str(loaded.device), "batch_size": (outcome and outcome.batch_size) or self.batch_size}
            if ranks.count > 1:
                where["processes"] = ranks.count
            record = RunRecord(
                spec=cell.spec,
                status="failed" if outcome is None else "done",
                error=error,
                scores=outcome.scores if outcome else {},
                budget=_budget(outcome.samples) if outcome else {},
                provisional=cell.method.card.provisional,
                implied=_implied(cell, loaded, outcome.samples) if outcome else None,
                environment={**environment(), **where},
                timing=timing,
            )
            record = write_record(folder, record, outcome.samples if outcome else None)
            if record.done:
                journal.remove()
            return record

        record = ranks.once(write, "record")
        if not record.done:
            where = f" at sample {error['sample']}: {error['message']}" if error else ""
            show.say(f"{title}: FAILED{where}")
        return record


def _evaluate(*args: Any, **options: Any) -> Any:
    from pruneval.harness.evaluate import evaluate

    return evaluate(*args, **options)


def finished(folder: Path, show: Progress) -> RunRecord | None:
    """The record of a scored cell; a failed or damaged one is to be run again."""
    try:
        record = read_record(folder)
    except RecordError as error:
        show.say(f"{error}; running it again")
        return None
    return record if record is not None and record.done else None


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


def give_up(cell: Cell, out: Path, message: str) -> RunRecord | NotRun:
    """Record that a cell failed for a reason outside of it. Journal and answers stay, so that it can be tried again."""
    record = RunRecord(
        spec=cell.spec,
        status="failed",
        error={"sample": "", "message": message},
        environment=environment(),
        timing={"started": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": 0.0, "resumed": 0},
    )
    folder = out / cell.spec.hash
    try:
        with claim(folder):
            return write_record(folder, record)
    except StorageError:
        raise
    except UserError as error:
        return NotRun(cell.spec, f"{message}; {error}")
