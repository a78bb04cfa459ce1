"""Which cell a worker gets next: cells of one model stay together, and of those the ones of one benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A cell that is to be run, and how it is called meanwhile."""

    model: int
    """The place of its model in the study."""
    cell: Any
    title: str

    @property
    def benchmark(self) -> str:
        """Its benchmark's name."""
        return self.cell.benchmark.name


class Waiting:
    """Tasks that no worker has."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def model(self, taken: Collection[int]) -> int | None:
        """The model a new worker should load: the one with the most tasks per worker; None when nothing waits.

        Args:
            taken: the models of the other workers, one for each.
        """
        count = Counter(task.model for task in self._tasks)
        return max(count, key=lambda model: (count[model] / (1 + list(taken).count(model)), -model), default=None)

    def take(self, model: int, last: str, elsewhere: Collection[str]) -> Task | None:
        """The next task of a model; None when none waits.

        Args:
            last: the benchmark the worker has answered, whose image features it may still have.
            elsewhere: the benchmarks the other workers are at.
        """
        own = [task for task in self._tasks if task.model == model]
        if not own:
            return None
        chosen = min(own, key=lambda task: (task.benchmark != last, task.benchmark in elsewhere))  # the first of equals
        self._tasks.remove(chosen)
        return chosen

    def put_back(self, task: Task) -> None:
        """The task is the first to be taken again."""
        self._tasks.insert(0, task)
