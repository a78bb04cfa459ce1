"""LLaVA-PruMerge (ICCV 2025, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge at 097c041, its version without "plus").

Before the language model each tile keeps the tokens to which its CLS token attends far more than to most, and lets each
absorb its neighbours. With a the attention of the CLS token and Q1, Q3 its quartiles over the tile, the tokens with
a > Q3 + 1.5 (Q3 - Q1) are kept (`count=outliers`, at least one), or as many as the budget allows (`count=keep`, the
tables with fixed numbers). A kept token's 32 nearest others, kept ones among them, by the cosine of their keys, give

    y_i = x_i + sum_j a_j x_j

and one more token is the sum of a_j x_j over all that are not kept. Weights are not normalised. Following the released
code, a is one head over the full width, softmax(q k / sqrt(d)), of queries and keys of the tower's last layer, while x
is what the projector gets (one layer earlier in CLIP); tokens go on in falling order of a (`order=score`), the extra
one last, with compact positions.

Here every tile has its own count (the code takes quartiles over a batch) or its share of the budget, the extra token
included; newlines go. Without a CLS token, a is what a token receives on average on that map. Where several cells
become one token, a and keys are averaged, x is all side by side; where cells are resampled, so are all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.arrival import stream
from pruneval.methods.base import Card, Method, MethodError, Needs, Positions, Reduction, Shape, Step, kept, torch
from pruneval.methods.salience import outliers, spread, tiles, tower_features

NEIGHBOURS = 32
ROWS = 1024  # of the single-head map held at once


@dataclass(frozen=True)
class PruMerge(Method):
    """Keeps a fraction `keep` of each tile's tokens (`count=keep`), or as many as stand out (`count=outliers`); `order`
    is score or raster.
    """

    card: ClassVar[Card] = Card(
        "prumerge",
        "LLaVA-PruMerge",
        seam=("embed",),
        summary="Keeps the outliers of the CLS attention, adds to each its nearest neighbours, and sums up the rest.",
        paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        year=2025,
        arxiv="2403.15388",
        repository="42Shawn/LLaVA-PruMerge",
        commit="097c041",
        merges=True,
        reorders=True,
    )
    positions: ClassVar[Positions] = "compact"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@outliers": {"count": "outliers"},
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
    }

    keep: float = 0.25
    count: Literal["keep", "outliers"] = "keep"
    order: Literal["score", "raster"] = "score"

    def check(self) -> None:
        if self.count not in ("keep", "outliers"):
            raise MethodError(f"{self.card.name}: count must be keep or outliers, not {self.count!r}")
        if self.order not in ("score", "raster"):
            raise MethodError(f"{self.card.name}: order must be score or raster, not {self.order!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=tuple(sorted({shape.feature_layer, shape.vision_layers - 1})))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.count == "outliers":
            raise MethodError(f"{self.card.name}: with count=outliers the count depends on the sample")
        return [kept(n, self.keep)] * shape.layers

    def centres(self, weight: torch.Tensor, count: int | None) -> torch.Tensor:
        """Indices of the kept tokens of a tile, strongest first: `count` of them, or as many as stand out."""
        count = outliers(weight) if count is None else count
        return torch.sort(weight, descending=True, stable=True).indices[:count]

    def reduce(self, step: Step) -> Reduction | None:
        total = kept(step.total, self.keep)
        if self.count == "keep" and total >= step.total:
            return None
        (weight, keys), x, parts = single_head(step), tower_features(step), []
        free, areas = self.count == "outliers", [tile.tokens for tile in tiles(step) if len(tile.tokens)]
        for mine, share in zip(areas, spread(total, [len(area) for area in areas]), strict=True):
            if not share and not free:
                continue
            if free or share < len(mine):
                chosen = self.centres(weight[mine], None if free else share - 1)
            else:
                chosen = torch.arange(share, device=mine.device)
            chosen = chosen.sort().values if self.order == "raster" else chosen
            made, values = torch.zeros_like(chosen, dtype=torch.bool), None
            if len(chosen) < len(mine):
                values = step.vision.project(absorb(x[mine], keys[mine], weight[mine], chosen))
                chosen = torch.cat([chosen, chosen[-1:] if len(chosen) else chosen.new_zeros(1)])
                made = torch.ones_like(chosen, dtype=torch.bool)
            own = torch.zeros_like(made)
            own[-1:] = made[-1:]
            parts.append((step.visual[mine[chosen]], made, own, values))
        return stream(step, parts)


def single_head(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) attention of the CLS token, or received on average, with all heads as one, and (N, d_v) keys; last layer."""
    weights, keys, cls = [], [], int(step.shape.has_cls)
    for attention in step.vision.attention(step.shape.vision_layers - 1):
        dtype = torch.promote_types(torch.float32, attention.query.dtype)
        query, key = (part.transpose(0, 1).flatten(1).to(dtype) for part in (attention.query, attention.key))
        query = query * key.shape[1] ** -0.5
        if cls:
            weight = (key @ query[0]).softmax(0)
        else:
            weight = sum((rows @ key.T).softmax(1).sum(0) for rows in query.split(ROWS)) / len(query)
        weights.append(weight[cls:])
        keys.append(key[cls:])
    return step.vision.to_tokens(weights), step.vision.to_tokens(keys)


def absorb(
    x: torch.Tensor,
    keys: torch.Tensor,
    weight: torch.Tensor,
    chosen: torch.Tensor,
    neighbours: int = NEIGHBOURS,
    bonus: torch.Tensor | None = None,
) -> torch.Tensor:
    """(k + 1, d) the chosen tokens of a tile with what they absorb, and the extra one of all others.

    Args:
        x: (n, d) the tile's tokens.
        keys: (n, d_k) what nearness is measured on.
        weight: (n,) what a token is weighted with.
        chosen: (k,) indices of those that are kept.
        neighbours: how many others each absorbs, at most.
        bonus: (n,) what is added to the nearness of each, if anything.
    """
    unit, dtype = torch.nn.functional.normalize(keys, dim=-1), weight.dtype
    near = unit[chosen] @ unit.T + (0 if bonus is None else bonus)
    near[torch.arange(len(chosen), device=near.device), chosen] = float("-inf")
    near = torch.sort(near, dim=1, descending=True, stable=True).indices[:, : min(neighbours, len(x) - 1)]
    mix = torch.zeros(len(chosen) + 1, len(x), dtype=dtype, device=x.device)
    mix[:-1].scatter_(1, near, weight[near])
    mix[-1] = weight
    mix[-1, chosen] = 0
    mixed = mix @ x.to(dtype)
    mixed[:-1] += x[chosen].to(dtype)
    return mixed.to(x.dtype)
