"""G-Search (CVPR 2025, arXiv 2412.00556, Scenario I; no code was published).

How visual tokens rank changes little after the first layers, so a token that has dropped out need not come back: each
layer keeps a share r_l of the original tokens, and shares never grow with depth. Before layer l (0-based, from 2 on)
the tokens still alive are ranked by the attention of layer l - 1 with instruction tokens as queries, and the best
r_l * N stay. The paper finds the shares by a greedy search, layer by layer, on a small calibration set, at every third
layer; a share holds until the next one.

This module applies shares, it does not search them, and none were published. Open in the paper and decided here: the
mean over heads and over all text rows after the image (`rows=last` takes the last prompt token only), counts are
rounded to the nearest with at least one token, positions stay.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Ranking, Shape, Step, torch
from pruneval.methods.recipe import read_recipe

FIRST = 2  # the first boundary: the paper never reduces what the first two layers read


@dataclass(frozen=True)
class LayerShares(Ranking):
    """Keeps a share of the original visual tokens at each boundary, ranked by the attention of the layer before.

    `rows` says whose attention counts: mean_text (all text after the image) or last (the last prompt token).
    """

    rows: str = "mean_text"

    def check(self) -> None:
        if self.rows not in ("last", "mean_text"):
            raise MethodError(f"{self.card.name}: rows must be last or mean_text, not {self.rows!r}")

    def shares(self, shape: Shape) -> dict[int, float]:
        """The share of the original tokens that goes on at each boundary, not growing with depth."""
        raise NotImplementedError

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {layer: Needs(attention=(layer - 1,)) for layer in self.shares(shape)}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {layer: max(1, int(share * n + 0.5)) for layer, share in self.shares(shape).items()}

    def score(self, step: Step) -> torch.Tensor:
        last = torch.tensor([len(step.origin) - 1], device=step.origin.device)
        rows = step.question if self.rows == "mean_text" and len(step.question) else last
        return step.seen[step.layer - 1].received(rows).mean(0)[step.visual]

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the rows read wherever the count changes; all text counts as standing after the image."""
        entering, rows = [visual, *self.schedule(shape, visual)], 1 if self.rows == "last" else text
        return {
            f"rows of layer {layer - 1}": rows * shape.heads * shape.head_dim * (entering[layer] + text)
            for layer in self.shares(shape)
            if entering[layer + 1] < entering[layer]
        }


@dataclass(frozen=True)
class GSearch(LayerShares):
    """Applies searched shares: `rates`, one number per boundary (from 2 on, every `stride` layers), or a `recipe`.

    A recipe is a JSON file {"layers": L, "stride": s, "rates": {"2": r, "5": r, ...}} with 0-based boundaries; whatever
    else the search writes into it is not read here.
    """

    card: ClassVar[Card] = Card(
        "gsearch",
        "G-Search",
        seam=("layer",),
        summary="Keeps a share of the tokens per layer that a search found to be the smallest without loss.",
        paper="Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
        year=2025,
        arxiv="2412.00556",
        prompt_aware=True,
        calibrated=True,
        provisional="no code and no searched rates were published; scoring rows, heads and rounding are decided here",
    )

    rates: str = ""
    recipe: str = ""
    stride: int = 3

    def check(self) -> None:
        super().check()
        if self.stride < 1:
            raise MethodError(f"gsearch: stride must be at least 1, not {self.stride}")
        if self.rates and self.recipe:
            raise MethodError("gsearch: give rates or a recipe, not both")
        if self.rates:
            _valid(self._listed)
        if self.recipe:
            _valid(list(self._loaded[2].values()))

    def shares(self, shape: Shape) -> dict[int, float]:
        if self.recipe:
            layers, stride, rates = self._loaded
            if layers != shape.layers:
                raise MethodError(f"gsearch: the recipe is for {layers} layers, this model has {shape.layers}")
            if list(rates) != list(range(FIRST, layers, stride)):
                raise MethodError(f"gsearch: the recipe must rate {FIRST}, {FIRST + stride}, ..., not {[*rates]}")
            return rates
        boundaries = range(FIRST, shape.layers, self.stride)
        if not self.rates:
            raise MethodError(
                f"gsearch: no searched rates come with it; give rates=r,r,... ({len(boundaries)} numbers, for every "
                f"{self.stride} layers from {FIRST}) or recipe=path.json"
            )
        if len(self._listed) != len(boundaries):
            raise MethodError(
                f"gsearch: {shape.layers} layers with stride {self.stride} need {len(boundaries)} rates, "
                f"not {len(self._listed)}"
            )
        return dict(zip(boundaries, self._listed, strict=True))

    @functools.cached_property
    def _listed(self) -> list[float]:
        try:
            return [float(part) for part in self.rates.strip("[]").split(",")]
        except ValueError:
            raise MethodError(f"gsearch: rates must be numbers like 0.9,0.5,0.5, not {self.rates!r}") from None

    @functools.cached_property
    def _loaded(self) -> tuple[int, int, dict[int, float]]:
        data: dict[str, Any] = read_recipe("gsearch", self.recipe)
        try:
            rates = {int(layer): float(rate) for layer, rate in data["rates"].items()}
            return int(data["layers"]), int(data.get("stride", 3)), dict(sorted(rates.items()))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise MethodError(f"gsearch: {self.recipe} must have layers, stride and rates by boundary") from None


def _valid(rates: list[float]) -> None:
    if not all(0 <= rate <= 1 for rate in rates) or rates != sorted(rates, reverse=True):
        raise MethodError(f"gsearch: rates must lie in [0, 1] and may not grow with depth, unlike {rates}")
