"""P-Sigmoid (CVPR 2025, arXiv 2412.00556, Scenario II): the slope of a sigmoid of shares over depth, for one budget.

For every slope k tried, b is solved so that the budget is the same: equal tokens, or equal TFLOPs (a steeper sigmoid
costs more for the same tokens, because attention is quadratic). The paper names neither a range nor a count of trials;
decided here: k in [0, 2], 8 initial points spread evenly, 12 suggestions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruneval.harness.search.bayes import Params, Study, Trial, best

SLOPES = (0.0, 2.0)
INITIAL = 8


def search(
    accuracy: Callable[[float, float], float],
    keep_for: Callable[[float], float],
    *,
    study: Study,
    trials: int = INITIAL + 12,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> dict[str, Any]:
    """The best slope and its keep.

    Args:
        accuracy: of (keep, slope), in [0, 1].
        keep_for: the keep with which a slope meets the budget.
        study: where trials are kept.
        trials: in all.
        on_trial: called with every trial.
    """

    def evaluate(params: Params) -> tuple[float, dict[str, Any]]:
        keep = keep_for(params["slope"])
        return accuracy(keep, params["slope"]), {"keep": keep}

    low, high = SLOPES
    first = [{"slope": low + (high - low) * step / (INITIAL - 1)} for step in range(INITIAL)]
    found = best(study.maximise("slope", {"slope": SLOPES}, evaluate, first=first, trials=trials, on_trial=on_trial))
    return {"slope": found.params["slope"], "keep": found.notes["keep"]}
