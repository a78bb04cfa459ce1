"""What a search shows: a bar with the best value so far and the time left, and at the end a plot of all trials."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType


class View:
    """A bar on a terminal, else a line per trial; collects the trials for the plot."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeftColumn

        self.title, self.values, self.texts = title, [], []  # type: ignore[var-annotated]
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeLeftColumn(), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> View:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def expect(self, trials: int) -> None:
        """How many trials there will be."""
        if self.bar is not None:
            self.bar.update(self.task, total=trials)
        else:
            self._say(f"{self.title}: {trials} trials")

    def note(self, text: str) -> None:
        """A line to be read."""
        self._say(text)

    def trial(self, value: float, text: str) -> None:
        """One trial is done."""
        self.values.append(value)
        self.texts.append(text)
        best = max(self.values)
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=f"{self.title}: best {best:.4f}; {text}")
        else:
            self._say(f"  trial {len(self.values)}: {value:.4f} (best {best:.4f}) {text}")

    def summary(self) -> str:
        """One line about the whole search."""
        return f"{len(self.values)} trials, best objective {max(self.values):.4f}" if self.values else "no trial"

    def plot(self, path: Path) -> None:
        """The objective of every trial, and the best so far."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import numpy as np

        figure, axes = plt.subplots(figsize=(6, 3.5))
        numbers = np.arange(1, len(self.values) + 1)
        axes.plot(numbers, self.values, "o", markersize=4, color="tab:gray", label="trial")
        axes.step(numbers, np.maximum.accumulate(self.values), where="post", color="tab:blue", label="best so far")
        axes.set(title=self.title, xlabel="trial", ylabel="objective")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
