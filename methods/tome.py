"""ToMe (Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461, section 3; facebookresearch/ToMe).

In every layer of the vision tower, between attention and feed-forward, the tokens are split by even and odd places,
each even one is drawn to the odd one with the most similar key (cosine, keys averaged over heads), and the strongest of
these pairs are merged to their average, weighted by how many tokens each side already stands for. The CLS token never
merges. Later layers add the logarithm of that size to a token's column of attention logits (proportional attention).

The paper merges in classifiers and sets no budget in tokens. Following the tables of later papers, the same number is
merged in every layer up to the one whose output is projected, the remainder one by one in the first layers; where half
the tokens of a layer would not do, earlier layers merge more. Tokens leave the tower out of raster order, tile by tile,
without newlines and without cutting padding away, and their position ids are compact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.arrival import land
from pruneval.methods.base import (
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
    kept,
    torch,
)


@dataclass(frozen=True)
class ToMe(Method):
    """Merges each tile to a fraction `keep` of its tokens; `proportional` attention weighs tokens by their size."""

    card: ClassVar[Card] = Card(
        "tome",
        "ToMe",
        seam=("vision",),
        summary="Merges pairs of similar tokens in every layer of the vision encoder.",
        paper="Token Merging: Your ViT But Faster",
        year=2023,
        arxiv="2210.09461",
        repository="facebookresearch/ToMe",
        merges=True,
        reorders=True,
        provisional="no configuration for language models is published: the even schedule over layers is ours",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"keep": count / 2880} for count in (640, 320, 160)},
    }

    keep: float = 0.5
    proportional: bool = True
    position_mode: Positions = "compact"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        if shape.merge > 1:
            raise MethodError(
                "tome: this model makes one token of several cells, which needs the grid that merging breaks"
            )
        return {} if self.keep == 1 else {0: Needs()}

    def encoding(self, shape: Shape) -> dict[int, Place]:
        return {} if self.keep == 1 else dict.fromkeys(range(shape.feature_layer + 1), "attention")

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if shape.sheets and not shape.whole:
            raise MethodError("tome: the count depends on how many tiles the image has")
        tiles = shape.whole or ((n, n),)
        return [sum(cells - sum(merges(cells, kept(t, self.keep), shape)) for cells, t in tiles)] * shape.layers

    def encoder_schedule(self, shape: Shape, cells: int) -> list[int]:
        merged = merges(cells, kept(cells, self.keep), shape)
        entering = [cells + shape.has_cls - sum(merged[:layer]) for layer in range(shape.feature_layer + 1)]
        left = cells + shape.has_cls - sum(merged)
        return entering + [left] * (shape.vision_layers - len(entering))

    def at_encode(self, step: EncodeStep) -> Reduction | None:
        count = merges(step.total, kept(step.tokens, self.keep), step.shape)[step.layer]
        if not count:
            return None
        size = step.memory.get("size")
        if size is None:
            size = torch.ones(len(step.hidden), device=step.hidden.device)
        keep, values, size = merge(step.hidden, step.attention.key.mean(0), size, count, step.cls)
        step.memory["size"] = size
        return Reduction(keep, torch.arange(len(keep)), values, weights=size if self.proportional else None)

    def reduce(self, step: Step) -> Reduction | None:
        return land(step, in_order=False)


def merges(cells: int, target: int, shape: Shape) -> list[int]:
    """Pairs merged in each layer up to the one that is projected, so that `target` of `cells` are left.

    A layer of t tokens can merge (t - 1) // 2 pairs with a CLS token, t // 2 without, so a tower of few layers may be
    left with more.
    """
    layers, cls = shape.feature_layer + 1, int(shape.has_cls)
    share, rest = divmod(cells - target, layers)
    even = [share + (layer < rest) for layer in range(layers)]
    tokens = [cells + cls - sum(even[:layer]) for layer in range(layers)]
    if all(count <= (t - cls) // 2 for count, t in zip(even, tokens, strict=True)):
        return even
    for rate in range(share + 1, cells):
        counts = capped(cells, target, layers, rate)
        if sum(counts) == cells - target:
            return counts
    return capped(cells, target, layers, cells)


def capped(cells: int, target: int, layers: int, rate: int) -> list[int]:
    """Pairs merged in each layer: `rate`, or half of what is left, or what is left to merge."""
    counts, left = [], cells
    for _ in range(layers):
        counts.append(min(rate, left // 2, left - target))
        left -= counts[-1]
    return counts


def merge(
    hidden: torch.Tensor, keys: torch.Tensor, size: torch.Tensor, count: int, cls: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merges the `count` most similar pairs of even and odd tokens.

    Args:
        hidden: (t, d_v) tokens; keys: (t, d_h) what similarity is measured on; size: (t,) what each stands for.
        count: pairs.
        cls: 1 when token 0 must not merge.

    Returns:
        The tokens that go on (t - count,): even ones that did not merge, ascending, then the odd ones; their values and
        sizes.
    """
    even, odd = (torch.arange(first, len(hidden), 2, device=hidden.device) for first in (0, 1))
    unit = torch.nn.functional.normalize(keys.to(torch.promote_types(torch.float32, keys.dtype)), dim=-1)
    similar = unit[even] @ unit[odd].T
    similar[:cls] = float("-inf")
    best = similar.amax(1)
    partner = (similar == best[:, None]).int().argmax(1)  # the lowest of equals
    order = torch.sort(best, descending=True, stable=True).indices
    source, stay = order[:count], order[count:].sort().values
    weighted = hidden.to(unit.dtype) * size[:, None].to(unit.dtype)
    weighted[odd] = weighted[odd].index_add(0, partner[source], weighted[even[source]])
    sizes = size.clone()
    sizes[odd] = sizes[odd].index_add(0, partner[source], size[even[source]])
    keep = torch.cat([even[stay], odd])
    return keep, (weighted[keep] / sizes[keep, None].to(weighted)).to(hidden), sizes[keep]
