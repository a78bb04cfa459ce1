"""Ctrl-C lets the batch in flight end, so that its answers are kept; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_asked = threading.Event()


@contextmanager
def graceful() -> Iterator[None]:
    """Within the block the first interrupt only asks `obey` to stop; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()
        print("pruneval: stopping behind this batch; once more to stop at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ask() -> None:
    """Let the next `obey` stop, as an interrupt would."""
    _asked.set()


def obey() -> None:
    """Raises: KeyboardInterrupt when one has been asked for. Called where everything is written."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt
