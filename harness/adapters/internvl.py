"""InternVL2 to 3: InternViT with CLS sees tiles of 448 x 448 and then a thumbnail; a video's frames are one tile each.

Pixel shuffle puts the 2 x 2 cells of a block side by side, (2r, 2c), (2r, 2c + 1), (2r + 1, 2c), (2r + 1, 2c + 1), and
the projector makes one token of them: a tile has four times as many cells as tokens. Its tokens are in raster order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneval.harness.adapters.base import Adapter, Encoding, passed, pixels
from pruneval.harness.attention import HeadAttention
from pruneval.methods.views import Passed


class InternVL(Adapter):
    """`InternVLForConditionalGeneration` with Qwen2, Llama (InternLM2) or Phi-3."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    has_cls: ClassVar[bool] = True
    tiled: ClassVar[bool] = True

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.vision_tower.encoder.layer)

    def vision_attention(self, layer: int, tower: int = 0) -> nn.Module:
        return self.towers[tower][layer].attention

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of cells in a tile."""
        vision = self.config.vision_config
        return vision.image_size[0] // vision.patch_size[0], vision.image_size[1] // vision.patch_size[1]

    @property
    def members(self) -> Tensor:
        """(t, b) cells of each of a tile's tokens, in the order in which pixel shuffle puts them side by side."""
        (rows, columns), side = self.grid, int(1 / self.config.downsample_ratio)
        cells = torch.arange(rows * columns).unflatten(0, (rows // side, side, columns // side, side))
        return cells.transpose(1, 2).reshape(-1, side * side)

    @property
    def merge(self) -> int:  # type: ignore[override]
        """Cells per token."""
        return self.members.shape[1]

    def attend(self, layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return layer.lambda_1 * layer.attention(layer.layernorm_before(hidden), attention_mask=mask)[0] + hidden

    def feed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(hidden))) + hidden

    def cell_blocks(self, cells: int) -> Tensor:
        members = self.members
        blocks = torch.empty(members.numel(), dtype=torch.long)
        blocks[members] = torch.arange(len(members))[:, None].expand_as(members)
        return blocks

    def project(self, hidden: Tensor) -> Tensor:
        """Blocks of tower outputs as language-model inputs.

        Args:
            hidden: (m, b, d_v) or (m, b * d_v), each block's cells in the order of `members`.

        Returns:
            (m, d).
        """
        return self.model.model.multi_modal_projector(hidden.flatten(1))

    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        tiles = iter([(encoding, row) for encoding in encodings for row in range(len(encoding.lengths))])
        per_tile = len(self.members)
        return [TileView(self, list(itertools.islice(tiles, len(ids) // per_tile))) for ids in placeholders]

    def placed(self, view: TileView, spans: tuple[tuple[int, int], ...]) -> TileView:
        view.images = tuple((stop - start) // len(view.members) for start, stop in spans)
        return view


class TileView:
    """The view of one sample: see `pruneval.methods.base.Vision`.

    `project` takes blocks of cells, as `blocks` makes them. An image is what stands between a start and an end token; a
    frame is an image of one tile.
    """

    has_cls = True
    images: tuple[int, ...] = ()

    def __init__(self, adapter: InternVL, where: list[tuple[Encoding, int]]) -> None:
        """
        Args:
            adapter: the model's adapter.
            where: the run of the tower each tile of the sample went through, and its row there.
        """
        self._where = where
        self.project, self.members = adapter.project, adapter.members
        self.tiles, self.grid = len(where), adapter.grid
        side = math.isqrt(self.members.shape[1])
        self.grids = ((self.grid[0] // side, self.grid[1] // side),) * self.tiles

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile."""
        return [encoding.calls[layer][0].sample(row) for encoding, row in self._where]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P + 1, d_v) per tile."""
        return [encoding.hidden[layer][row] for encoding, row in self._where]

    def clips(self) -> list[Tensor]:
        """(F, P) for each row of two or more images of one tile, which is how a video's frames come to the model."""
        clips, first = [], 0
        for single, run in itertools.groupby(self.images, lambda tiles: tiles == 1):
            tiles = list(run)
            if single and len(tiles) > 1:
                clips.append(torch.arange(first, first + len(tiles)))
            first += sum(tiles)
        per_tile = len(self.members)
        return [clip[:, None] * per_tile + torch.arange(per_tile) for clip in clips]

    def blocks(self, cells: Tensor) -> Tensor:
        """(P, ...) of a tile's cells as (t, b, ...) of its tokens' blocks."""
        return cells[self.members.to(cells.device)]

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """(tiles, P) -> (N,), or (tiles, P, k) -> (N, k): a token gets the mean over its block; every token has one."""
        return torch.cat([self.blocks(torch.as_tensor(tile)).mean(1) for tile in cells])

    def pixels(self) -> list[Tensor]:
        """(3, height, width) per tile, in [0, 1]."""
        return pixels(self._where)

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when all of it did."""
        return passed(self._where)

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: the visual tokens of passed cells, in raster order."""
        tokens, per_tile = [], len(self.members)
        for tile, part in enumerate(self.passed() or []):
            there = torch.zeros(part.total, dtype=torch.bool, device=part.cells.device)
            there[part.cells] = True
            tokens.append(tile * per_tile + there[self.members[:, 0].to(there.device)].nonzero().squeeze(-1))
        return tokens
