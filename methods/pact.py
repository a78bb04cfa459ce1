"""PACT (CVPR 2025, arXiv 2504.08966; orailix/PACT at cf9a0c9).

At one early layer three things happen. EUTI ranks visual tokens without looking at the question: one global query, the
mean over all tokens up to the last visual one, against all their keys, both without rotary embedding, times the norm of
the hidden state; the lowest go. DBDPC clusters the rest by the distance of their (rotated) keys so that every token is
within `cutoff` of its centre and centres are farther apart than that. Each cluster goes on as one token, the mean of
its hidden states in its centre's place; pruned tokens near enough to a centre are taken in again. From there on a token
counts in attention as many times as it has members (proportional attention).

Clusters form in rounds: a token without a denser unassigned token within `cutoff` becomes a centre. The released code
switches to a sweep by falling density when a round finds few centres, which finds the same centres.

`keep` = 1 switches the whole method off; the published ablation without EUTI is `keep` just below 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Reduction,
    Shape,
    Step,
    boundary,
    strongest,
    torch,
)


@dataclass(frozen=True)
class Pact(Method):
    """Prunes to a fraction `keep` of the visual tokens before decoder layer `layer`, then clusters what is left.

    `layer` is a number, or "auto": 4, or half of the layers of a model with fewer than 8. `recover` is how far, in
    cutoffs, a pruned token may be from the centre that takes it in (0: none is).
    """

    card: ClassVar[Card] = Card(
        "pact",
        "PACT",
        seam=("layer",),
        summary="Prunes by a global query, clusters what is left by its keys, merges clusters and weighs them by size.",
        paper="PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models",
        year=2025,
        arxiv="2504.08966",
        repository="orailix/PACT",
        commit="cf9a0c9",
        merges=True,
    )

    keep: float = 0.55
    cutoff: float = 0.21
    layer: str = "auto"
    recover: float = 1.5
    proportional: bool = True

    def check(self) -> None:
        if not 0 <= self.cutoff <= 2:
            raise MethodError(f"pact: cutoff is a cosine distance, between 0 and 2, not {self.cutoff:g}")
        if self.recover < 0:
            raise MethodError(f"pact: recover must not be negative, not {self.recover:g}")
        if self.layer != "auto" and not self.layer.isdecimal():
            raise MethodError(f"pact: layer must be auto or a number, not {self.layer!r}")

    def boundary(self, shape: Shape) -> int:
        """The layer before which tokens are reduced."""
        return min(4, shape.layers // 2) if self.layer == "auto" else int(self.layer)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("pact", self.boundary(shape), shape)
        return {self.boundary(shape): Needs(next=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.keep == 1:
            return [n] * shape.layers
        raise MethodError("pact: how many clusters there are depends on the sample")

    def reduce(self, step: Step) -> Reduction | None:
        if self.keep == 1:
            return None
        attention, visual = step.next, step.visual
        survivors = strongest(self.score(step), max(1, int(len(visual) * self.keep + 1e-9)))
        distance = distances(attention.key[:, visual].transpose(0, 1).flatten(1), survivors)
        centres = survivors[peaks(distance[survivors], self.cutoff)]
        place = torch.full((len(visual),), -1, device=visual.device)
        place[survivors] = torch.arange(len(survivors), device=visual.device)
        nearest = distance[:, place[centres]].min(-1)
        member = nearest.indices
        member[centres] = torch.arange(len(centres), device=visual.device)
        labelled = (place >= 0) | (nearest.values <= self.recover * self.cutoff) & (self.recover > 0)
        size = torch.bincount(member[labelled], minlength=len(centres))
        hidden = step.hidden[visual]
        hidden = hidden.to(torch.promote_types(torch.float32, hidden.dtype))
        sums = torch.zeros_like(hidden[centres]).index_add_(0, member[labelled], hidden[labelled])
        keep = step.keep(centres).keep
        merged = (size > 1).nonzero().squeeze(-1)
        weights = torch.ones(len(keep), device=visual.device)
        slots = torch.searchsorted(keep, visual[centres])
        weights[slots] = size.to(weights)
        return Reduction(
            keep,
            slots[merged],
            (sums[merged] / size[merged, None]).to(step.hidden),
            weights=weights if self.proportional and len(merged) else None,
        )

    def score(self, step: Step) -> torch.Tensor:
        """(v,) EUTI: what the global query sees of a visual token, times the norm of its hidden state."""
        bare, end = step.next.unrotated(), int(step.visual[-1]) + 1
        wide = torch.promote_types(torch.float32, bare.query.dtype)
        query, key = bare.query[:, :end].to(wide).mean(1), bare.key[:, :end].to(wide)
        grouped = query.unflatten(0, (len(key), -1))  # heads that share keys
        seen = (grouped @ key.transpose(-1, -2) / key.shape[-1] ** 0.5).softmax(-1).flatten(0, 1).mean(0)
        return seen[step.visual] * step.hidden[step.visual].to(wide).norm(dim=-1)

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the layer's projections and the global query, and of the distances of keys."""
        width, keys, layer = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, self.boundary(shape)
        survivors = int(visual * self.keep)
        return {
            f"projections and one row of layer {layer}": (visual + text) * (shape.hidden * (width + 2 * keys) + width),
            "distances of keys": visual * survivors * keys,
        }


def distances(keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Cosine distances, at least 0, of all keys (v, d) to those numbered `columns` (m,): (v, m)."""
    unit = torch.nn.functional.normalize(keys.to(torch.promote_types(torch.float32, keys.dtype)), dim=-1)
    found = (1 - unit @ unit[columns].T).clamp(min=0)
    found[columns, torch.arange(len(columns), device=columns.device)] = 0
    return found


def peaks(distance: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Indices of the cluster centres, ascending: no two within `cutoff`, and every token within `cutoff` of one.

    Args:
        distance: (m, m).
        cutoff: largest distance of a member from a centre.
    """
    density = torch.sort((-((distance / 2) ** 2)).exp().sum(-1), descending=True, stable=True).indices
    rank = torch.empty_like(density)
    rank[density] = torch.arange(len(density), device=density.device)
    near = distance <= cutoff
    rivals = near & near.T & (rank[None, :] < rank[:, None])
    centre, free = torch.zeros_like(rank, dtype=torch.bool), torch.ones_like(rank, dtype=torch.bool)
    while bool(free.any()):
        new = free & ~(rivals & free).any(-1)
        centre |= new
        free &= ~(near[:, new].any(-1) | new)
    return centre.nonzero().squeeze(-1)
