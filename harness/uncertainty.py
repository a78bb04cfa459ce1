"""Standard errors of scores that are means, and of scores that are not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import numpy as np

RESAMPLES = 200


def standard_error(values: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> float | None:
    """The standard error of `aggregate(values)`; None with fewer than two independent units.

    Plain numbers are taken as a mean. Values that are mappings are resampled (bootstrap, fixed seed) in units of their
    "question_id" (rows of one question are not independent), within each "category" (a category never goes missing).

    Args:
        values: per-sample values as a metric's aggregation gets them.
        aggregate: lmms-eval's aggregation of that metric.
    """
    if len(values) < 2:
        return None
    if not isinstance(values[0], dict):
        return mean_error(values)
    strata = _units(values)
    if sum(len(units) for units in strata) < 2:
        return None

    @cache
    def drawn(stratum: int, unit: int, copy: int) -> list[dict]:
        """A unit as a question of its own: one question drawn twice makes two questions."""
        return [{**value, "question_id": f"{unit}#{copy}"} for value in strata[stratum][unit]]

    draw = np.random.default_rng(0)
    scores = []
    for _ in range(RESAMPLES):
        sample: list[dict] = []
        for stratum, units in enumerate(strata):
            for unit, times in Counter(draw.integers(len(units), size=len(units)).tolist()).items():
                for copy in range(times):
                    sample += drawn(stratum, unit, copy)
        scores.append(aggregate(sample))
    return float(np.std(scores, ddof=1))


def mean_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None with fewer than two."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, dtype=float), ddof=1) / math.sqrt(len(values)))


def _units(values: Sequence[dict]) -> list[list[list[dict]]]:
    """Values by category, then by question."""
    strata: dict[Hashable, dict[Hashable, list[dict]]] = {}
    for index, value in enumerate(values):
        units = strata.setdefault(value.get("category"), {})
        units.setdefault(value.get("question_id", index), []).append(value)
    return [list(units.values()) for units in strata.values()]
