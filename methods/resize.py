"""Smaller images: a baseline that scales pixels down before the vision encoder (as VTC-Bench, arXiv 2510.07143).

Each tile of an image is scaled to the grid of tokens that fits its share of the budget (as `avgpool` chooses it: 8 x 8
of 24 x 24 for 64), goes through the vision encoder at that size, and gives as many tokens. So the encoder gets cheaper
too. Qwen-VL takes images of any size; encoders of a fixed size interpolate their positions; VTC-Bench scales the image
before it is cut into tiles, which gives fewer tiles instead. Nothing is left of rows that only show padding.

A token's place in the prompt is that of the token at the middle of the area it covers. Newlines go, or stay behind rows
in which a token stands (`newline`); CLS tokens of video frames go. Where features of tiles are resampled together
(LLaVA-OneVision), what goes on is close to a token of the small image, not the same, and where that leaves fewer tokens
than there are patches, a larger fraction than `keep` goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.avgpool import fit
from pruneval.methods.base import Card, Method, MethodError, Needs, Positions, Reduction, Shape, Step, kept, torch
from pruneval.methods.salience import newlines_of, tiles
from pruneval.methods.uniform import centres


@dataclass(frozen=True)
class Resize(Method):
    """Scales images down to at most a fraction `keep` of the tokens; `newline` is drop or keep (beyond the budget)."""

    card: ClassVar[Card] = Card(
        "resize",
        "Smaller image",
        seam=("pixels",),
        summary="Scales the image down, so that the vision encoder and the language model see fewer tokens.",
        paper="Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods",
        year=2025,
        arxiv="2510.07143",
    )

    keep: float = 0.5
    newline: Literal["drop", "keep"] = "drop"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.newline not in ("drop", "keep"):
            raise MethodError(f"resize: newline must be drop or keep, not {self.newline!r}")

    def resizing(self, shape: Shape) -> bool:
        return self.keep < 1

    def at_pixels(self, shape: Shape, grid: tuple[int, int]) -> tuple[int, int]:
        return fit(kept(math.prod(grid), self.keep), *grid)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs()} if self.keep < 1 else {}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.keep == 1:
            return [n] * shape.layers
        sizes = [tokens for _, tokens in shape.whole] or [n]
        sides = [math.isqrt(size) for size in sizes]
        if (shape.tiled and not shape.whole) or any(side**2 != size for side, size in zip(sides, sizes, strict=True)):
            raise MethodError("resize: the count depends on the height and width of the image's grids")
        return [sum(math.prod(self.at_pixels(shape, (side, side))) for side in sides)] * shape.layers

    def encoder_schedule(self, shape: Shape, cells: int) -> list[int]:
        side = math.isqrt(cells // shape.merge)
        if self.keep < 1 and side * side * shape.merge != cells:
            raise MethodError("resize: the count depends on the height and width of the image")
        few = math.prod(self.at_pixels(shape, (side, side))) * shape.merge if self.keep < 1 else cells
        return [few + shape.has_cls] * shape.vision_layers

    def reduce(self, step: Step) -> Reduction | None:
        parts = []
        for tile, (area, grid) in enumerate(zip(tiles(step), step.vision.grids, strict=True)):
            chosen = middles(places(step, tile, area.tokens), grid, self.at_pixels(step.shape, grid))
            parts.append(area.tokens[chosen.to(area.tokens.device)])
        chosen = stays = torch.cat(parts)
        if self.newline == "keep" and step.shape.sheets:
            stays = torch.cat([chosen, newlines_of(step, chosen)])
        if len(stays) == step.total:
            return None
        keep = step.keep(stays).keep
        slots = torch.searchsorted(keep, step.visual[chosen].sort().values)
        return Reduction(keep, slots, step.hidden[keep[slots]], torch.zeros(len(slots), dtype=torch.bool))


def places(step: Step, tile: int, tokens: torch.Tensor) -> torch.Tensor:
    """(n, 2) row and column, in the tile's own grid, of its tokens."""
    rows, columns = step.vision.grids[tile]
    if not step.shape.sheets:
        return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cell, (height, width) = step.vision.cell_of()[tokens].cpu(), step.vision.grid
    return torch.stack([cell // width * rows // height, cell % width * columns // width], dim=1)


def middles(place: torch.Tensor, grid: tuple[int, int], small: tuple[int, int]) -> torch.Tensor:
    """Which of a tile's tokens stand for those of the small image: of all that cover the same one, the middle one.

    Args:
        place: (n, 2) row and column of each token in the tile's grid.
        grid: that grid; rows and columns may be missing.
        small: the grid of the small image.

    Returns:
        (m,) indices 0..n-1, ascending.
    """
    under, away = torch.zeros(len(place), dtype=torch.long), torch.zeros(len(place), dtype=torch.long)
    for side, (whole, few) in enumerate(zip(grid, small, strict=True)):
        part = (2 * place[:, side] + 1) * few // (2 * whole)
        under = under * few + part
        away += (place[:, side] - centres(whole, few)[part]).abs()
    order = torch.argsort(under * (sum(grid) + 1) + away, stable=True)
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = under[order].diff() != 0
    return order[first].sort().values
