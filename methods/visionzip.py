"""VisionZip (CVPR 2025, arXiv 2412.04467, section 3.2; dvlab-research/VisionZip at 3151f6d).

Before the language model, each image keeps its *dominant* tokens, those with the most attention in the vision encoder,
and folds the remaining ones into a few *contextual* tokens. Attention is that of the CLS token, summed over heads, in
the layer whose output is projected; encoders without CLS use the attention a token receives on average. The CLS token
itself goes on and counts as dominant. Of the remaining tokens, evenly spaced ones are targets and every other joins
the target with the most similar key (cosine, keys averaged over heads).

Following the released code, a contextual token is its target plus the mean of its members, merged before the
projector; the budget is split 54 : 10; the order is CLS, dominant, contextual, and position ids are compact.
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
    Vision,
    kept,
    strongest,
    torch,
)


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps a fraction `keep` of each image's tokens, at least two: 54 of 64 dominant, 10 contextual."""

    card: ClassVar[Card] = Card(
        "visionzip",
        "VisionZip",
        seam=("embed",),
        summary="Keeps the tokens the vision encoder attends to most and merges the rest into a few contextual ones.",
        paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        year=2025,
        arxiv="2412.04467",
        repository="dvlab-research/VisionZip",
        commit="3151f6d",
        merges=True,
    )

    keep: float = 0.5
    position_mode: Positions = "compact"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        if shape.tiled:
            raise MethodError("visionzip: not written for models that cut an image into tiles yet")
        return {0: Needs(vision=(shape.feature_layer,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [sum(split(n, self.keep))] * shape.layers

    def reduce(self, step: Step) -> Reduction | None:
        vision, layer = step.vision, step.shape.feature_layer
        per_tile = len(step.visual) // vision.tiles
        dominant, contextual = split(per_tile, self.keep)
        if not contextual:
            return None
        order, slots, values, added = [step.text.new_empty(0)], [], [], []
        for tile, mine in enumerate(step.visual.split(per_tile)):
            chosen, targets, merged = fold(vision, layer, tile, dominant, contextual)
            place = sum(map(len, order))
            if vision.has_cls:
                cls = vision.hidden(layer)[tile][:1]
                order.append(mine[:1])
                slots.append(place)
                values.append(cls)
                added.append(True)
            order += [mine[chosen], mine[targets]]
            slots += range(place + dominant, place + dominant + contextual)
            values.append(merged)
            added += [False] * contextual
        return self._placed(step, torch.cat(order), slots, vision.project(torch.cat(values)), added)

    def _placed(
        self, step: Step, visual: torch.Tensor, slots: list[int], values: torch.Tensor, added: list[bool]
    ) -> Reduction:
        """The tokens of each image where the image was, text around them."""
        image = torch.bucketize(visual, step.visual.new_tensor([stop for _, stop in step.spans]), right=True)
        place = step.visual.new_tensor([start for start, _ in step.spans])[image]
        keep = torch.cat([visual, step.text])
        order = torch.sort(torch.cat([place, step.text]), stable=True).indices
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return Reduction(keep[order], back[torch.tensor(slots)], values, torch.tensor(added))


def split(n: int, keep: float) -> tuple[int, int]:
    """Dominant and contextual tokens of an image of `n` tokens; (n, 0) when it stays whole."""
    total = max(2, kept(n, keep))
    if total >= n:
        return n, 0
    contextual = max(1, round(total * 10 / 64))
    return total - contextual, contextual


def fold(
    vision: Vision, layer: int, tile: int, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dominant cells (ascending), target cells (ascending) and the contextual tokens' features (C, d_v) of one tile."""
    attention, hidden = vision.attention(layer)[tile], vision.hidden(layer)[tile]
    cls = int(vision.has_cls)
    score = attention.rows(0)[:, 0].sum(0) if cls else attention.received().mean(0)
    chosen = strongest(score[cls:], dominant - cls)
    rest = torch.ones(len(score) - cls, dtype=torch.bool, device=score.device)
    rest[chosen] = False
    rest = rest.nonzero().squeeze(-1)
    targets, merged = merge(hidden[cls:][rest], attention.key.mean(0)[cls:][rest], contextual)
    return chosen, rest[targets], merged


def merge(features: torch.Tensor, keys: torch.Tensor, contextual: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds tokens into evenly spaced targets.

    Args:
        features: (r, d) tokens, in raster order.
        keys: (r, d_h) what similarity is measured on.
        contextual: number of targets C.

    Returns:
        The targets' indices (C,) and the target plus the mean of its members, (C, d).
    """
    step = max(1, len(features) // contextual)
    targets = torch.arange(contextual, device=features.device) * step
    others = torch.ones(len(features), dtype=torch.bool, device=features.device)
    others[targets] = False
    unit = torch.nn.functional.normalize(keys.to(torch.promote_types(torch.float32, keys.dtype)), dim=-1)
    similar = unit[others] @ unit[targets].T
    # argmax leaves ties open; the lowest target wins
    member = (similar == similar.amax(1, keepdim=True)).int().argmax(1)
    sums = torch.zeros_like(features[targets]).index_add_(0, member, features[others])
    size = torch.bincount(member, minlength=contextual).clamp(min=1).to(features.dtype)
    return targets, features[targets] + sums / size[:, None]
