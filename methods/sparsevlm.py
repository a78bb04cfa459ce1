"""SparseVLM (ICML 2025, arXiv 2410.04417; Gumpest/SparseVLMs at 26a5f48, branches v1.5 and v2.0, and 91fb6d9 for 1.0).

Text tokens that look at the image, the *raters*, are chosen once, by the similarity of prompt embeddings. After a few
layers the raters' attention ranks the visual tokens, the lowest go, and a part of those that go is *recycled*: the best
ranked 30 % of them are clustered (density peaks), and each cluster goes on as one token behind the visual ones.

Three released versions: 1.5 (default) keeps fixed numbers of tokens; 1.0 keeps as many as the rank of the raters'
attention says; 2.0 (SparseVLM+) divides attention by what position alone explains, listens to 14 heads only, recycles
nothing and keeps position ids, where 1.x renumbers. A scoring layer runs in full: its output is pruned. The code adds
noise to densities, so ties there fall at random; here the lower index wins. The paper sums the tokens of a cluster
where the code takes their mean: `recycle=sum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    boundary,
    strongest,
    torch,
)

# Kept of 576 tokens after each pruning layer, by the budget the code prints.
FIXED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
LISTS = {"1.5": FIXED, "2.0": PLUS}
LAYERS = {"1.0": (2, 6, 15, 19), "1.5": (2, 6, 15), "2.0": (2, 6, 15)}


@dataclass(frozen=True)
class SparseVLM(Method):
    """Keeps, in versions 1.5 and 2.0, the released list for a budget of `keep` x N, in between by linear interpolation.

    Version 1.0 keeps int(rank * scale + offset) tokens instead. `layers` lists the layers that score ("2,6,15"), or is
    "auto" for the released ones, scaled from 32 layers to the model's depth.
    """

    card: ClassVar[Card] = Card(
        "sparsevlm",
        "SparseVLM",
        seam=("layer",),
        summary="Lets the text tokens that look at the image vote in a few layers, prunes, and recycles some of the "
        "pruned tokens as clusters.",
        paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        year=2025,
        arxiv="2410.04417",
        repository="Gumpest/SparseVLMs",
        commit="26a5f48",
        prompt_aware=True,
        merges=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{budget}": {"keep": budget / 576} for budget in FIXED},
        **{f"llava-1.5-7b@{budget}/2.0": {"version": "2.0", "keep": budget / 576} for budget in PLUS},
        "llava-1.5-7b@192/1.0": {"version": "1.0", "scale": 13.5, "offset": 0.0},
        "llava-1.5-7b@128/1.0": {"version": "1.0", "scale": 9.0, "offset": 6.0},
        "llava-1.5-7b@64/1.0": {"version": "1.0", "scale": 0.8, "offset": 0.0},
    }

    keep: float = 192 / 576
    version: str = "1.5"
    layers: str = "auto"
    recycle: str = "mean"
    heads: int = 14
    scale: float = 13.5
    offset: float = 0.0

    def check(self) -> None:
        if self.version not in LAYERS:
            raise MethodError(f"sparsevlm: version must be 1.0, 1.5 or 2.0, not {self.version!r}")
        if self.recycle not in ("mean", "sum", "none"):
            raise MethodError(f"sparsevlm: recycle must be mean, sum or none, not {self.recycle!r}")
        if self.version == "1.0" and self.keep not in (192 / 576, 1):
            raise MethodError("sparsevlm: version 1.0 has no keep: set scale and offset, or keep=1 to switch it off")
        if self.heads < 1 or self.scale <= 0:
            raise MethodError("sparsevlm: heads and scale must be positive")
        if self.layers != "auto":
            listed = self._listed()
            if len(listed) != len(LAYERS[self.version]) or listed != sorted(set(listed)) or listed[0] < 0:
                raise MethodError(f"sparsevlm: layers must be auto or ascending like 2,6,15, not {self.layers!r}")

    @property
    def position_ids(self) -> Positions:
        return "original" if self.version == "2.0" else "compact"

    def scoring(self, shape: Shape) -> list[int]:
        """The layers whose attention ranks and whose output is pruned."""
        if self.layers != "auto":
            return self._listed()
        scaled: list[int] = []
        for layer in LAYERS[self.version]:
            scaled.append(max(round(layer * shape.layers / 32), scaled[-1] + 1 if scaled else 0))
        return [layer for layer in scaled if layer + 1 < shape.layers]

    def needs(self, shape: Shape) -> dict[int, Needs]:
        for layer in self.scoring(shape):
            boundary("sparsevlm", layer + 1, shape)
        return {layer + 1: Needs(attention=(layer,)) for layer in self.scoring(shape)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.version == "1.0" and self.keep < 1:
            raise MethodError("sparsevlm: in version 1.0 the number of tokens depends on the sample")
        current, counts = n, []
        stages = {layer + 1: stage for stage, layer in enumerate(self.scoring(shape))}
        for layer in range(shape.layers):
            if layer in stages and self.keep < 1 and current > 1:
                count = min(self.listed(n)[stages[layer]], current - 1)
                current = count + self.recycled(current - count)[1]
            counts.append(current)
        return counts

    def listed(self, n: int) -> tuple[int, ...]:
        """Tokens kept of `n` after each scoring layer, before recycling."""
        lists = {0.0: (0, 0, 0)} | {b / 576: kept for b, kept in LISTS[self.version].items()} | {1.0: (576,) * 3}
        low = max(budget for budget in lists if budget <= self.keep)
        high = min(budget for budget in lists if budget >= self.keep)
        part = (self.keep - low) / (high - low) if high > low else 0.0
        exact = [a + (b - a) * part for a, b in zip(lists[low], lists[high], strict=True)]
        return tuple(max(1, round(count * n / 576)) for count in exact)

    def recycled(self, pruned: int) -> tuple[int, int]:
        """How many of `pruned` tokens are clustered, and into how many clusters."""
        if self.version == "2.0" or self.recycle == "none":
            return 0, 0
        best = int(0.3 * pruned) + 1
        return best, best // 10 + 1

    def reduce(self, step: Step) -> Reduction | None:
        current = len(step.visual)
        if self.keep == 1 or current < 2:
            return None
        count = self._count(step)
        if count is None:
            return None
        score = self.score(step)
        chosen = strongest(score, count)
        best, clusters = self.recycled(current - count)
        if not clusters:
            return step.keep(chosen)
        rest = score.clone()
        rest[chosen] = float("-inf")
        pool = step.visual[strongest(rest, best)]
        centres, member = density_peaks(step.hidden[pool], clusters)
        merged = torch.zeros_like(step.hidden[pool[centres]]).index_add_(0, member, step.hidden[pool])
        if self.recycle == "mean":
            merged = merged / torch.bincount(member, minlength=clusters).to(merged)[:, None]
        before = step.keep(chosen).keep
        end = int((before <= step.visual[-1]).sum())
        keep = torch.cat([before[:end], pool[centres], before[end:]])
        return Reduction(keep, torch.arange(end, end + clusters, device=keep.device), merged)

    def score(self, step: Step) -> torch.Tensor:
        """(v,) mean attention of the raters in the layer before, over heads."""
        rows = self._raters(step)
        attention = step.seen[step.layer - 1]
        received = self._corrected(step, rows) if self.version == "2.0" else attention.received(rows)
        return received.mean(0)[step.visual]

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of choosing raters, of their rows and of the distances of recycled tokens, at most: as if all
        text came after the image and were a rater.
        """
        adaptive = self.version == "1.0" and self.keep < 1
        entering = [visual] * shape.layers if adaptive else self.schedule(shape, visual)
        work = {"raters": visual * text * shape.hidden}
        for stage, layer in enumerate(self.scoring(shape)):
            work[f"rows of layer {layer}"] = shape.heads * shape.head_dim * text * (entering[layer] + text)
            kept = 1 if adaptive else min(self.listed(visual)[stage], entering[layer])
            best, _ = self.recycled(entering[layer] - kept)
            work[f"distances after layer {layer}"] = best * best * shape.hidden
        return work

    def _raters(self, step: Step) -> torch.Tensor:
        """Stream indices of the raters; which tokens of the question they are is decided once per prompt."""
        if "raters" not in step.memory:
            question = step.question if len(step.question) else step.text[-1:]
            wide = step.embeddings.to(torch.promote_types(torch.float32, step.embeddings.dtype))
            mine = raters(wide[step.origin[step.visual]], wide[step.origin[question]])
            step.memory["raters"] = step.origin[question[mine]]
        return torch.isin(step.origin, step.memory["raters"]).nonzero().squeeze(-1)

    def _count(self, step: Step) -> int | None:
        """Visual tokens that stay; None when version 1.0 finds nothing to prune."""
        current, layer = len(step.visual), step.layer - 1
        if self.version != "1.0":
            return min(self.listed(step.total)[self.scoring(step.shape).index(layer)], current - 1)
        seen = step.seen[layer].rows(self._raters(step)).mean(0)[:, step.visual]
        rank = int(torch.linalg.matrix_rank(seen.float()))
        return None if rank == current else max(1, min(int(rank * self.scale + self.offset), current - 1))

    def _corrected(self, step: Step, rows: torch.Tensor) -> torch.Tensor:
        """(H', n) attention of the raters over what position alone gives, of the heads that look at the image most."""
        attention = step.seen[step.layer - 1]
        ones = attention.rotated(torch.ones_like(attention.query[0], dtype=torch.float32))
        gravity = ones[rows] @ ones.T / ones.shape[-1] ** 0.5
        received = (attention.rows(rows) / gravity).mean(1)
        return received[strongest(received[:, step.visual].sum(-1), self.heads)]

    def _listed(self) -> list[int]:
        try:
            return [int(part) for part in self.layers.replace("[", "").replace("]", "").split(",")]
        except ValueError:
            return []


def raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Which of the text embeddings (t, d) are more similar than average to the visual ones (v, d); all if none is.

    Returns:
        (t,) bool.
    """
    relevance = (visual @ text.T).softmax(-1).mean(0)
    above = relevance > relevance.mean()
    return above if bool(above.any()) else torch.ones_like(above)


def density_peaks(
    tokens: torch.Tensor, clusters: int, neighbours: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters tokens (m, d) around `clusters` of them that are dense and far from denser ones.

    Density is measured over the nearest `neighbours` tokens (default: as many as clusters), oneself included.

    Returns:
        The centres' indices (C,), best first, and the cluster of each token (m,).
    """
    wide = tokens.to(torch.promote_types(torch.float32, tokens.dtype))
    # without matrix products, so that the distances of a pair are the same number both ways
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / wide.shape[-1] ** 0.5
    nearest = min(neighbours or clusters, len(wide))
    density = (-distance.topk(nearest, largest=False).values.square().mean(-1)).exp()
    order = torch.sort(density, descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    denser = place[None, :] < place[:, None]
    gap = distance.masked_fill(~denser, float("inf")).amin(-1)
    gap = torch.where(gap.isinf(), distance.max(), gap)
    centres = torch.sort(density * gap, descending=True, stable=True).indices[:clusters]
    member = distance[:, centres].argmin(-1)
    member[centres] = torch.arange(clusters, device=member.device)
    return centres, member
