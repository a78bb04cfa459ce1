"""HiPrune (arXiv 2508.00553; Danielement321/HiPrune at 6e83a12).

Before the language model each tile keeps three kinds of tokens, chosen by the attention that cells receive (mean over
heads and all rows, the CLS row included) in two layers of the vision tower: *anchors*, the highest in a middle layer,
where objects stand out; *buffers*, their four neighbours; *registers*, the highest of the others in the deep layer that
is projected. With a budget of V tokens there are round(V alpha / 5) anchors. The order is kept.

Following the released code, neighbours are the numbers i - 1, i + 1, i - width and i + width: they run on into the next
row, and those outside the tile become its first or last token. The object layer, the paper's 9 of 24, is 8 here (layers
count from 0), 15 of Qwen2.5-VL's 32; other depths have none in the code, and take 3/8 of their layers. Anchors are
never more than a fifth of the budget.

Scores of cells that become one token are averaged. A tile's share follows the tokens it has, and newlines go (in the
code all tiles of a call have the same share, padding may be chosen). Positions are compact; the code for Qwen2.5-VL
keeps `original` ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Shape, Step, strongest, torch
from pruneval.methods.salience import Area, PerTile


@dataclass(frozen=True)
class HiPrune(PerTile):
    """Keeps a fraction `keep` of each tile's tokens; about `alpha` of them are anchors and their neighbours.

    `object_layer` is auto or a layer of the vision tower, from 0. `newline` is drop or keep: beyond the budget, those
    of rows in which a token stays.
    `per_tile`, if given, is how many of every tile stay.
    """

    card: ClassVar[Card] = Card(
        "hiprune",
        "HiPrune",
        seam=("embed",),
        summary="Keeps what a middle vision layer looks at, with its neighbours, and what a deep one looks at.",
        paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        year=2025,
        arxiv="2508.00553",
        repository="Danielement321/HiPrune",
        commit="6e83a12",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160)},
        **{f"qwen2.5-vl-7b@{keep:.1%}": {"keep": keep, "position_mode": "original"} for keep in (0.334, 0.223, 0.112)},
    }

    alpha: float = 0.1
    object_layer: str = "auto"

    def check(self) -> None:
        super().check()
        if not 0 <= self.alpha <= 1:
            raise MethodError(f"hiprune: alpha must be in [0, 1], not {self.alpha:g}")
        if self.object_layer != "auto" and not self.object_layer.isdecimal():
            raise MethodError(f"hiprune: object_layer must be auto or a number from 0, not {self.object_layer!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        layer = self.layer(shape)
        if layer > shape.feature_layer:
            raise MethodError(
                f"hiprune: object_layer must be at most {shape.feature_layer} for this vision tower, not {layer}"
            )
        return {0: Needs(vision=tuple(sorted({layer, shape.feature_layer})), every_row=True)}

    def layer(self, shape: Shape) -> int:
        """The object layer."""
        if self.object_layer != "auto":
            return int(self.object_layer)
        share = 1 / 2 if shape.merge > 1 and not shape.has_cls else 3 / 8
        return max(0, round(share * shape.vision_layers) - 1)

    def score(self, step: Step) -> torch.Tensor:
        return received(step, step.shape.feature_layer)

    def choose(self, step: Step, shares: list[tuple[Area, int]]) -> list[torch.Tensor]:
        objects, deep = received(step, self.layer(step.shape)), self.score(step)
        return [
            tile.tokens[hierarchy(objects[tile.tokens], deep[tile.tokens], tile.columns, share, self.alpha)]
            for tile, share in shares
        ]


def received(step: Step, layer: int) -> torch.Tensor:
    """(N,) what tokens receive on average in a vision layer."""
    cls = int(step.shape.has_cls)
    return step.vision.to_tokens([each.received().mean(0)[cls:] for each in step.vision.attention(layer)])


def hierarchy(objects: torch.Tensor, deep: torch.Tensor, columns: int, count: int, alpha: float) -> torch.Tensor:
    """The `count` tokens of a tile that stay, ascending, by what they receive in the two layers, (n,) each."""
    anchors = torch.sort(objects, descending=True, stable=True).indices[: min(round(count * alpha / 5), count // 5)]
    near = with_neighbours(anchors, columns, len(objects))
    deep = deep.clone()
    deep[near] = float("-inf")
    return torch.cat([near, strongest(deep, count - len(near))])


def with_neighbours(anchors: torch.Tensor, columns: int, n: int) -> torch.Tensor:
    """Anchors and the numbers around them in rows of `columns`, ascending, each once."""
    around = torch.tensor([0, -1, 1, -columns, columns], device=anchors.device)
    return (anchors[:, None] + around).clamp(0, n - 1).unique()
