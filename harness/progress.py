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


class Bars(Progress):
    """Bars on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        super().__init__()
        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def cell(self, title: str) -> Iterator[Any]:
        """Yields a function to be called as (done, total)."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("  {task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


def progress() -> Progress:
    """What fits where standard error goes."""
    return Bars() if sys.stderr.isatty() else Progress()
