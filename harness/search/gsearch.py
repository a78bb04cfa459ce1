"""G-Search (CVPR 2025, arXiv 2412.00556, Algorithm 1): the smallest harmless share of tokens, layer after layer.

From shallow to deep, at every `stride`-th boundary, Bayesian optimisation looks for the share r <= the share before
that maximises accuracy - lambda * r, with accuracy as a fraction: dropping everything may cost at most lambda. The
share holds until the next boundary searched. Decided here, where the paper leaves it open: 15 trials behind the 10
initial ones, among which is "no further reduction"; shares are multiples of 1/N and evaluated once per count; of equals
the smallest share wins; and, because a surrogate blurs the step at which accuracy breaks off, the gap between the best
share and the next lower one that is worse is bisected at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pruneval.harness.search.bayes import Params, Study, Trial
from pruneval.methods.gsearch import FIRST

Rates = dict[int, float]


def search(
    accuracy: Callable[[Rates], float],
    *,
    layers: int,
    tokens: int,
    study: Study,
    stride: int = 3,
    penalty: float = 0.01,
    initial: int = 10,
    trials: int = 15,
    before: Callable[[int], None] = lambda boundary: None,
    on_trial: Callable[[int, Trial], None] = lambda boundary, trial: None,
) -> Rates:
    """Shares by boundary.

    Args:
        accuracy: of shares by boundary, in [0, 1].
        layers: decoder layers L.
        tokens: N, the nominal count of visual tokens.
        study: where trials are kept.
        stride: boundaries from one search to the next.
        penalty: lambda.
        initial: uniform points each search starts with.
        trials: suggestions after them.
        before: called with a boundary before its search.
        on_trial: called with every trial.
    """
    rates: Rates = {}
    for boundary in range(FIRST, layers, stride):
        before(boundary)
        top = round(min(rates.values(), default=1.0) * tokens)
        seen: dict[int, float] = {}

        def evaluate(params: Params, boundary: int = boundary, seen: dict[int, float] = seen) -> tuple[float, dict]:
            count = counted(params["rate"], tokens)
            if count not in seen:
                seen[count] = accuracy(rates | {boundary: count / tokens})
            return seen[count] - penalty * count / tokens, {"count": count, "accuracy": seen[count]}

        def note(trial: Trial, boundary: int = boundary, seen: dict[int, float] = seen) -> None:
            seen[trial.notes["count"]] = trial.notes["accuracy"]
            on_trial(boundary, trial)

        drawn = np.random.default_rng([study.seed, boundary]).uniform(0, top / tokens, initial - 1)
        found = study.maximise(
            f"boundary {boundary}",
            {"rate": (0.0, top / tokens)},
            evaluate,
            first=[{"rate": top / tokens}, *({"rate": float(rate)} for rate in drawn)],
            trials=initial + trials,
            on_trial=note,
        )
        points: list[Params] = []
        while (middle := halfway(found)) is not None:
            points.append({"rate": middle / tokens})
            more = study.maximise(
                f"boundary {boundary}, bisection", {"rate": (0.0, top / tokens)}, evaluate,
                first=points, trials=len(points), on_trial=lambda trial: None,
            )  # fmt: skip
            note(more[-1])
            found = [*found, more[-1]]
        rates[boundary] = strongest(found).notes["count"] / tokens
    return rates


def strongest(found: list[Trial]) -> Trial:
    """The trial with the best value; of equals the one with the fewest tokens."""
    return max(found, key=lambda trial: (trial.value, -trial.notes["count"]))


def halfway(found: list[Trial]) -> int | None:
    """The count between the best and the next lower one tried, or None when there is none between."""
    best = strongest(found).notes["count"]
    lower = max((trial.notes["count"] for trial in found if trial.notes["count"] < best), default=0)
    middle = (best + lower) // 2
    return middle if lower < middle < best else None


def counted(rate: float, tokens: int) -> int:
    """Tokens a share keeps: rounded to the nearest, at least one."""
    return max(1, int(rate * tokens + 0.5))
