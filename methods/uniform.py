"""Every so-many-th visual token before the language model: a baseline that keeps the whole field of view, coarsely.

The kept indices are the centres of equal intervals, floor((i + 1/2) N / T), so neither end of the raster is favoured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Method, Needs, Positions, Reduction, Shape, Step, kept, torch


@dataclass(frozen=True)
class Uniform(Method):
    """Keeps a fraction `keep` of the visual tokens at a constant stride."""

    card: ClassVar[Card] = Card(
        "uniform",
        "Uniform",
        seam=("embed",),
        summary="Visual tokens at a constant, centred stride before the language model.",
    )

    keep: float = 0.5
    position_mode: Positions = "compact"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs()}

    def reduce(self, step: Step) -> Reduction | None:
        count = kept(step.total, self.keep)
        return None if count == step.total else step.keep(centres(step.total, count))

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [kept(n, self.keep)] * shape.layers


def centres(n: int, count: int) -> torch.Tensor:
    """`count` of the indices 0..n-1, distinct and ascending."""
    return (2 * torch.arange(count) + 1) * n // (2 * count)
