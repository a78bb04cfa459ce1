"""Steps made by hand, for the worked examples of the method cards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from pruneval.methods.base import Shape, Step


def shape(layers: int = 32) -> Shape:
    """LLaVA-1.5-7B, at any depth."""
    return Shape(layers, 4096, 32, 32, 128, vision_layers=24, feature_layer=22, has_cls=True)


class Rows:
    """An attention map given as numbers, (H, n, n) or (H, n) when all rows are alike."""

    def __init__(self, full: Any) -> None:
        full = torch.as_tensor(full, dtype=torch.float64)
        self.full = full if full.ndim == 3 else full[:, None].expand(-1, full.shape[-1], -1)

    def rows(self, index: Any) -> torch.Tensor:
        """The rows asked for, (H, r, n)."""
        return self.full[:, torch.as_tensor(index).reshape(-1)]

    def received(self, index: Any = None) -> torch.Tensor:
        """Their mean, (H, n)."""
        return self.full.mean(1) if index is None else self.rows(index).mean(1)

    def blocks(self, index: Any = None) -> Iterator[torch.Tensor]:
        """The rows asked for, one by one."""
        for row in range(self.full.shape[1]) if index is None else index:
            yield self.rows(row)

    def unrotated(self) -> Rows:
        """The same: the numbers are given."""
        return self


def step(before: int, visual: int, after: int, layer: int = 0, layers: int = 32, **seen: Any) -> Step:
    """A prompt of text, one image and text at boundary `layer`; `seen` replaces fields."""
    n = before + visual + after
    hidden = torch.arange(n, dtype=torch.float64)[:, None]
    fields = {
        "layer": layer,
        "hidden": hidden,
        "origin": torch.arange(n),
        "visual": torch.arange(before, before + visual),
        "total": visual,
        "shape": shape(layers),
        "embeddings": hidden,
        "spans": ((before, before + visual),),
        "generator": lambda: torch.Generator().manual_seed(0),
    }
    return Step(**(fields | seen))


def vision(features: torch.Tensor, keys: torch.Tensor, cls_row: torch.Tensor) -> SimpleNamespace:
    """A tower with CLS at row 0 and the identity as projector; inputs (P + 1, d), (H, P + 1, d_h), (H, P + 1).

    Cells are tokens; they form a square where they can, else one row.
    """
    attention = Rows(cls_row)
    attention.key = keys
    cells = len(features) - 1
    side = math.isqrt(cells)
    return SimpleNamespace(
        tiles=1,
        has_cls=True,
        images=(1,),
        grids=((side, side) if side * side == cells else (1, cells),),
        to_tokens=lambda cells, fill=float("nan"): torch.cat(list(cells)),
        attention=lambda layer: [attention],
        hidden=lambda layer: [features],
        project=lambda hidden: hidden,
    )
