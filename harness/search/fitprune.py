"""FitPrune's fit (AAAI 2025, arXiv 2409.10197, section 3.3; ywh187/FitPrune at d28e418): how many to delete per layer.

For a tolerance alpha, every layer deletes of each sample the longest prefix of its least attended tokens that leaves at
least 1 - alpha of the un-pruned model's attention mass, both of what visual tokens give one another and of what the
text gives them; only tokens in both prefixes go. As soon as a sample's FLOPs, with the current count in all later
layers, meet the budget, nothing more is deleted. Bisection finds the smallest alpha that meets the budget.

The recipe is the floor of the mean deletions, so it is a little above the budget; here single deletions are added where
the floor took most, until the recipe itself meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pruneval.harness.errors import UserError
from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step, torch
from pruneval.methods.fitprune import received

BRACKET = 0.01
Masses = list[tuple[float, float]]


@dataclass(frozen=True)
class Cost:
    """The authors' FLOPs of visual tokens: multiply-adds of a layer that `n` tokens enter and `left` leave."""

    hidden: int
    mlp: int

    def layer(self, n: float, left: float) -> float:
        """Queries, keys, values and attention with what enters, output projection and feed-forward with the rest."""
        d = self.hidden
        return 3 * n * d * d + 2 * n * n * d + left * d * d + 3 * left * d * self.mlp

    def share(self, tokens: int, deleted: Sequence[float]) -> float:
        """Of the un-pruned model's, with `deleted[l]` gone within layer l."""
        spent, n = 0.0, float(tokens)
        for count in deleted:
            spent += self.layer(n, n - count)
            n -= count
        return spent / (len(deleted) * self.layer(tokens, tokens))


@dataclass(frozen=True)
class Fit(Method):
    """The trial of one alpha on all samples, in the order in which they come; alpha 0 only looks.

    Attributes:
        masses: (own, cross) of the un-pruned model by sample and layer.
        deleted: by sample and layer, filled by the run.
    """

    card: ClassVar[Card] = Card("fitprune-fit", "FitPrune's fit", seam=("layer",), summary="One trial of the fit.")

    alpha: float
    keep_flops: float
    cost: Cost
    masses: list[Masses]
    deleted: list[list[int]] = field(default_factory=list)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {layer: Needs(attention=(layer - 1,)) for layer in range(1, shape.layers)}

    def reduce(self, step: Step) -> Reduction | None:
        number = step.memory.get("sample")
        if number is None:
            number = step.memory["sample"] = len(self.deleted)
            self.deleted.append([0] * step.shape.layers)
            if not self.alpha:
                self.masses.append([])
        attention, n = step.seen[step.layer - 1], len(step.visual)
        own = received(attention, step.visual)[step.visual] / n
        cross = received(attention, step.question)[step.visual] / max(1, len(step.question))
        if not self.alpha:
            self.masses[number].append((float(own.sum()), float(cross.sum())))
            return None
        deleted = self.deleted[number]
        if self.cost.share(step.total, deleted) <= self.keep_flops:
            return None
        gone = [
            prefix(mass, (1 - self.alpha) * whole)
            for mass, whole in zip((own, cross), self.masses[number][step.layer - 1], strict=True)
        ]
        chosen = torch.isin(*gone)
        drop = gone[0][chosen]
        deleted[step.layer - 1] = len(drop)
        if not len(drop):
            return None
        stay = torch.ones(n, dtype=torch.bool, device=drop.device)
        stay[drop] = False
        return step.keep(stay.nonzero().squeeze(-1))


def prefix(mass: torch.Tensor, least: float) -> torch.Tensor:
    """The longest run of the smallest masses (n,) whose removal leaves at least `least`; at most n - 1 of them."""
    order = torch.sort(mass, stable=True).indices
    left = mass.sum() - mass[order].cumsum(0)
    return order[: min(int((left >= least).sum()), len(mass) - 1)]


def search(
    run: Callable[[Fit], None],
    *,
    layers: int,
    tokens: int,
    cost: Cost,
    keep: float,
    on_trial: Callable[[float, float], None] = lambda alpha, share: None,
) -> tuple[float, list[int]]:
    """Alpha and the deletions of each layer that leave a share `keep` of the visual tokens' FLOPs, or less.

    Args:
        run: runs a trial on all samples.
        layers: L.
        tokens: N.
        cost: of a layer.
        keep: 1 - the paper's reduction ratio.
        on_trial: called with every alpha and the share it left.

    Raises:
        UserError: when even alpha = 1 leaves more.
    """
    masses: list[Masses] = []
    run(Fit(0.0, keep, cost, masses))

    def trial(alpha: float) -> tuple[float, list[float]]:
        fit = Fit(alpha, keep, cost, masses)
        run(fit)
        mean = [sum(row[layer] for row in fit.deleted) / len(fit.deleted) for layer in range(layers)]
        share = sum(cost.share(tokens, row) for row in fit.deleted) / len(fit.deleted)
        on_trial(alpha, share)
        return share, mean

    low, high = 0.0, 1.0
    share, mean = trial(high)
    if share > keep:
        raise UserError(f"fitprune: the first layers always read everything, so {share:.3f} of the FLOPs is the least")
    while high - low > BRACKET:
        middle = (low + high) / 2
        share, found = trial(middle)
        if share <= keep:
            high, mean = middle, found
        else:
            low = middle
    return high, whole(mean, tokens, cost, keep)


def whole(mean: Sequence[float], tokens: int, cost: Cost, keep: float) -> list[int]:
    """Whole deletions: the floor of the means, and one more where most was cut off, until the budget is met."""
    deleted = [int(count) for count in mean]
    by_rest = sorted(range(len(mean)), key=lambda layer: (deleted[layer] - mean[layer], layer))
    active = [layer for layer in by_rest if mean[layer] > 0]
    turn = 0
    while cost.share(tokens, deleted) > keep and sum(deleted) < tokens - 1:
        deleted[active[turn % len(active)]] += 1
        turn += 1
    return deleted
