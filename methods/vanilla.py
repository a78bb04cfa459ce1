"""No pruning: every visual token goes through every layer. The reference row of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step


@dataclass(frozen=True)
class Vanilla(Method):
    """The model as it is."""

    card: ClassVar[Card] = Card(
        "vanilla", "Vanilla", seam=(), summary="The un-pruned model, the reference of every comparison."
    )

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {}

    def reduce(self, step: Step) -> Reduction | None:
        return None

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [n] * shape.layers
