"""VisionZip (CVPR 2025, arXiv 2412.04467, section 3.2; dvlab-research/VisionZip at 3151f6d).

Before the language model, each image keeps its *dominant* tokens, those with the most attention in the vision encoder,
and folds the remaining ones into a few *contextual* tokens. Attention is that of the CLS token, over all heads, in
the layer whose output is projected; encoders without CLS use the attention a token receives on average. The CLS token
itself goes on and counts as dominant. Of the remaining tokens, evenly spaced ones are targets and every other joins
the target with the most similar key (cosine, keys averaged over heads).

Following the released code, a contextual token is its target plus the mean of its members, merged before the
projector; the budget is split 54 : 10; the order is CLS, dominant, contextual, and position ids are compact.

Every image, tile and frame is zipped by itself and has a share of the budget by the tokens it has in the prompt;
newlines go. In a sheet of several tiles (LLaVA-NeXT and its successors) the dominant tokens come first, in raster
order, then the CLS tokens, then the contextual ones. The released code gives every tile the same number (`per_tile`)
and may choose cells that only show padding. Here candidates are the tokens of the prompt; scores, keys and features of
resampled or pooled tokens are resampled and pooled as the tokens are.

Where several cells become one token (InternVL, Qwen-VL) a token's score and key are the means over its cells, its
contextual feature is merged cell by cell, and tokens stay in order, as ports to Qwen-VL have it (which also keep the
`original` positions). A CLS token can't pass such a projector and does not go on. A frame of Video-LLaVA has its CLS
token in the prompt: that is the one which stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    option,
    strongest,
    torch,
)
from pruneval.methods.salience import check_per_tile, declared, shares, tiles, token_salience, tower_features


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps a fraction `keep` of each image's (or tile's) tokens, at least two: 54 of 64 dominant, 10 contextual. With
    `per_tile`, so many tokens of every tile instead of `keep`.
    """

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
        reorders=True,
    )

    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160)},
    }

    keep: float = 0.5
    per_tile: int = option(0)
    position_mode: Positions = "compact"

    def check(self) -> None:
        check_per_tile("visionzip", self.per_tile)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [max(min(2, n), declared("visionzip", shape, n, self.keep, self.per_tile))] * shape.layers

    def reduce(self, step: Step) -> Reduction | None:
        view, layer, blocks = step.vision, step.shape.feature_layer, step.shape.merge > 1
        areas, score = [area.tokens for area in tiles(step)], token_salience(step).to(step.visual.device)
        own = [mine[:0] if step.shape.sheets else _before(mine, score) for mine in areas]
        complete = [torch.cat(both) for both in zip(own, areas, strict=True)]
        found = shares(step, max(self.keep, 2 / step.total), self.per_tile, lambda: complete)
        if found is None:
            return None
        cls, hidden = int(view.has_cls), view.hidden(layer)
        keys = view.to_tokens([attention.key.mean(0)[cls:] for attention in view.attention(layer)])
        features, group = tower_features(step), view.sheet_of() if step.shape.sheets else None
        zipped: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        for tile, (mine, token, (both, share)) in enumerate(zip(areas, own, found, strict=True)):
            contextual = among(share) if share < len(both) else 0
            new = int(bool(contextual and cls and not blocks and not len(token)))
            dominant = share - contextual - len(token) - new
            first, targets, merged = choose(score[mine], keys[mine], features[mine], dominant, contextual)
            part = torch.cat([token, mine[first]]), mine[:new], hidden[tile][:new], mine[targets], merged
            if share:
                zipped.setdefault(tile if group is None else int(group[mine[0]]), []).append(part)
        chosen: list[torch.Tensor] = []
        slots: list[int] = []
        values, added = [features[:0]], []
        for parts in zipped.values():
            dominant, lent, classes, targets, merged = (torch.cat(part) for part in zip(*parts, strict=True))
            whole = [(lent, classes, True), (dominant.sort().values, None, False), (targets, merged, False)]
            for index, made, new in whole if len(parts) == 1 else (whole[1], whole[0], whole[2]):
                if made is not None and len(index):
                    place = sum(map(len, chosen))
                    slots += range(place, place + len(index))
                    values.append(made)
                    added += [new] * len(index)
                chosen.append(index)
        order = torch.cat(chosen)
        if blocks:
            order, back = order.sort()
            slots = torch.argsort(back)[slots].tolist()
        return self._placed(step, step.visual[order], slots, view.project(torch.cat(values)), added)

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


def among(total: int) -> int:
    """Contextual tokens among `total`."""
    return max(1, round(total * 10 / 64)) if total > 1 else 0


def _before(mine: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The CLS token of a tile whose cells are the visual tokens `mine`, if the prompt has it: it has no score."""
    first = mine[:1] - 1
    return first[(first >= 0) & score[first].isnan()]


def choose(
    score: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, dominant: int, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of n tokens with scores (n,), keys (n, d_h) and features (n, d): the dominant, the targets (both ascending), and
    the targets' new features (contextual, d).
    """
    chosen = strongest(score, dominant)
    if not contextual:
        return chosen, chosen[:0], features[:0]
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
