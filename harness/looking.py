"""Methods that prune nothing and look: where visual tokens come from, what they receive, how layers rank them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step


@dataclass(frozen=True)
class Places(Method):
    """Notes where each visual token of a prompt stands in the picture, and the picture's tiles."""

    card: ClassVar[Card] = Card("places", "Places", seam=("embed",), summary="Looks where visual tokens come from.")
    pixels: bool = True
    seen: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """One per prompt: `boxes` (N, 5) and `tiles`, as `boxes_of` and the tower have them."""

    def needs(self, shape: Shape) -> dict[int, Needs]:
        """The tower's view at the input of the language model."""
        return {0: Needs(vision=(shape.feature_layer,), pixels=self.pixels)}

    def reduce(self, step: Step) -> Reduction | None:
        """Nothing."""
        view = step.vision
        tiles = [tile.permute(1, 2, 0).float().cpu().numpy() for tile in view.pixels()] if self.pixels else []
        self.seen.append({"boxes": boxes_of(view, step.shape, len(step.visual)).numpy(), "tiles": tiles})
        return None


@dataclass(frozen=True)
class Received(Method):
    """Notes what every visual token receives from the text behind it, in every decoder layer."""

    card: ClassVar[Card] = Card("received", "Received", seam=("layer",), summary="Looks at attention, layer by layer.")
    seen: list[dict[int, Tensor]] = field(default_factory=list, repr=False)
    """One per prompt: layer -> (H, N) attention, mean over the text behind the last visual token."""

    def needs(self, shape: Shape) -> dict[int, Needs]:
        """The attention every layer is about to compute."""
        return {layer: Needs(next=True) for layer in range(shape.layers)}

    def reduce(self, step: Step) -> Reduction | None:
        """Nothing."""
        if step.layer == 0:
            self.seen.append({})
        if len(step.visual) and len(step.question):
            got = step.next.received(step.question)
            self.seen[-1][step.layer] = got[:, step.visual].float().cpu()
        return None


def boxes_of(view: Any, shape: Shape, tokens: int) -> Tensor:
    """(N, 5) tile, top, left, bottom, right of each visual token, as shares of its tile; NaN where it has no place."""
    found = torch.full((tokens, 5), math.nan)
    grid = getattr(view, "grid", None)
    if grid is None:  # tiles of any size, whose tokens come one after the other
        start = 0
        for tile, (rows, columns) in enumerate(view.grids):
            number = torch.arange(rows * columns)
            middle = torch.stack([number // columns + 0.5, number % columns + 0.5], dim=1)
            found[start : start + len(number)] = _boxes(torch.full((len(number),), tile), middle, rows, columns, 1)
            start += len(number)
        return found
    rows, columns = grid
    if shape.sheets:
        tile, cell = view.tile_of().cpu(), view.cell_of().cpu()
        placed = ~view.is_newline().cpu() & (tile >= 0)
        middle = torch.stack([cell // columns + 0.5, cell % columns + 0.5], dim=1).float()
        spread = max(1.0, math.sqrt(view.tiles * rows * columns / max(1, int(placed.sum()))))
        found[placed] = _boxes(tile[placed], middle[placed], rows, columns, spread)
        return found
    cell = torch.arange(rows * columns)
    each = torch.stack([cell // columns + 0.5, cell % columns + 0.5], dim=1)
    numbered = [torch.cat([torch.full((len(cell), 1), float(tile)), each], dim=1) for tile in range(view.tiles)]
    middle = view.to_tokens(numbered).cpu()
    placed = ~middle[:, 0].isnan()
    side = math.sqrt(shape.merge)
    found[placed] = _boxes(middle[placed, 0], middle[placed, 1:], rows, columns, side)
    return found


def _boxes(tile: Tensor, middle: Tensor, rows: int, columns: int, side: float) -> Tensor:
    """Boxes of `side` cells around the middles (row, column), as shares of tiles of rows x columns cells."""
    size = torch.tensor([rows, columns], dtype=torch.float32)
    low, high = (middle - side / 2) / size, (middle + side / 2) / size
    return torch.cat([tile[:, None].float(), low, high], dim=1).clamp(min=0)
