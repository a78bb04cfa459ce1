"""TRIM (Less is More, COLING 2025, arXiv 2409.10994; FreedomIntelligence/TRIM at f5a232d).

Before the language model, each tile keeps the tokens that stand out when CLIP compares them with the question, and one
more: the mean of the features that went. With p_j a cell of the layer that is projected, in CLIP's space, and t the
question's embedding,

    w = softmax_j(-p_j . t)

decides: plain dot products, negated, because CLIP's patches resemble a text least where its object is. The order is
kept, the mean comes last, positions are compact.

The paper takes the cells whose w lies above the third quartile by more than 1.5 interquartile ranges
(`count=outliers`, at least one); tables at a fixed number of tokens take the largest, the mean counted (`count=keep`).

The released code takes quartiles over the whole batch, and a tile can't stay whole in it. Here each tile stands for
itself; its share of a fixed budget follows the tokens it has in the prompt, and newlines go. A share of one token has
no room for the mean. Where cells were resampled or pooled, features are compared after the same was done to them.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    option,
    strongest,
    torch,
)
from pruneval.methods.salience import check_per_tile, declared, outliers, shares, tiles, tower_features


@dataclass(frozen=True)
class Trim(Method):
    """Keeps a fraction `keep` of each tile's tokens, the mean of the others included; with `count=outliers` as many as
    stand out, with `per_tile` so many of every tile.
    """

    card: ClassVar[Card] = Card(
        "trim",
        "TRIM",
        seam=("embed",),
        summary="Keeps what stands out in CLIP's comparison with the question, and the mean of the rest.",
        paper="Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
        year=2025,
        arxiv="2409.10994",
        repository="FreedomIntelligence/TRIM",
        commit="f5a232d",
        prompt_aware=True,
        clip=True,
        merges=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@outliers": {"count": "outliers"},
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160)},
    }

    keep: float = 0.21
    count: str = "keep"
    per_tile: int = option(0)
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.count not in ("keep", "outliers"):
            raise MethodError(f"trim: count must be keep or outliers, not {self.count!r}")
        check_per_tile("trim", self.per_tile)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,), clip=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.count == "outliers":
            raise MethodError("trim: with count=outliers the count depends on the sample")
        return [declared("trim", shape, n, self.keep, self.per_tile)] * shape.layers

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Nothing but what CLIP does."""
        return {}

    def reduce(self, step: Step) -> Reduction | None:
        free = self.count == "outliers"
        found = (
            [(area, 0) for area in _areas(step)]
            if free
            else shares(step, self.keep, self.per_tile, lambda: _areas(step))
        )
        if found is None:
            return None
        features = tower_features(step)
        away = -(step.clip.project(features) @ step.clip.question)
        chosen, carriers, means = [], [], []
        for area, share in found:
            weight = away[area].softmax(0)
            share = 1 + outliers(weight) if free else share
            lone = share >= len(area) or share < 2  # no room, or nothing left, for a mean
            mine = strongest(weight, share - (not lone))
            chosen.append(area[mine])
            if not lone:
                rest = torch.ones(len(area), dtype=torch.bool, device=area.device)
                rest[mine] = False
                carriers.append(area[mine[-1:]])
                means.append(features[area[rest]].mean(0))
        return _appended(step, torch.cat(chosen), carriers, means)


def _areas(step: Step) -> list[torch.Tensor]:
    return [tile.tokens for tile in tiles(step) if len(tile.tokens)]


def _appended(step: Step, chosen: torch.Tensor, carriers: list[torch.Tensor], means: list[torch.Tensor]) -> Reduction:
    """The stream of the chosen tokens, each mean behind the last token of its tile."""
    if not means:
        return step.keep(chosen)
    keep = torch.cat([step.text, step.visual[chosen], step.visual[torch.cat(carriers)]])
    order = torch.sort(keep, stable=True).indices
    slots = (order >= len(keep) - len(means)).nonzero().squeeze(-1)
    means = torch.stack(means)[order[slots] - (len(keep) - len(means))]
    return Reduction(keep[order], slots, step.vision.project(means), torch.ones(len(slots), dtype=torch.bool))
