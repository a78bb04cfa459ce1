"""A worker of a sweep: it lives in a process of its own, perhaps on another machine, and runs cells of one model.

`cluster.py` makes Ray actors of it. Nothing heavy is imported before the environment is as it should be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness import interrupt
from pruneval.harness.errors import UserError
from pruneval.harness.progress import Progress

if TYPE_CHECKING:
    from pruneval.harness.batching import BatchSize
    from pruneval.harness.models import LoadedModel, Located
    from pruneval.harness.records import RunRecord
    from pruneval.harness.run import Cell
    from pruneval.harness.runner import NotRun

INHERITED = (
    "PRUNEVAL_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_", "CUBLAS_",
)  # fmt: skip
"""How the variables begin that a worker has from the process that started it."""


@dataclass(frozen=True)
class Setup:
    """What a worker must know to do as the process that started it would."""

    located: Located
    device: str
    dtype: str
    kernel: str
    out: Path
    """Absolute; every machine must see it."""
    batch_size: BatchSize
    reuse: bool
    """Whether image features are kept between cells."""
    folder: str = field(default_factory=os.getcwd)
    """Where relative paths begin."""
    environment: Mapping[str, str] = field(
        default_factory=lambda: {key: value for key, value in os.environ.items() if key.startswith(INHERITED)},
        repr=False,  # a judge's key may be in it
    )


class CellWorker:
    """Runs one cell at a time; may be looked at, and stopped, from other threads meanwhile."""

    def __init__(self, setup: Setup) -> None:
        os.environ.update(setup.environment)
        with contextlib.suppress(OSError):
            os.chdir(setup.folder)
        self._setup, self._relay, self._stack = setup, Relay(), ExitStack()
        self._runner: Any = None

    def run(self, cell: Cell, title: str) -> RunRecord | NotRun | None:
        """How the cell ended; None when it was stopped. Raises: StorageError."""
        from pruneval.harness.runner import Runner

        if self._runner is None:
            setup = self._setup
            self._runner = Runner(setup.out, self._load, batch_size=setup.batch_size, show=self._relay)
        try:
            return self._runner.attempt(cell, title)
        except KeyboardInterrupt:
            return None

    def look(self) -> tuple[list[str], tuple[int, int]]:
        """The lines since the last look, and (answers, questions) of the cell."""
        lines, self._relay.lines = self._relay.lines, []
        return lines, self._relay.reached

    def stop(self) -> None:
        """Let `run` return behind the batch in flight."""
        interrupt.ask()

    def _load(self) -> LoadedModel:
        from pruneval.harness import models
        from pruneval.harness.reuse import reusing

        found = self._setup.located
        if not found.folder.is_dir():  # another machine, which keeps its models elsewhere
            found = models.locate(found.entry.name)
            if found.revision != self._setup.located.revision:
                raise UserError(f"the worker's {found.entry.name} is another one, {found.revision}")
        loaded = models.load(found, self._setup.device, self._setup.dtype, self._setup.kernel)
        if self._setup.reuse:
            self._stack.enter_context(reusing(loaded.adapter))
        return loaded


class Relay(Progress):
    """Keeps what is said and reached until somebody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.reached = (0, 0)

    def say(self, text: str) -> None:
        """One line."""
        self.lines.append(text)

    @contextmanager
    def cell(self, title: str) -> Iterator[Any]:
        """Yields a function to be called as (done, total)."""
        self.reached = (0, 0)

        def tell(done: int, total: int) -> None:
            self.reached = (done, total)

        yield tell
