"""G-Search (CVPR 2025, arXiv 2412.00556, Algorithm 1): the smallest harmless share of tokens, layer after layer.

From shallow to deep, at every `stride`-th boundary, Bayesian optimisation looks for the share r <= the share before
that maximises accuracy - lambda * r, with accuracy as a fraction: dropping everything may cost at most lambda. The
share holds until the next boundary searched. Decided here, where the paper leaves it open: 15 trials behind the 10
initial ones, among which is "no further reduction"; shares are multiples of 1/N and evaluated once per count; of equals
the smallest share wins.
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
        most = max(trial.value for trial in found)
        rates[boundary] = min(trial.notes["count"] for trial in found if trial.value == most) / tokens
    return rates


def counted(rate: float, tokens: int) -> int:
    """Tokens a share keeps: rounded to the nearest, at least one."""
    return max(1, int(rate * tokens + 0.5))
