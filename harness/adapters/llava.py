"""LLaVA-1.5: one CLIP tile of 24 x 24 cells per image, CLS dropped, projected one to one, in raster order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneval.harness.adapters.base import Adapter, Encoding, passed, pixels
from pruneval.harness.attention import HeadAttention
from pruneval.methods.views import Passed


class Llava(Adapter):
    """`LlavaForConditionalGeneration` with a CLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    whole_items: ClassVar[bool] = True

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

    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        tiles = iter([(encoding, row) for encoding in encodings for row in range(len(encoding.lengths))])
        per_image = self.grid[0] * self.grid[1]
        return [TileView(self, list(itertools.islice(tiles, len(ids) // per_image))) for ids in placeholders]


class TileView:
    """The view of one sample: see `pruneval.methods.base.Vision`."""

    def __init__(self, adapter: Llava, where: list[tuple[Encoding, int]]) -> None:
        """
        Args:
            adapter: the model's adapter.
            where: the run of the tower each tile of the sample went through, and its row there.
        """
        self._where = where
        self.project = adapter.project
        self.tiles, self.has_cls, self.images, self.grid = len(where), adapter.has_cls, (1,) * len(where), adapter.grid
        self.grids = (self.grid,) * self.tiles

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile."""
        return [encoding.calls[layer][0].sample(row) for encoding, row in self._where]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P or P + 1, d_v) per tile."""
        return [encoding.hidden[layer][row] for encoding, row in self._where]

    def clips(self) -> list[Tensor]:
        """None: the family sees images only."""
        return []

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """(tiles, P) -> (N,) or (tiles, P, k) -> (N, k): cells and tokens are the same, in the same order."""
        return torch.cat([torch.as_tensor(part) for part in cells])

    def pixels(self) -> list[Tensor]:
        """(3, height, width) per tile, in [0, 1]."""
        return pixels(self._where)

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when all of it did."""
        return passed(self._where)

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: the visual tokens of passed cells."""
        return [tile * part.total + part.cells for tile, part in enumerate(self.passed() or [])]
