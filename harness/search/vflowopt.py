"""VFlowOpt's search (ICCV 2025, arXiv 2508.05211, section 3.3 and its supplement; sihany077/VFlowOpt at 129eeef).

R1, R2, the trust threshold t, the weight alpha of entropy and the square's side a are chosen so that the last prompt
token's state behind the final norm stays as it is without pruning: the objective is the sum over the samples of the
cosine between the two. R3 follows from the budget; where none does, or the cosine is no number, a sample counts as 0.

The paper gives 50 iterations of a Gaussian process with expected improvement and ranges for 25 % of the tokens. For
other budgets (ours) R1 lies in [Rbar, 1.5 Rbar] and R2 in [.5, 1]; a goes up to the side of a tile where that is less
than the paper's 24. The first ten points are uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruneval.harness.layout import Tokens
from pruneval.harness.search.bayes import Params, Study, Trial, best

INITIAL, TRIALS = 10, 50
TARGETS: dict[str, Callable[[Tensor, Tokens], Tensor]] = {
    "last": lambda states, tokens: states[-1:],
    "mean": lambda states, tokens: states.mean(0, keepdim=True),
    "first": lambda states, tokens: states[_behind(tokens)][None],
    "top3": lambda states, tokens: states[-3:],
}
"""What of a sample's (n, d) states is compared, (k, d): the last token, the mean of all, the first behind the image, or
the last three."""


def space(keep: float, side: int) -> dict[str, tuple[float, float]]:
    """Ranges of the knobs for a budget, on tiles of `side` x `side` cells."""
    return {
        "first": (keep, min(1.0, 1.5 * keep)),
        "second": (0.5, 1.0),
        "trust": (0.0, 50.0),
        "alpha": (-1.0, 1.0),
        "side": (3.0, float(max(4, min(24, side)))),
    }


def similarity(pruned: Sequence[Tensor], full: Sequence[Tensor]) -> float:
    """Sum over samples of the mean cosine of (k, d) states; what is no number counts as 0."""
    total = 0.0
    for one, other in zip(pruned, full, strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)
        total += float(torch.nan_to_num(cosine, nan=0.0).mean())
    return total


def search(
    objective: Callable[[Params], float],
    ranges: Mapping[str, tuple[float, float]],
    *,
    study: Study,
    trials: int = TRIALS,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[dict[str, float], list[Trial]]:
    """The best knobs, and all trials.

    Args:
        objective: of the knobs; larger is better.
        ranges: as `space`.
        study: where trials are kept.
        trials: in all.
        on_trial: called with every trial.
    """
    rng = np.random.default_rng(study.seed)
    first = [{name: float(rng.uniform(*ends)) for name, ends in ranges.items()} for _ in range(INITIAL)]

    def evaluate(params: Params) -> tuple[float, dict[str, Any]]:
        return objective(params), {}

    found = study.maximise("knobs", ranges, evaluate, first=first, trials=trials, on_trial=on_trial)
    return best(found).params, found


def _behind(tokens: Tokens) -> int:
    """The first token behind the last visual one."""
    return min(int(tokens.visual.nonzero()[-1, 0]) + 1, len(tokens) - 1) if bool(tokens.visual.any()) else 0
