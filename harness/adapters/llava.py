"""LLaVA-1.5: one CLIP tile of 24 x 24 cells per image, CLS dropped, projected one to one, in raster order."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneval.harness.adapters.base import Adapter
from pruneval.harness.attention import HeadAttention


class Llava(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        return self.config.vision_feature_select_strategy == "default"

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.vision_tower.encoder.layers)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of cells in a tile, which is an image."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    def visions(self, counts: list[int], calls: dict[int, list[Any]], hidden: dict[int, Tensor]) -> list[Any]:
        per_image = self.grid[0] * self.grid[1]
        views, first = [], 0
        for count in counts:
            tiles = count // per_image
            views.append(TileView(self, range(first, first + tiles), calls, hidden))
            first += tiles
        return views


class TileView:
    """The view of one sample: see `pruneval.methods.base.Vision`."""

    def __init__(self, adapter: Llava, rows: range, calls: dict[int, list[Any]], hidden: dict[int, Tensor]) -> None:
        """
        Args:
            adapter: the model's adapter.
            rows: the sample's rows in the tower's batch, one per tile.
            calls: recorded attention calls, by layer; the tower is called once.
            hidden: (all tiles, P or P + 1, d_v) outputs, by layer.
        """
        self._rows, self._calls, self._hidden = rows, calls, hidden
        self.project = adapter.project
        self.tiles, self.has_cls, self.images, self.grid = len(rows), adapter.has_cls, (1,) * len(rows), adapter.grid

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile."""
        return [self._calls[layer][0].sample(row) for row in self._rows]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P or P + 1, d_v) per tile."""
        return [self._hidden[layer][row] for row in self._rows]

    def to_tokens(self, cells: Tensor, fill: float = float("nan")) -> Tensor:
        """(tiles, P) -> (N,): cells and tokens are the same, in the same order."""
        return torch.as_tensor(cells).reshape(-1)
