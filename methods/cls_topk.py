"""The visual tokens with the most CLS attention, over the whole prompt: the plain control of methods that add to it.

The score is FasterVLM's (arXiv 2412.01818v1): attention of the CLS token in the layer whose output is projected, mean
over heads; attention received on average where there is no CLS token. There are no shares per tile or image: what looks
most salient anywhere in the prompt stays. Newlines, and CLS tokens of video frames, come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Needs, Positions, Ranking, Shape, Step, kept, torch
from pruneval.methods.salience import token_salience


@dataclass(frozen=True)
class ClsTopK(Ranking):
    """Keeps a fraction `keep` of the visual tokens, those with the most CLS attention."""

    card: ClassVar[Card] = Card(
        "cls_topk",
        "CLS top-k",
        seam=("embed",),
        summary="The visual tokens the vision encoder's CLS token attends to most, over the whole prompt.",
    )

    keep: float = 0.5
    position_mode: Positions = "compact"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {0: kept(n, self.keep)}

    def score(self, step: Step) -> torch.Tensor:
        return token_salience(step).nan_to_num(nan=float("-inf"))
