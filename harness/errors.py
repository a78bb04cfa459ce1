"""The errors that cross the rooms: what a user sees, and a sample that could not be answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong and what would be right."""


class SampleFailure(Exception):
    """One request could not be answered, so its cell has no score.

    Args:
        key: the request, as "<task>/<doc id>".
        message: what went wrong, in one line.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"sample {self.key}: {self.message}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a registry, with the nearest known names.

    Args:
        kind: what the name should have been, such as "method" or "benchmark".
        name: what the user wrote.
        known: every name that would have been right.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}; {hint}")
