"""Average pooling of the visual tokens before the language model: a baseline that merges neighbours.

Every grid of tokens (a tile; where tiles are put together to larger sheets, the sheet) is pooled to a smaller grid.
Within its share of the budget that is the one whose coarser direction is finest, and of these the one with most tokens:
8 x 8 of 24 x 24 for 64, 13 x 14 for 192. So fewer tokens may stay than asked for; the trace says how many. Bins are
those of adaptive pooling. `stage` says where: behind the projector, as is usual (`post`), or before it (`pre`).

A pooled token stands for the token at the centre of its bin; positions are compact. Newlines go, or stay behind rows
in which a pooled token stands (`newline`); CLS tokens of video frames go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.base import Card, Method, MethodError, Needs, Positions, Reduction, Shape, Step, kept, torch
from pruneval.methods.salience import grids, newlines_of, spread, tower_features
from pruneval.methods.uniform import centres


@dataclass(frozen=True)
class AvgPool(Method):
    """Pools to at most a fraction `keep` of the tokens.

    `pool` is mean or max; `stage` is post or pre (the projector); `newline` is drop or keep (beyond the budget).
    """

    card: ClassVar[Card] = Card(
        "avgpool",
        "Average pooling",
        seam=("embed",),
        summary="Pools the grid of visual tokens to a coarser one before the language model.",
        merges=True,
    )
    positions: ClassVar[Positions] = "compact"

    keep: float = 0.5
    pool: Literal["mean", "max"] = "mean"
    stage: Literal["post", "pre"] = "post"
    newline: Literal["drop", "keep"] = "drop"

    def check(self) -> None:
        for name, values in {"pool": ("mean", "max"), "stage": ("post", "pre"), "newline": ("drop", "keep")}.items():
            if getattr(self, name) not in values:
                raise MethodError(f"avgpool: {name} must be {' or '.join(values)}, not {getattr(self, name)!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        count, sizes = kept(n, self.keep), [tokens for _, tokens in shape.whole] or [n]
        if count == n:
            return [n] * shape.layers
        if shape.sheets and len(sizes) > 1 and shape.whole[0][0] == sizes[0]:  # frames of videos are pooled already
            sizes = [sizes[0], sum(sizes[1:])]  # the whole image, and its parts put together
        sides = [math.isqrt(size) for size in sizes]
        if (shape.tiled and not shape.whole) or any(side**2 != size for side, size in zip(sides, sizes, strict=True)):
            raise MethodError("avgpool: the count depends on the height and width of the image's grids")
        shares = zip(spread(count, sizes, least=1), sides, strict=True)
        return [sum(math.prod(fit(share, side, side)) for share, side in shares)] * shape.layers

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """None: no score is computed."""
        return {}

    def reduce(self, step: Step) -> Reduction | None:
        count = kept(step.total, self.keep)
        if count >= step.total:
            return None
        areas, order, values = grids(step), [], []
        features = step.hidden[step.visual] if self.stage == "post" else tower_features(step)
        for area, share in zip(areas, spread(count, [len(one.tokens) for one in areas], least=1), strict=True):
            rows, columns = fit(share, area.rows, area.columns)
            grid = features[area.tokens].unflatten(0, (area.rows, area.columns)).movedim(-1, 0)
            pool = torch.nn.functional.adaptive_avg_pool2d
            if self.pool == "max":
                pool = torch.nn.functional.adaptive_max_pool2d
            values.append(pool(grid[None], (rows, columns))[0].flatten(1).T)
            middle = centres(area.rows, rows)[:, None] * area.columns + centres(area.columns, columns)
            order.append(area.tokens[middle.flatten().to(area.tokens.device)])
        pooled, made = torch.cat(order), torch.cat(values)
        if self.stage == "pre":
            made = step.vision.project(made)
        stays = pooled
        if self.newline == "keep" and step.shape.sheets:
            stays = torch.cat([pooled, newlines_of(step, pooled)])
        keep = step.keep(stays).keep
        slots = torch.searchsorted(keep, step.visual[pooled])
        return Reduction(keep, slots, made, torch.zeros(len(slots), dtype=torch.bool))


def fit(count: int, rows: int, columns: int) -> tuple[int, int]:
    """The grid of at most `count` tokens, no larger than (rows, columns), whose coarser direction is finest; of these
    the one with most tokens.
    """
    pairs = [(height, min(columns, count // height)) for height in range(1, min(rows, count) + 1)]
    return max(pairs, key=lambda pair: (min(pair[0] * columns, pair[1] * rows), pair[0] * pair[1]))
