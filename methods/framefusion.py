"""FrameFusion (ICCV 2025, arXiv 2501.01986; thu-nics/FrameFusion at fbec1d2): merge repeats over time, prune once.

Before each decoder layer, starting at the first, a visual token that is at least `threshold` like (cosine of hidden
states) the token at the same place of the frame before is merged: an unbroken run of such tokens along time collapses
into the token before it, which becomes their plain mean and keeps its position. When fewer than `saturated` of the
visual tokens can be merged, merging is over, and at the next boundary the last prompt token's attention in the layer
before keeps the strongest, so many that the mean number of visual tokens per layer becomes `keep` times all. When
merging alone would undercut that budget, it takes the most similar tokens only and both stages end.

The released code merges between a layer's attention and its feed-forward part, which hooks around stock layers can't;
here the same merge happens behind the feed-forward part. Caches and the number of tokens that enter each layer are the
same, but one more feed-forward part sees the tokens, and similarity is measured after it. It also takes 28 layers for
granted; here the model is asked. Where no number of tokens is small enough for the budget, one stays; it fails there.
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
    strongest,
    torch,
)


@dataclass(frozen=True)
class FrameFusion(Method):
    """Spends a fraction `keep` (the paper's cost) of the un-pruned visual tokens, as a mean over decoder layers.

    `threshold` is 0.6 for LLaVA-Video, 0.5 for Qwen2-VL and InternVL2.5.
    """

    card: ClassVar[Card] = Card(
        "framefusion",
        "FrameFusion",
        seam=("embed", "layer"),
        summary="Merges tokens that repeat the frame before in the first layers, then prunes once to meet a budget.",
        paper="FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language "
        "Models",
        year=2025,
        arxiv="2501.01986",
        repository="thu-nics/FrameFusion",
        commit="fbec1d2",
        prompt_aware=True,
        merges=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        f"{model}@{cost:.0%}": {"keep": cost, "threshold": threshold}
        for model, threshold in (("llava-video-7b", 0.6), ("qwen2-vl-7b", 0.5), ("internvl2.5-8b", 0.5))
        for cost in (0.5, 0.3, 0.2)
    }

    keep: float = 0.3
    threshold: float = 0.6
    saturated: float = 0.1

    def check(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise MethodError(f"framefusion: threshold must be in [-1, 1], not {self.threshold:g}")
        if not 0 <= self.saturated <= 1:
            raise MethodError(f"framefusion: saturated must be in [0, 1], not {self.saturated:g}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(frames=True)} | {
            layer: Needs(attention=(layer - 1,), frames=True) for layer in range(1, shape.layers)
        }

    def schedule(self, shape: Shape, n: int) -> list[int]:
        """Of an image, of which nothing can be merged."""
        if shape.layers == 1 or self.keep == 1:
            return [n] * shape.layers
        if not self.saturated:
            raise MethodError("framefusion: with saturated = 0 how many tokens enter a layer depends on the sample")
        return [n] + [max(1, round(n * (1 - required([0.0], shape.layers, self.keep))))] * (shape.layers - 1)

    def reduce(self, step: Step) -> Reduction | None:
        memory, alive = step.memory, len(step.visual)
        past, stage = memory.setdefault("past", []), memory.setdefault("stage", "merging")
        if stage == "done":
            return None
        limit = required(past, step.shape.layers, self.keep)
        if stage == "pruning":
            memory["stage"] = "done"
            count = max(1, round(alive * (1 - limit)))
            if count >= alive:
                return None
            return step.keep(strongest(self.score(step), count))
        tokens, similar = neighbours(step)
        repeats = similar >= self.threshold
        merged = int(repeats.sum()) / alive
        if merged >= limit:
            memory["stage"] = "done"
            repeats = torch.zeros_like(repeats)
            repeats[strongest(similar, int(limit * alive))] = True
        else:
            past.append(merged)
            if merged < self.saturated:
                memory["stage"] = "pruning"
        return collapse(step, tokens, repeats)

    def score(self, step: Step) -> torch.Tensor:
        """(v,) attention of the last prompt token in the layer before, mean over heads."""
        return step.seen[step.layer - 1].rows(-1)[:, 0].mean(0)[step.visual]


def required(past: list[float], layers: int, cost: float) -> float:
    """Share of the visual tokens alive that has to go now so that the mean over all layers becomes `cost`.

    Args:
        past: shares that went at the boundaries so far, each followed by one layer.
        layers: decoder layers.
        cost: the budget, as a share of the un-pruned visual tokens.

    Returns:
        A number in [0, 1].
    """
    left, spent = 1.0, 0.0
    for share in past:
        left *= 1 - share
        spent += left
    remaining = (layers - len(past)) * left
    return 1.0 if remaining <= 0 else min(1.0, max(0.0, 1 - (layers * cost - spent) / remaining))


def neighbours(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """The videos' tokens, place by place and along time within a place.

    Returns:
        Their stream indices (m,), and the cosine of each with the one before, -inf for the first of a place.
    """
    wide = step.hidden.to(torch.promote_types(torch.float32, step.hidden.dtype))
    index = torch.full((max(len(step.embeddings), int(step.origin.max()) + 1),), -1, device=step.origin.device)
    index[step.origin] = torch.arange(len(step.origin), device=step.origin.device)
    tokens, similar = [step.visual[:0]], [wide.new_empty(0)]
    for clip in step.clips:
        along = index[clip.T.flatten()]
        mine = along[along >= 0]
        place = (along >= 0).nonzero().squeeze(-1) // len(clip)
        cosine = torch.full((len(mine),), float("-inf"), dtype=wide.dtype, device=wide.device)
        cosine[1:] = torch.nn.functional.cosine_similarity(wide[mine[1:]], wide[mine[:-1]], dim=-1)
        cosine[torch.nn.functional.pad(place[1:] != place[:-1], (1, 0), value=True)] = float("-inf")
        tokens.append(mine)
        similar.append(cosine)
    return torch.cat(tokens), torch.cat(similar)


def collapse(step: Step, tokens: torch.Tensor, repeats: torch.Tensor) -> Reduction | None:
    """Merges each run of repeating tokens (as `neighbours` lists them) into the token before it."""
    if not bool(repeats.any()):
        return None
    run = (~repeats).cumsum(0) - 1
    heads = tokens[~repeats]
    size = torch.bincount(run, minlength=len(heads))
    wide = step.hidden[tokens].to(torch.promote_types(torch.float32, step.hidden.dtype))
    means = torch.zeros(len(heads), wide.shape[-1], dtype=wide.dtype, device=wide.device)
    means = means.index_add_(0, run, wide) / size[:, None]
    stays = torch.ones(len(step.origin), dtype=torch.bool, device=step.origin.device)
    stays[tokens[repeats]] = False
    place = stays.cumsum(0) - 1
    grown = size > 1
    return Reduction(stays.nonzero().squeeze(-1), place[heads[grown]], means[grown].to(step.hidden.dtype))
