"""VFlowOpt (ICCV 2025, arXiv 2508.05211; sihany077/VFlowOpt at 129eeef): one map of importance, three stages.

The map comes from the attention (mean over heads) of the vision encoder's layer that is projected: cells that receive
more than `trust` times the mean are trusted, and a cell's importance is the attention it gets from them. Where no cell
is trusted it is what a cell receives on average. To it comes `alpha` times the softmax, over a tile's cells, of the
entropy of a cell's grey values (bits, 256 bins). Cells that become one token have their mean; newlines, and CLS tokens
of video frames, have importance 1. In encoders with CLS its row and column are left out.

Before the language model the fraction R1 of the tokens stays. Of the lowest, int(n / side^2) more than that takes are
gathered square by square (`side` x `side` tokens of the base grid and of the grid of crops, newlines included) and each
square goes on as one token, their mean weighted by importance, in the place of its most important member. So the
count is n(1 - R1) fewer only about. Before two later layers (a third and two thirds of the depth) the fractions R2 and
R3 of what is left stay, by the same map. With several images each keeps R1 of its own, a video R1 over all frames; in
these nothing is gathered.

`keep` is the mean over decoder layers of R1, R1 R2 and R1 R2 R3, and R3 follows from it. The authors find R1, R2,
`trust`, `alpha` and `side` by Bayesian optimisation for each budget; what was released for LLaVA-OneVision, with
`alpha` 0, is in the presets. With `rates` = auto (ours) R1 is 1.25 `keep` and R2 3/4, both within the ranges the search
was given, or as much more as `keep` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    strongest,
    torch,
)
from pruneval.methods.grids import images, places
from pruneval.methods.importance import importance
from pruneval.methods.recipe import numbers, read_recipe, searched_for
from pruneval.methods.recycle import filling, gather


def mean_rate(rates: Sequence[float], layers: Sequence[int]) -> float:
    """Mean fraction of the tokens over decoder layers, when stage s lasts `layers[s]` layers and keeps `rates[s]`."""
    left, total = 1.0, 0.0
    for rate, count in zip(rates, layers, strict=True):
        left *= rate
        total += left * count
    return total / sum(layers)


def last_rate(keep: float, first: float, second: float, layers: Sequence[int]) -> float:
    """R3 with which `mean_rate` is `keep`, at most 1; not positive when R1 and R2 alone leave more."""
    rest = sum(layers) * keep - first * layers[0] - first * second * layers[1]
    return min(1.0, rest / layers[2] / (first * second))


RELEASED = {  # R1, R2, R3, trust, side, of 28 layers
    "50%": (0.72332, 0.74875, 0.487, 28.68, 11.757),
    "25%": (0.26510, 0.98334, 0.87733, 34.76, 15.581),
    "10%": (0.11662, 1.0, 0.6011, 39.26, 17.387),
}


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keeps a fraction `keep` of the visual tokens, in the mean over decoder layers.

    `rates` is auto or R1,R2. `recycle` is about (as published), exact (as many more tokens are gathered as squares they
    fill, so that the count is exact; ours) or none. In `variant` = code importance is the mean over trusted cells, not
    their sum; entropy is that of pixels normalised for SigLIP, times 255, as bytes (negative ones wrap); and positions
    are renumbered in the first stage only, where the paper keeps them. A `recipe`, as a search writes it, gives keep,
    rates, trust, alpha and side instead.
    """

    card: ClassVar[Card] = Card(
        "vflowopt",
        "VFlowOpt",
        seam=("embed", "layer"),
        summary="Drops tokens in three stages by one map of attention in the vision encoder; the first recycles some.",
        paper="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        year=2025,
        arxiv="2508.05211",
        repository="sihany077/VFlowOpt",
        commit="129eeef",
        merges=True,
        calibrated=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        f"llava-ov-7b@{budget}": {
            "keep": mean_rate((first, second, third), (9, 9, 10)),
            "rates": f"{first},{second}",
            "trust": trust,
            "side": side,
            "variant": "code",
        }
        for budget, (first, second, third, trust, side) in RELEASED.items()
    }

    keep: float = 0.25
    rates: str = "auto"
    trust: float = 34.76
    side: float = 15.581
    alpha: float = 0.0
    recycle: str = "about"
    variant: str = "paper"
    recipe: str = ""
    position_mode: Positions = "original"

    def check(self) -> None:
        if self.recipe:
            for name, value in numbers("vflowopt", self.recipe, "keep", "trust", "alpha", "side").items():
                object.__setattr__(self, name, value)
            object.__setattr__(self, "rates", str(read_recipe("vflowopt", self.recipe).get("rates")))
        if self.recycle not in ("about", "exact", "none"):
            raise MethodError(f"vflowopt: recycle must be about, exact or none, not {self.recycle!r}")
        if self.variant not in ("paper", "code"):
            raise MethodError(f"vflowopt: variant must be paper or code, not {self.variant!r}")
        if self.variant == "code" and self.position_mode != "original":
            raise MethodError("vflowopt: variant=code has positions of its own; leave position_mode out")
        if self.trust < 0 or self.side < 1:
            raise MethodError("vflowopt: trust must not be negative, and side at least 1")
        if self.rates != "auto" and not _pair(self.rates):
            raise MethodError(f"vflowopt: rates must be auto or two fractions like 0.5,0.75, not {self.rates!r}")

    def stages(self, shape: Shape) -> dict[int, float]:
        """The fraction that stays at each boundary."""
        third = shape.layers // 3
        lasting = (third, third, shape.layers - 2 * third)
        one, two = _pair(self.rates) or (min(1.0, 1.25 * self.keep), 0.75)
        if self.rates == "auto":
            without = (shape.layers * self.keep - one * third) / (one * (shape.layers - third))  # R2 if R3 were 1
            two = min(1.0, max(two, without))
        three = last_rate(self.keep, one, two, lasting)
        if three <= 0:
            raise MethodError(f"vflowopt: with rates={self.rates} more than keep={self.keep:g} stays; lower them")
        return {0: one, third: two, 2 * third: three}

    def needs(self, shape: Shape) -> dict[int, Needs]:
        if self.recipe:
            searched_for("vflowopt", self.recipe, shape)
        if shape.layers < 3:
            raise MethodError("vflowopt: needs a model of at least three decoder layers")
        later = {layer: Needs() for layer in self.stages(shape)}
        here = Needs(vision=(shape.feature_layer,), every_row=True, frames=True, pixels=self.alpha != 0)
        return later | {0: here}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        stages, counts = self.stages(shape), []
        if self.recycle == "about" and self.keep < 1:
            raise MethodError("vflowopt: how many squares tokens are gathered in depends on the sample (recycle=exact)")
        for layer in range(shape.layers):
            n = n if self.keep == 1 else left(n, stages.get(layer, 1.0))
            counts.append(n)
        return counts

    def declarable(self) -> Method | None:
        return replace(self, recycle="exact") if self.recycle == "about" else None

    def reduce(self, step: Step) -> Reduction | None:
        if self.keep == 1:
            return None
        if step.layer == 0:
            score = self.score(step).to(step.visual.device)
            step.memory["importance"] = score.new_zeros(len(step.origin)).index_copy(0, step.visual, score)
        score = step.memory["importance"][step.origin[step.visual]]
        rate = self.stages(step.shape)[step.layer]
        groups = images(step) if step.layer == 0 else [torch.arange(len(score), device=score.device)]
        if rate == 1:
            return None
        if step.layer == 0 and self.recycle != "none" and len(groups) == 1 and not step.clips:
            found = self._gather(step, score, left(len(score), rate))
        else:
            found = step.keep(torch.cat([each[strongest(score[each], left(len(each), rate))] for each in groups]))
        if len(found.keep) == len(step.origin) and found.slots is None:
            return None
        return replace(found, compact=step.layer == 0) if self.variant == "code" else found

    def _gather(self, step: Step, score: torch.Tensor, count: int) -> Reduction:
        order = torch.sort(score, descending=True, stable=True).indices
        where = (places(step) / torch.tensor([1, self.side, self.side], device=order.device)).floor()
        square = where.unique(dim=0, return_inverse=True)[1]
        about = int(len(score) / self.side**2)
        more = about if self.recycle == "about" else filling(square[order], len(score) - count)
        if more is None:
            return step.keep(order[:count])
        return gather(step, score, square, max(0, count - more))

    def score(self, step: Step) -> torch.Tensor:
        """(N,) importance of the visual tokens, before the language model."""
        return importance(step, self.trust, self.alpha, self.variant == "code")


def left(n: int, rate: float) -> int:
    """Tokens left of n when the fraction `rate` stays; at least one."""
    return max(1, n - round(n * (1 - rate)))


def _pair(text: str) -> tuple[float, float] | None:
    """Two fractions in (0, 1], or None when the text is something else."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        return None
    return (first, second) if 0 < first <= 1 and 0 < second <= 1 else None
