"""What a run shows while it works: a bar per cell on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 10.0
"""Seconds between two plain lines."""


class Progress:
    """Plain lines on a stream."""

    def __init__(self, stream: Any = None, every: float = EVERY) -> None:
        self.stream = stream or sys.stderr
        self.every = every

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self.stream, flush=True)

    @contextmanager
    def cell(self, title: str) -> Iterator[Any]:
        """Yields a function to be called as (done, total)."""
        last, start = [time.monotonic()], time.monotonic()

        def tell(done: int, total: int) -> None:
            now = time.monotonic()
            if done == total or now - last[0] >= self.every:
                last[0] = now
                self.say(f"  {title}: {done} of {total} answers, {now - start:.0f} s")

        yield tell

    @contextmanager
    def sweep(self, title: str) -> Iterator[Any]:
        """Around many cells or trials: yields a function to be called as (done, total, note).

        The note, if there is one, says what was just done.
        """
        yield lambda done, total, note="": self.say(f"  {note}") if note else None


class Bars(Progress):
    """Bars on a terminal; those that are open at the same time stand under each other."""

    def __init__(self) -> None:
        from rich.console import Console

        super().__init__()
        self.console = Console(stderr=True)
        self._bars: Any = None
        self._open = 0

    def say(self, text: str) -> None:
        """One line, above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def cell(self, title: str) -> Iterator[Any]:
        """Yields a function to be called as (done, total, note); the note stands behind the title."""
        if not self._open:
            self._bars = self._display()
            self._bars.start()
        bars, self._open = self._bars, self._open + 1
        task = bars.add_task(title, total=None)
        try:
            yield lambda done, total, note="": bars.update(
                task, completed=done, total=total, description=f"{title}: {note}" if note else title
            )
        finally:
            self._open -= 1
            if self._open:
                bars.remove_task(task)
            else:
                bars.stop()

    @contextmanager
    def sweep(self, title: str) -> Iterator[Any]:
        """As `cell`."""
        with self.cell(title) as tell:
            yield tell

    def _display(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        text = TextColumn("  {task.description}", markup=False)
        return Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining(), console=self.console)


def progress() -> Progress:
    """What fits where standard error goes."""
    return Bars() if sys.stderr.isatty() else Progress()
