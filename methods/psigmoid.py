"""P-Sigmoid (CVPR 2025, arXiv 2412.00556, Scenario II; no code was published).

G-Search for a given budget: shares follow a sigmoid over depth, r(i) = 2b / (1 + exp(k * (i - a))) for the layers i =
3..L counted from 1, with a = (3 + L) / 2. Its sum is (L - 2) * b for every slope k, so b alone sets the budget and the
paper searches k only; k = 0 keeps a constant share as FastV does, a large k keeps twice as much in the first half and
nearly nothing in the second. Ranking is G-Search's.

The paper uses b <= 1/2. Above it the first shares would pass 1: they are cut there, and b is raised until the sum is
again what was asked for. The paper plots its best slopes without printing them; the default 0.2 is a choice made here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Shape
from pruneval.methods.gsearch import FIRST, LayerShares
from pruneval.methods.recipe import numbers, searched_for


@dataclass(frozen=True)
class PSigmoid(LayerShares):
    """Keeps on average a share `keep` (the paper's b) of the tokens in all layers but the first two; `slope` is k.

    A `recipe`, as the search writes it, gives both instead.
    """

    card: ClassVar[Card] = Card(
        "psigmoid",
        "P-Sigmoid",
        seam=("layer",),
        summary="Spreads a budget over the layers along a sigmoid and ranks by the attention of the layer before.",
        paper="Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
        year=2025,
        arxiv="2412.00556",
        prompt_aware=True,
        calibrated=True,
        provisional="no code and no searched slope was published; scoring rows, heads and rounding are decided here",
    )

    keep: float = 0.125
    slope: float = 0.2
    recipe: str = ""

    def check(self) -> None:
        super().check()
        if self.recipe:
            found = numbers("psigmoid", self.recipe, "layers", "keep", "slope")
            object.__setattr__(self, "keep", found["keep"])
            object.__setattr__(self, "slope", found["slope"])
        if not 0 <= self.slope < math.inf:
            raise MethodError(f"psigmoid: slope must be a number from 0, not {self.slope:g}")

    def shares(self, shape: Shape) -> dict[int, float]:
        if self.recipe:
            searched_for("psigmoid", self.recipe, shape)
        if shape.layers <= FIRST:
            raise MethodError(f"psigmoid: needs more than {FIRST} layers")
        middle = (1 + shape.layers) / 2
        falling = [_log_logistic(self.slope * (layer - middle)) for layer in range(FIRST, shape.layers)]
        scale = _log_scale(falling, self.keep)
        return {layer: math.exp(min(0.0, scale + part)) for layer, part in enumerate(falling, start=FIRST)}


def budget_to_keep(average: float, shape: Shape, n: int) -> float:
    """The b at which a prompt with `n` visual tokens has `average` of them per layer, before counts are rounded."""
    return (shape.layers * average / n - FIRST) / (shape.layers - FIRST)


def _log_logistic(x: float) -> float:
    """The logarithm of 1 / (1 + exp(x))."""
    return -max(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _log_scale(falling: list[float], keep: float) -> float:
    """The logarithm of 2b, or of more where shares are cut at 1, so that they average `keep`."""
    low, high = math.log(2 * keep), -falling[-1]
    if keep <= 0.5 or keep == 1:
        return low if keep <= 0.5 else high
    for _ in range(100):
        middle = (low + high) / 2
        if sum(math.exp(min(0.0, middle + part)) for part in falling) < keep * len(falling):
            low = middle
        else:
            high = middle
    return high
