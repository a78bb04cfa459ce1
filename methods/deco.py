"""DeCo, "Decoupling Token Compression from Semantic Abstraction in Multimodal LLMs" (arXiv 2405.20985; the README of
yaolinli/DeCo at 103416e shows the projector).

The grid of the tower's features is pooled first and projected then:

    Z = MLP(AdaptiveAvgPool_{s x s}(X)),    MLP = Linear(c, d), GELU, Linear(d, d)

where window i of a side of h cells goes from floor(i h / s) to ceil((i + 1) h / s), so windows overlap when s does not
divide h. The paper trains the projector and the language model with it: without those weights this would be average
pooling (`avgpool`), so it does not run without. `checkpoint` holds the MLP's layers, "0.weight", "0.bias", "2.weight",
... (the names may have a prefix); the language model trained with it is the model itself.

s is the side of the largest square within `keep`: 12 (144 tokens of 576), 8, 6. Positions are compact. The model's own
projector still runs, and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Needs, Positions, Shape, Step, torch
from pruneval.methods.trained import Projector, mlp, square, weights


@dataclass(frozen=True)
class DeCo(Projector):
    """Pools an image's grid to a square of at most a fraction `keep` of its tokens, before a trained projector."""

    card: ClassVar[Card] = Card(
        "deco",
        "DeCo",
        seam=("embed",),
        summary="Pools the vision features to a small square before a projector that was trained for it.",
        paper="DeCo: Decoupling Token Compression from Semantic Abstraction in Multimodal Large Language Models",
        year=2024,
        arxiv="2405.20985",
        repository="yaolinli/DeCo",
        commit="103416e",
        merges=True,
        provisional="the authors released no weights: the projector and its language model must be trained first",
    )
    positions: ClassVar[Positions] = "compact"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (144, 64, 36)
    }

    checkpoint: str = ""
    keep: float = 0.25

    def needs(self, shape: Shape) -> dict[int, Needs]:
        self.suits(shape)
        return {0: Needs(vision=(shape.feature_layer,))}

    def side(self, n: int) -> int:
        return square(n, self.keep)

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """The trained projector, on the pooled tokens."""
        layers = self._layers("cpu").values()
        return {"trained projector": self.side(visual) ** 2 * sum(each.numel() for each in layers if each.ndim == 2)}

    def project(self, step: Step, tile: int, side: int) -> torch.Tensor:
        features = step.vision.hidden(step.shape.feature_layer)[tile][int(step.vision.has_cls) :]
        return mlp("deco", self._layers(str(features.device)), pooled(features, step.vision.grids[tile], side))

    def _layers(self, device: str) -> dict[str, torch.Tensor]:
        found = weights("deco", self.checkpoint, device)
        return {".".join(key.split(".")[-2:]): each for key, each in found.items()}


def pooled(features: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """(h w, c) cells in raster order as the means of side x side windows, (side side, c), at least in float32."""
    exact = features.to(torch.promote_types(torch.float32, features.dtype)).unflatten(0, grid).movedim(-1, 0)
    return torch.nn.functional.adaptive_avg_pool2d(exact[None], side)[0].flatten(1).T
