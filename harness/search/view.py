"""What a search shows: every trial with the best value so far, and at the end a plot of all."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pruneval.harness.progress import progress


class View:
    """The trials of a search as they come: a bar with the last one on a terminal, else a line each."""

    def __init__(self, title: str) -> None:
        self.title, self.total = title, 0
        self.values: list[float] = []
        self._progress, self._stack = progress(), ExitStack()

    def __enter__(self) -> View:
        self._tell = self._stack.enter_context(self._progress.sweep(self.title))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def expect(self, trials: int) -> None:
        """How many trials there will be."""
        self.total = trials
        self.note(f"{self.title}: {trials} trials")
        self._tell(0, trials)

    def note(self, text: str) -> None:
        """A line to be read."""
        self._progress.say(text)

    def trial(self, value: float, text: str) -> None:
        """One trial is done."""
        self.values.append(value)
        number, best = len(self.values), max(self.values)
        self._tell(number, self.total, f"trial {number}: {value:.4f} (best {best:.4f}) {text}")

    def summary(self) -> str:
        """One line about the whole search."""
        return f"{len(self.values)} trials, best objective {max(self.values):.4f}" if self.values else "no trial"

    def plot(self, path: Path) -> None:
        """The objective of every trial, and the best so far."""
        import pandas as pd

        from pruneval.reports import figures

        steps = range(1, len(self.values) + 1)
        figure = figures.search_history(pd.DataFrame({"step": steps, "objective": self.values}))
        figure.axes[0].set_title(self.title)
        figure.savefig(path, dpi=120)
