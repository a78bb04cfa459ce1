"""How hard the fuzz tests try, and what stops an example that does not end.

The default tier draws a few examples of each; `PRUNEVAL_FUZZ=full pytest tests/test_fuzz_*.py` draws all. The same
ones every time: a failure can be repeated.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = 30
"""Of the processor's time, for one example: a busy machine makes nothing hang."""

odd_text = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "0", "None", "нет", "否", "🦆" * 3, "\u202eright to left", "a\x00b", "{}", "%s", "../.."]
    ),
    st.text(max_size=12),
)
"""Texts that nobody expects."""


def examples(few: int, all_of_them: int) -> settings:
    """Settings for so many examples: few in the default tier."""
    full = os.environ.get("PRUNEVAL_FUZZ") == "full"
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=all_of_them if full else few, deadline=None, derandomize=True, database=None,
        suppress_health_check=health,
    )  # fmt: skip


class _Endless(BaseException):
    """Not an Exception: a batch that fails is tried again, question by question."""


@contextmanager
def ending() -> Iterator[None]:
    """Fails what takes more than `SECONDS` of processor time."""

    def stop(number: int, frame: object) -> None:
        raise _Endless

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except _Endless:
        raise AssertionError(f"no end after {SECONDS} seconds of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def one_line(error: BaseException) -> None:
    """The message, as the command line prints it, must be a line that says something."""
    message = " ".join(str(error).split())
    assert message and "Traceback" not in message and len(message) < 2000, repr(message)
