"""FlowCut (NeurIPS 2025, arXiv 2505.19536, section 4 and appendix A.5; TungChintao/FlowCut at a2ecd24).

Inside the vision tower, behind every second layer, the CLS token's attention tells how much is redundant (the lower its
entropy, the more), and a running score tells which patches go: attention plus similarity of values to the CLS token's,
times the size of the value. Where there is no CLS token, the mean query and the mean value take its place. The last
pruning is to the exact target; what is left keeps its order.

Following the released code, similarity of values is a softmax without scaling in the tower (with it in the language
model), values are averaged over heads before their size is taken, and each image has its own count (in a batch, the
code gives all the largest one of theirs). Where several cells become one token they stay or go together, by their mean
score; the released code for Qwen2-VL drops single cells and merges what happens to be neighbours afterwards.

LLaVA-NeXT and Qwen-VL are pruned in two stages: the tower passes `ahead` times the target, and behind decoder layer 1
the last token's attention and values choose the rest in the same way. Newlines go; cells that only show padding too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.arrival import land
from pruneval.methods.base import (
    Attention,
    Card,
    EncodeStep,
    Method,
    MethodError,
    Needs,
    Place,
    Positions,
    Reduction,
    Shape,
    Step,
    boundary,
    kept,
    strongest,
    torch,
)

STAGE = 2  # the boundary behind decoder layer 1


@dataclass(frozen=True)
class FlowCut(Method):
    """Keeps a fraction `keep`.

    `stages`: one, two, or as published: two where tiles are put together to larger sheets or several cells become one
    token. `ahead`: times the target that leaves the tower before the second stage (paper 2; code for LLaVA-NeXT 2.5).
    `values`: whether similarity of values counts (the released code for Qwen2-VL leaves it out in the tower).
    """

    card: ClassVar[Card] = Card(
        "flowcut",
        "FlowCut",
        seam=("vision", "layer"),
        summary="Prunes inside the vision encoder: entropy of the CLS attention says how many, a running score which.",
        paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        year=2025,
        arxiv="2505.19536",
        repository="TungChintao/FlowCut",
        commit="a2ecd24",
        prompt_aware=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"keep": count / 2880} for count in (640, 320, 160)},
        "video-llava-7b@256": {"keep": 256 / 2048},
    }

    keep: float = 0.5
    stages: Literal["published", "one", "two"] = "published"
    ahead: float = 2.0
    values: bool = True
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.stages not in ("published", "one", "two"):
            raise MethodError(f"flowcut: stages must be published, one or two, not {self.stages!r}")
        if self.ahead < 1:
            raise MethodError(f"flowcut: ahead must be at least 1, not {self.ahead:g}")

    def two(self, shape: Shape) -> bool:
        """Whether there is a second stage in the language model."""
        return self.stages == "two" or (self.stages == "published" and (shape.sheets or shape.merge > 1))

    def needs(self, shape: Shape) -> dict[int, Needs]:
        if self.keep == 1:
            return {}
        if not self.two(shape):
            return {0: Needs()}
        boundary("flowcut", STAGE, shape)
        return {0: Needs(), STAGE: Needs(attention=(STAGE - 1,))}

    def target(self, shape: Shape, tokens: int) -> int:
        """How many of a tile's `tokens` leave the tower."""
        return kept(tokens, min(1.0, self.keep * (self.ahead if self.two(shape) else 1)))

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if not shape.whole and (shape.sheets or (shape.tiled and shape.has_cls and shape.merge > 1)):
            raise MethodError("flowcut: the count depends on how many tiles the image has and what of them is padding")
        passed = sum(self.target(shape, tokens) for _, tokens in shape.whole) or self.target(shape, n)
        final = min(passed, kept(n, self.keep)) if self.two(shape) else passed
        return [passed if layer < STAGE else final for layer in range(shape.layers)]

    def encoder_schedule(self, shape: Shape, cells: int) -> list[int]:
        end = self.target(shape, cells // shape.merge) * shape.merge + shape.has_cls
        raise MethodError(
            "flowcut: how many leave at each layer of the tower depends on the image: "
            f"{cells + shape.has_cls} of a tile enter layer 0, {end} layer {last(shape) + 1}"
        )

    # Inside the tower

    def encoding(self, shape: Shape) -> dict[int, Place]:
        return {} if self.keep == 1 else dict.fromkeys(range(last(shape) + 1), "layer")

    def at_encode(self, step: EncodeStep) -> Reduction | None:
        target = self.target(step.shape, step.tokens) * step.shape.merge
        alive = len(step.cells) - step.cls
        if alive <= target:
            return None
        attention, score = flow(step.attention, step.cls, self.values)
        history = step.memory.get("score")
        step.memory["score"] = score = score if history is None else 0.5 * history + 0.5 * score
        left = last(step.shape) - step.layer
        if left % 2:
            return None
        size = step.shape.merge
        blocks = -(-max(target, alive - dropped(attention, target, left)) // size)
        if blocks * size >= alive:
            return None
        chosen = survivors(score, step.blocks[step.cls :], blocks)
        step.memory["score"] = score[chosen]
        cls = torch.arange(step.cls, device=chosen.device)
        return Reduction(torch.cat([cls, step.cls + chosen]))

    # In the language model

    def reduce(self, step: Step) -> Reduction | None:
        if step.layer == 0:
            return land(step, in_order=True)
        count = kept(step.total, self.keep)
        if count >= len(step.visual):
            return None
        return step.keep(strongest(instruction_flow(step.seen[STAGE - 1], step.visual), count))


def last(shape: Shape) -> int:
    """The tower's last layer behind which patches go: the one before the projected one; the very last for Qwen-VL."""
    return shape.feature_layer - (shape.has_cls or shape.merge == 1)


def flow(attention: Attention, cls: int, values: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """From each patch to the CLS (or mean) token: attention (P,), summing to 1, and score (P,)."""
    dtype = torch.promote_types(torch.float32, attention.query.dtype)
    query, key, value = (part.to(dtype) for part in (attention.query, attention.key, attention.value))
    if cls:
        seen, to = attention.rows(0)[:, 0], value[:, 0]
    else:
        seen = ((key @ query.mean(1)[..., None])[..., 0] * attention.scaling).softmax(-1)
        to = value.mean(1)
    similar = (value @ to[..., None])[..., 0].softmax(-1)
    return fused(seen[:, cls:].mean(0), similar[:, cls:].mean(0) if values else None, value[:, cls:])


def fused(seen: torch.Tensor, similar: torch.Tensor | None, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (P,) summing to 1, and (attention + similarity of values) x size of the value.

    Args:
        seen, similar: (P,) means over heads.
        value: (H, P, d_h).
    """
    seen = seen / seen.sum()
    joined = seen if similar is None else seen + similar / similar.sum()
    return seen, joined * value.mean(0).abs().sum(-1)


def dropped(attention: torch.Tensor, target: int, left: int) -> int:
    """P: how many of the N patches go, by the entropy of `attention` (N,); all but the target when no layer is left."""
    alive = len(attention)
    if left == 0:
        return alive - target
    ratio = float(torch.special.entr(attention.double()).sum()) / math.log(alive)
    return round((alive - target) / math.sqrt(left) * (1 - ratio**2))


def survivors(score: torch.Tensor, blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The cells of the `count` blocks with the highest mean score, ascending."""
    present, place, size = blocks.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(present), dtype=score.dtype, device=score.device).index_add_(0, place, score) / size
    chosen = torch.zeros(len(present), dtype=torch.bool, device=score.device)
    chosen[strongest(means, count)] = True
    return chosen[place].nonzero().squeeze(-1)


def instruction_flow(attention: Attention, visual: torch.Tensor) -> torch.Tensor:
    """(v,) the same score in a decoder layer, from the last token to the visual ones, softmax over these only."""
    dtype = torch.promote_types(torch.float32, attention.query.dtype)
    seen = attention.rows(-1)[:, 0, visual]
    value = attention.value.to(dtype)
    similar = ((value[:, visual] @ value[:, -1, :, None])[..., 0] * attention.scaling).softmax(-1)
    return fused((seen / seen.sum(-1, keepdim=True)).mean(0), similar.mean(0), value[:, visual])[1]
