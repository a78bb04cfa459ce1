"""Stand-ins for a model and an evaluation, so that the run loop can be tested in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from pruneval.harness import models, run
from pruneval.harness.errors import SampleFailure
from pruneval.harness.progress import Progress

LOCATED = models.Located(
    models.ModelEntry(name="fake", title="Fake", family="llava"), Path("/nowhere"), "0123456789abcdef"
)


class Silent(Progress):
    """Keeps its lines instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def load() -> Any:
    return SimpleNamespace(adapter=SimpleNamespace(supports=lambda method: None), device="cpu", folder="/nowhere")


def cells(*benchmarks: str, method: str = "fastv", limit: int | None = None) -> list[run.Cell]:
    built = [run.build_method("vanilla"), run.build_method(method)]
    return run.expand(LOCATED, built, benchmarks or ("pocket-gqa", "pocket-pope"), limit=limit)


class Evaluation:
    """Answers `total` questions, four at a time, through the journal as the real one does.

    Attributes:
        answered: how many questions were really answered, over all calls.
        fails: the index of the question that raises, if any.
    """

    def __init__(self, total: int = 20, pause: float = 0, fails: int | None = None, log: Path | None = None) -> None:
        self.total, self.pause, self.fails, self.log, self.answered = total, pause, fails, log, 0

    def __call__(
        self, loaded: Any, method: Any, benchmark: Any, *, limit: int | None, seed: int, batch_size: int, journal: Any,
        on_progress: Callable[[int, int], None], **options: Any,
    ) -> Any:  # fmt: skip
        known = journal.answers()
        for start in range(0, self.total, 4):
            keys = [f"{benchmark.task}/{index}" for index in range(start, start + 4)]
            if keys[0] in known:
                continue
            if self.fails is not None and start <= self.fails < start + 4:
                raise SampleFailure(f"{benchmark.task}/{self.fails}", "RuntimeError: out of luck")
            time.sleep(self.pause)
            journal.append([{"key": key, "answer": f"{method.signature} {key}"} for key in keys])
            self.answered += 4
            if self.log is not None:
                with self.log.open("a") as file:
                    file.writelines(f"{benchmark.name} {method.signature} {key}\n" for key in keys)
            on_progress(start + 4, self.total)
        rows = journal.answers()
        table = pd.DataFrame(
            [
                {
                    "doc_id": index,
                    "answer": rows[f"{benchmark.task}/{index}"]["answer"],
                    "visual_tokens": 144,
                    "avg_in": 90.0,
                }
                for index in range(self.total)
            ]
        )
        scores = {benchmark.metric: {"value": 0.5, "n": self.total, "stderr": 0.1}}
        return SimpleNamespace(scores=scores, samples=table, batch_size=None)
