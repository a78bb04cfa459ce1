"""Cells of a study on Ray workers.

A worker is an actor in a process of its own that holds one model. It gets one cell at a time; the results are the
record folders, which every machine must see. A worker that dies is replaced, and its cell is tried once more: it goes
on from its journal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pruneval.harness import interrupt
from pruneval.harness.cluster import one_line
from pruneval.harness.errors import UserError
from pruneval.harness.progress import Progress
from pruneval.harness.records import RunRecord
from pruneval.harness.runner import NotRun, give_up
from pruneval.harness.waiting import Task, Waiting
from pruneval.harness.worker import CellWorker, Setup

TRIES = 2
"""How often a cell is given to a worker that dies of it."""
STARTS = 4
"""How many workers in a row may die before they are ready."""
TICK, PATIENCE = 0.5, 60.0
"""Seconds between two looks at the workers, and until a worker that is not there yet is worth a line."""

Ended = RunRecord | NotRun


@dataclass
class _Worker:
    """An actor, and what it is at."""

    model: int
    actor: Any
    number: int
    ready: Any
    """Comes when the actor is there; None from then on."""
    since: float = field(default_factory=time.monotonic)
    last: str = ""
    task: Task | None = None
    result: Any = None
    looks: Any = None
    reached: tuple[int, int] = (0, 0)
    shown: ExitStack = field(default_factory=ExitStack)
    tell: Any = None


class Engine:
    """Runs tasks of several models on workers.

    Args:
        ray: the module, connected.
        setups: of each model.
        workers: how many at a time.
        asks: what one asks Ray for, as options of an actor.
        show: where progress goes.
    """

    def __init__(self, ray: Any, setups: Sequence[Setup], workers: int, asks: dict[str, float], show: Progress) -> None:
        self.ray, self.setups, self.show = ray, setups, show
        self.actors = ray.remote(CellWorker).options(max_concurrency=4, **asks)
        self.wanted, self.asks = workers, asks
        self.workers: list[_Worker] = []
        self.died: Counter[str] = Counter()
        self.lost_starts = 0
        self.started = 0
        self.ended: dict[str, Ended] = {}

    def run(self, tasks: Sequence[Task]) -> dict[str, Ended]:
        """How every cell ended, by the hash of its spec.

        Raises:
            StorageError: results can't be written.
            UserError: workers can't be started.
            KeyboardInterrupt: the batches in flight have ended.
        """
        self.waiting = Waiting(tasks)
        try:
            with interrupt.graceful(), self.show.sweep("sweep") as tell:
                while len(self.ended) < len(tasks):
                    tell(len(self.ended), len(tasks))
                    interrupt.obey()
                    self._staff()
                    self._wait()
        except BaseException:
            self._finish_batches()
            raise
        finally:
            for worker in list(self.workers):
                self._dismiss(worker)
        return self.ended

    def _staff(self) -> None:
        """Give every worker that is free a cell; replace those whose model has none left."""
        for worker in [one for one in self.workers if one.ready is None and one.task is None]:
            elsewhere = {one.task.benchmark for one in self.workers if one.task is not None}
            task = self.waiting.take(worker.model, worker.last, elsewhere)
            if task is None:
                self._dismiss(worker)
                continue
            worker.task, worker.last, worker.reached = task, task.benchmark, (0, 0)
            worker.result = worker.actor.run.remote(task.cell, task.title)
            worker.tell = worker.shown.enter_context(self.show.cell(task.title))
        starting = sum(worker.ready is not None for worker in self.workers)
        while len(self.workers) < self.wanted and starting < len(self.waiting):
            model = self.waiting.model([worker.model for worker in self.workers])
            if model is None:
                break
            actor = self.actors.remote(self.setups[model])
            self.started += 1
            starting += 1
            self.workers.append(_Worker(model, actor, self.started, actor.look.remote()))

    def _wait(self) -> None:
        """Until something has happened, or the next look is due."""
        awaited = [worker.ready or worker.result for worker in self.workers]
        self.ray.wait(awaited, timeout=TICK)
        for worker in list(self.workers):
            awaited = worker.ready or worker.result
            if self._there(awaited):
                self._arrived(worker)
            elif worker.ready is not None and time.monotonic() - worker.since > PATIENCE:
                worker.since = time.monotonic()
                self.show.say(f"worker {worker.number} waits for Ray to find {_said(self.asks)} for it")
            elif worker.ready is None:
                self._look(worker)

    def _there(self, reference: Any) -> bool:
        return bool(self.ray.wait([reference], timeout=0)[0])

    def _arrived(self, worker: _Worker) -> None:
        """A worker is ready, its cell has ended, or it has died."""
        exceptions = self.ray.exceptions
        try:
            got = self.ray.get(worker.ready or worker.result)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except exceptions.RayError as error:
            self._lost(worker, one_line(error))
            return
        if worker.ready is not None:
            worker.ready, self.lost_starts = None, 0
            return
        for looks in (worker.looks, worker.actor.look.remote()):
            if looks is not None:
                self._show(worker, looks)
        worker.shown.close()
        task, worker.task, worker.result, worker.looks = worker.task, None, None, None
        assert task is not None
        if got is None:
            raise KeyboardInterrupt
        self._end(task, got)

    def _end(self, task: Task, ended: Ended) -> None:
        if isinstance(ended, NotRun):
            self.show.say(f"{task.title}: not run: {ended.reason}")
        self.ended[task.cell.spec.hash] = ended

    def _lost(self, worker: _Worker, reason: str) -> None:
        """A worker is dead: its cell is tried once more."""
        self._dismiss(worker)
        task = worker.task
        if task is None:
            self.lost_starts += 1
            if self.lost_starts == STARTS:
                raise UserError(f"Ray's workers die while they start: {reason}")
            return
        key = task.cell.spec.hash
        self.died[key] += 1
        if self.died[key] < TRIES:
            self.show.say(f"{task.title}: its worker died, tried once more ({reason})")
            self.waiting.put_back(task)
            return
        message = f"its worker died {self.died[key]} times ({reason})"
        self.show.say(f"{task.title}: FAILED: {message}")
        self._end(task, give_up(task.cell, self.setups[task.model].out, message))

    def _look(self, worker: _Worker) -> None:
        """Ask what a worker has said and reached; show it when it has answered."""
        if worker.looks is None:
            worker.looks = worker.actor.look.remote()
        elif self._there(worker.looks):
            self._show(worker, worker.looks)
            worker.looks = None

    def _show(self, worker: _Worker, looks: Any) -> None:
        try:
            lines, reached = self.ray.get(looks, timeout=PATIENCE)
        except self.ray.exceptions.RayError:
            return  # it is dead, which its result will say
        for line in lines:
            self.show.say(f"worker {worker.number}: {line}")
        if reached[1] and reached != worker.reached:
            worker.reached = reached
            worker.tell(*reached)

    def _finish_batches(self) -> None:
        """Ask the workers to stop, and wait until they have; another interrupt ends the waiting."""
        busy = [worker for worker in self.workers if worker.task is not None]
        for worker in busy:
            worker.actor.stop.remote()
        if busy:
            self.ray.wait([worker.result for worker in busy], num_returns=len(busy))

    def _dismiss(self, worker: _Worker) -> None:
        worker.shown.close()
        self.ray.kill(worker.actor)
        self.workers.remove(worker)


def _said(asks: dict[str, float]) -> str:
    return ", ".join(f"{value:g} {name.removeprefix('num_').rstrip('s').upper()}" for name, value in asks.items())
