"""What a cell of a layout asks for, and whether a run is that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODELS = {"llava-onevision-7b": "llava-ov-7b"}
"""Names of the transcription that are others in `pruneval list models`."""
CLOSE = 0.03
"""A run is at a budget, or at a prompt's length, when it is within 3 % of it."""


@dataclass(frozen=True)
class Found:
    """Our number for a cell, or the reason why there is none."""

    value: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    stderr: float | None = None
    digits: int | None = None
    """Decimals it is printed with where the paper prints nothing; None: three significant digits."""
    signatures: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def model_of(address: Mapping[str, Any]) -> str:
    """The model's name in this project."""
    return MODELS.get(str(address.get("model")), str(address.get("model")))


def wanted(address: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which of our runs belongs into a cell: `method`, and if they matter `params`, `budget`, `kernel`."""
    return address.get("ours") or {"method": address.get("method")}


def fits(
    ours: Mapping[str, Any], method: str, params: Mapping[str, Any], budget: Mapping[str, Any], kernel: str
) -> bool:
    """Whether a run has the wanted method, kernel, parameters and budgets; of others it may have any."""
    if method != ours["method"] or ours.get("kernel", kernel) != kernel:
        return False
    if not all(_same(value, params.get(key)) for key, value in ours.get("params", {}).items()):
        return False
    return all(close(value, budget.get(currency)) for currency, value in ours.get("budget", {}).items())


def close(value: float, found: float | None) -> bool:
    """Whether a count is the wanted one, as nearly as whole tokens of several samples are."""
    return found is not None and abs(found - value) <= CLOSE * value


def _same(value: Any, found: Any) -> bool:
    """Also for a parameter read off a signature, where everything is text."""
    if isinstance(value, float):
        try:
            return math.isclose(value, float(found), rel_tol=2e-3)
        except (TypeError, ValueError):
            return False
    return value == found or str(value) == found
