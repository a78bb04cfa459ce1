"""VisionZip (CVPR 2025, arXiv 2412.04467, section 3.2; dvlab-research/VisionZip at 3151f6d).

Before the language model, each image keeps its *dominant* tokens, those with the most attention in the vision encoder,
and folds the remaining ones into a few *contextual* tokens. Attention is that of the CLS token, over all heads, in
the layer whose output is projected; encoders without CLS use the attention a token receives on average. The CLS token
itself goes on and counts as dominant. Of the remaining tokens, evenly spaced ones are targets and every other joins
the target with the most similar key (cosine, keys averaged over heads).

Following the released code, a contextual token is its target plus the mean of its members, merged before the
projector; the budget is split 54 : 10; the order is CLS, dominant, contextual, and position ids are compact.

Where tiles are put together to larger sheets of tokens (LLaVA-NeXT and its successors), every tile has a share of the
budget and newline tokens go; in a sheet of several tiles the dominant tokens come first, in raster order, then the CLS
tokens, then the contextual ones. The released code gives every tile the same share and may choose cells that only show
padding. Here candidates are the tokens of the prompt, so padding is never chosen and a tile's share follows the tokens
it has; scores, keys and features of resampled or pooled tokens are resampled and pooled as the tokens are.
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
from pruneval.methods.salience import salience, spread


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps a fraction `keep` of each image's (or tile's) tokens, at least two: 54 of 64 dominant, 10 contextual."""

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
        if shape.tiled and not shape.sheets:
            raise MethodError("visionzip: not written for models that cut an image into tiles yet")
        return {0: Needs(vision=(shape.feature_layer,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [sum(split(n, self.keep))] * shape.layers

    def reduce(self, step: Step) -> Reduction | None:
        if step.shape.sheets:
            return self._reduce_sheets(step)
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

    def _reduce_sheets(self, step: Step) -> Reduction | None:
        vision, layer = step.vision, step.shape.feature_layer
        cls, tile_of, sheet_of = int(vision.has_cls), vision.tile_of(), vision.sheet_of()
        candidates = [(tile_of == tile).nonzero().squeeze(-1) for tile in range(vision.tiles)]
        total = max(2, kept(step.total, self.keep))
        shares = spread(total, [len(mine) for mine in candidates], least=2)
        if max(total, sum(shares)) >= step.total:
            return None
        hidden, attention = vision.hidden(layer), vision.attention(layer)
        score = vision.to_tokens(torch.stack([salience(one, vision.has_cls) for one in attention]))
        keys, features = (
            vision.to_tokens(torch.stack([one[cls:] for one in each]))
            for each in ([one.key.mean(0) for one in attention], hidden)
        )
        sheets: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        for tile, (mine, share) in enumerate(zip(candidates, shares, strict=True)):
            part = (mine, mine[:0], hidden[tile][:0], mine[:0], features[:0])
            if share < len(mine):
                contextual = max(1, round(share * 10 / 64))
                found = choose(score[mine], keys[mine], features[mine], share - contextual - cls, contextual)
                part = (mine[found[0]], mine[:cls], hidden[tile][:cls], mine[found[1]], found[2])
            if share:
                sheets.setdefault(int(sheet_of[mine[0]]), []).append(part)
        order, slots, values, added = [], [], [], []
        for parts in sheets.values():
            dominant, lent, classes, targets, merged = (torch.cat(part) for part in zip(*parts, strict=True))
            whole = [(lent, classes, True), (dominant.sort().values, None, False), (targets, merged, False)]
            for index, made, new in whole if len(parts) == 1 else (whole[1], whole[0], whole[2]):
                if made is not None:
                    place = sum(map(len, order))
                    slots += range(place, place + len(index))
                    values.append(made)
                    added += [new] * len(index)
                order.append(index)
        return self._placed(step, step.visual[torch.cat(order)], slots, vision.project(torch.cat(values)), added)

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
        index = torch.tensor(slots, dtype=torch.long, device=order.device)
        return Reduction(keep[order], back[index], values, torch.tensor(added, dtype=torch.bool))


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
    score, keys = salience(attention, vision.has_cls), attention.key.mean(0)[cls:]
    return choose(score, keys, hidden[cls:], dominant - cls, contextual)


def choose(
    score: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of n tokens with scores (n,), keys (n, d_h) and features (n, d): the dominant, the targets (both ascending), and
    the targets' new features (contextual, d).
    """
    chosen = strongest(score, dominant)
    rest = torch.ones(len(score), dtype=torch.bool, device=score.device)
    rest[chosen] = False
    rest = rest.nonzero().squeeze(-1)
    targets, merged = merge(features[rest], keys[rest], contextual)
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
