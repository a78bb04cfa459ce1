"""A random subset of the visual tokens before the language model: the lower bound every method has to beat.

The draw is uniform, without replacement and sorted. Its seed is made of the run's seed, the method's and the sample's
name, so neither batch size nor order changes it, and no global random state is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Needs, Positions, Ranking, Shape, Step, kept, torch


@dataclass(frozen=True)
class Random(Ranking):
    """Keeps a fraction `keep` of the visual tokens, drawn at random before decoder layer 0."""

    card: ClassVar[Card] = Card(
        "random",
        "Random",
        seam=("embed",),
        summary="A random, sorted subset of the visual tokens before the language model.",
    )

    keep: float = 0.5
    seed: int = 0
    position_mode: Positions = "compact"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs()}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {0: kept(n, self.keep)}

    def score(self, step: Step) -> torch.Tensor:
        return torch.randperm(len(step.visual), generator=step.generator())
