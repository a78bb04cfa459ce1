"""FasterVLM ([CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv 2412.01818v1;
Theia-4869/FasterVLM at f5d5f12).

Before the language model, each tile keeps the cells to which the CLS token attends most: its attention in the layer
whose output is projected (the paper's prose says the last one), mean over heads, the CLS column inside the softmax.
Nothing is merged, order is kept, positions are compact. Without a CLS token a cell's score is the attention it receives
on average; where several cells become one token it is their mean.

The released code gives every tile of an image the same number, may choose cells that only show padding, and drops the
newlines. Here a tile's share follows the tokens it has, and newlines may be kept (`newline`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Step, torch
from pruneval.methods.salience import PerTile, token_salience


@dataclass(frozen=True)
class FasterVLM(PerTile):
    """Keeps a fraction `keep` of each tile's tokens, those with the most CLS attention.

    `newline` is drop or keep: beyond the budget, those of rows in which a token stays.
    `per_tile`, if given, is how many of every tile stay.
    """

    card: ClassVar[Card] = Card(
        "fastervlm",
        "FasterVLM",
        seam=("embed",),
        summary="Keeps, of each image tile, the tokens the vision encoder's CLS token attends to most.",
        paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        year=2024,
        arxiv="2412.01818",
        repository="Theia-4869/FasterVLM",
        commit="f5d5f12",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (288, 192, 144, 128, 64, 58, 29)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160, 145)},
    }

    def score(self, step: Step) -> torch.Tensor:
        return token_salience(step)
