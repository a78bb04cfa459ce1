"""What the engine promises about every method on every model, as checks that can be run on anybody's method or model.

A check gets a `Case` (one method on one subject) and returns when the promise holds, raises `Broken` with what was
seen when it does not, and `NotApplicable` with the reason where the promise makes no sense for the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pruneval.harness import promises, promises_answers
from pruneval.harness.cases import Broken, Case, NotApplicable
from pruneval.harness.errors import UserError
from pruneval.methods.base import MethodError

CHECKS: dict[str, Callable[[Case], None]] = {
    "keep=1": promises_answers.keep_all,
    "once": promises.layers_once,
    "tower": promises.tower_lengths,
    "cache": promises.cache_lengths,
    "text": promises.text_stays,
    "positions": promises.positions,
    "masking": promises_answers.masking,
    "batch": promises_answers.batches,
    "text-only": promises_answers.text_only,
    "kernels": promises_answers.kernels,
    "budget": promises.budget,
    "reversal": promises_answers.reversal,
    "state": promises_answers.stateless,
    "restored": promises.restored,
}
"""The promises by their column in the table."""


@dataclass(frozen=True)
class Verdict:
    """How one check ended: "pass", "fail" or "n/a", with what was seen or the reason."""

    method: str
    subject: str
    check: str
    status: str
    note: str = ""


def verdicts(case: Case, checks: dict[str, Callable[[Case], None]] = CHECKS) -> Iterator[Verdict]:
    """Runs the checks on one pair; an unsupported pair is one "n/a" with its reason."""
    try:
        with case.pruned(case.method()):
            pass
    except (UserError, MethodError) as error:
        yield Verdict(case.name, case.subject.name, "*", "n/a", str(error))
        return
    for name, check in checks.items():
        try:
            check(case)
            status, note = "pass", ""
        except NotApplicable as reason:
            status, note = "n/a", str(reason)
        except Exception as error:  # a check that crashes has found something too
            status, note = "fail", str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        yield Verdict(case.name, case.subject.name, name, status, " ".join(note.split())[:300])
