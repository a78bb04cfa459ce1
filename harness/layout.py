"""Layouts and the trace: which tokens enter which layer, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sample at one boundary, without padding.

    Attributes:
        origin: (n,) index of each token in the un-pruned prompt (padding not counted); tokens a method made itself have
            origins from the prompt length on.
        visual: (n,) which are visual.
        made: (n,) which carry a value of the method's making (merged, recycled or added).
        position: (n,) or (rows, n) position ids.
        weight: (n,) how many tokens each counts as in attention; None when all count as one.
    """

    origin: Tensor
    visual: Tensor
    made: Tensor
    position: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.origin)


@dataclass(frozen=True)
class Layout:
    """What enters decoder layer `boundary` and, until the next layout, the layers after it."""

    boundary: int
    samples: tuple[Tokens, ...]

    @property
    def width(self) -> int:
        """Length of the padded stream, and of the KV cache of these layers after prefill."""
        return max(len(tokens) for tokens in self.samples)

    def real(self, device: torch.device | str = "cpu", width: int | None = None) -> Tensor:
        """(B, width) which places of the left-padded stream hold a token."""
        width = width or self.width
        lengths = torch.tensor([len(tokens) for tokens in self.samples], device=device)
        return torch.arange(width, device=device)[None, :] >= width - lengths[:, None]


@dataclass(frozen=True)
class Budget:
    """Visual tokens of one sample in every currency.

    Attributes:
        visual: at the input of the language model, before any reduction.
        avg_in: mean over layers of those that enter the layer.
        kept_after: those left after the last prune.
        final: those that enter the last layer.
        per_layer: those that enter each layer.
        keep: avg_in / visual, or 1 without visual tokens.
    """

    visual: int
    avg_in: float
    kept_after: float
    final: float
    per_layer: list[int]
    keep: float


@dataclass(frozen=True)
class Eviction:
    """What the cache of decoder layer `layer` holds of the prompt once `generated` tokens have been read after it."""

    generated: int
    layer: int
    layout: Layout


class Trace:
    """The layouts of one prefill, in order of their boundaries; the first is the un-pruned prompt (boundary 0).

    `evictions` lists what left the caches afterwards, while the answer was generated. `towers` says of samples whose
    tokens were reduced within the vision tower how many (with CLS) entered each of its layers, per tile.
    """

    def __init__(self, prompt: Layout, layers: int) -> None:
        self.prompt = prompt
        self.layers = layers
        self.layouts: list[Layout] = []  # reductions only
        self.evictions: list[Eviction] = []
        self.towers: dict[int, list[tuple[int, ...]]] = {}

    @property
    def batch(self) -> int:
        """Number of samples (beams count as samples)."""
        return len(self.prompt.samples)

    def entering(self, layer: int) -> Layout:
        """The layout of what enters decoder layer `layer`."""
        current = self.prompt
        for layout in self.layouts:
            if layout.boundary <= layer:
                current = layout
        return current

    def stored(self, layer: int, generated: int | None = None) -> Layout:
        """What of the prompt the cache of a decoder layer holds once `generated` tokens have been read after it (None:
        at the end).
        """
        current = self.entering(layer)
        for eviction in self.evictions:
            if eviction.layer == layer and (generated is None or eviction.generated <= generated):
                current = eviction.layout
        return current

    def cached(self, sample: int, generated: int) -> float:
        """Mean share of the sample's visual tokens in the caches, over layers and over the `generated` decode steps.

        An eviction after a step shows from the next one on.
        """
        visual = int(self.prompt.samples[sample].visual.sum())
        counts = [
            int(self.stored(layer, read).samples[sample].visual.sum())
            for layer in range(self.layers)
            for read in range(max(1, generated))
        ]
        return sum(counts) / (len(counts) * visual) if visual else 1.0

    def budget(self, sample: int = 0) -> Budget:
        """The realised budget of one sample."""
        visual = int(self.prompt.samples[sample].visual.sum())
        per_layer = [int(self.entering(layer).samples[sample].visual.sum()) for layer in range(self.layers)]
        mean = sum(per_layer) / self.layers
        last = (self.layouts[-1] if self.layouts else self.prompt).samples[sample]
        keep = mean / visual if visual else 1.0
        return Budget(visual, mean, float(last.visual.sum()), float(per_layer[-1]), per_layer, keep)
