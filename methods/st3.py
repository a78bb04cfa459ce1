"""A progressive trimming schedule after ST3, "Spatial-Temporal Visual Token Trimming" (AAAI 2025, arXiv 2412.20105).

Only the abstract could be read, so only the two ideas are the paper's; every formula and default here is this
project's own. *PVTP* drops inattentive visual tokens step by step from layer to layer while the prompt is read. *VTA*
goes on while the answer is generated: the longer it gets, the fewer visual tokens every layer's cache holds.

PVTP: before layers `first`, `first` + `stride`, ... the tokens that received least attention from the last prompt token
in the layer before go, down to ceil(N g(l)); g falls from 1 at layer `first` - 1 to `keep` at the last layer.
VTA: after every `every` generated tokens a layer's cache keeps max(1, floor(n_l h(t))) visual tokens; h falls linearly
from 1 to `decode_keep` over `span` tokens. Those with the lowest running mean of the generated tokens' attention go.
Text and generated tokens stay, and position ids are never renumbered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    DecodeStep,
    MethodError,
    Needs,
    Ranking,
    Shape,
    Step,
    boundary,
    strongest,
    torch,
)

ROUNDING = 1e-9  # keeps exact products from falling to the other side of a whole number
STAIRS = 4


@dataclass(frozen=True)
class ST3(Ranking):
    """Trims visual tokens to a fraction `keep` at the last layer, and each layer's cache to `decode_keep` of its own.

    `attenuation` is the shape of g over the layers: linear, cosine, exponential or stairs (four equal ones).
    `decode_keep` = 0 stands for the same number as `keep`; 1 switches VTA off. `momentum` is that of the running mean.
    """

    card: ClassVar[Card] = Card(
        "st3",
        "ST3-like trimming",
        seam=("layer", "decode"),
        summary="Drops inattentive visual tokens layer by layer, and from the caches as the answer gets longer.",
        paper="ST3: Accelerating Multimodal Large Language Model by Spatial-Temporal Visual Token Trimming",
        year=2025,
        arxiv="2412.20105",
        prompt_aware=True,
        provisional="only the abstract was read and no code found: schedules, scores and defaults are this project's",
    )

    keep: float = 0.1
    first: int = 3
    stride: int = 3
    attenuation: str = "linear"
    decode_keep: float = 0.0
    every: int = 8
    span: int = 64
    momentum: float = 0.9

    def check(self) -> None:
        if min(self.first, self.stride, self.every, self.span) < 1:
            raise MethodError("st3: first, stride, every and span must be at least 1")
        if self.attenuation not in ("linear", "cosine", "exponential", "stairs"):
            raise MethodError(
                f"st3: attenuation must be linear, cosine, exponential or stairs, not {self.attenuation!r}"
            )
        if not 0 <= self.decode_keep <= 1 or not 0 <= self.momentum < 1:
            raise MethodError("st3: decode_keep must be in [0, 1] and momentum in [0, 1)")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("st3", self.first, shape)
        return {layer: Needs(attention=(layer - 1,)) for layer in range(self.first, shape.layers, self.stride)}

    def share(self, shape: Shape, layer: int) -> float:
        """g(l): the share of visual tokens that goes on before layer l."""
        start = self.first - 1
        part = (layer - start) / (shape.layers - 1 - start)
        if self.attenuation == "cosine":
            return self.keep + (1 - self.keep) * (1 + math.cos(math.pi * part)) / 2
        if self.attenuation == "exponential":
            return self.keep**part
        if self.attenuation == "stairs":
            part = math.ceil(part * STAIRS - ROUNDING) / STAIRS
        return 1 - (1 - self.keep) * part

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {layer: max(1, math.ceil(n * self.share(shape, layer) - ROUNDING)) for layer in self.needs(shape)}

    def score(self, step: Step) -> torch.Tensor:
        return step.seen[step.layer - 1].rows(-1)[:, 0].mean(0)[step.visual]

    def evicting(self, shape: Shape) -> tuple[int, ...]:
        return tuple(range(shape.layers)) if (self.decode_keep or self.keep) < 1 else ()

    def remaining(self, entered: int, generated: int) -> int:
        """m_l(t): visual tokens in a layer's cache after `generated` tokens, of the `entered` ones of the prompt."""
        part = min(1.0, generated // self.every * self.every / self.span)
        return min(entered, max(1, math.floor(entered * (1 - (1 - (self.decode_keep or self.keep)) * part) + ROUNDING)))

    def caching(self, shape: Shape, entered: Sequence[int], generated: int) -> list[int]:
        return [self.remaining(count, generated) if self.evicting(shape) else count for count in entered]

    def at_decode(self, step: DecodeStep) -> torch.Tensor | None:
        seen = step.attention.rows(-1)[:, 0].mean(0)[step.visual]
        if "score" in step.memory:
            seen = self.momentum * step.memory["score"] + (1 - self.momentum) * seen
        count = self.remaining(step.entered, step.generated)
        if count >= len(seen):
            step.memory["score"] = seen
            return None
        chosen = strongest(seen, count)
        step.memory["score"] = seen[chosen]
        return chosen
