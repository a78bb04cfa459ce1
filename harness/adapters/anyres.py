"""How LLaVA-NeXT and its successors lay images and frames out as tokens.

An image is seen whole (the base tile) and in crops that tile the best-fitting resolution. Its tokens are the cells of
the base tile, then the cells of all crops put together to one grid, without the rows or columns that only show padding,
resampled where the family limits their number, with a newline token after every row. A frame of a video is one tile,
pooled. Newline tokens are placeholders like the others but no cell stands behind them.

A *sheet* is one such grid of tokens. Which resolution fits best and what is padding is asked of transformers' own
functions, so the counts follow the model and the processor to the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from pruneval.harness.adapters.base import Adapter, Encoding, passed, pixels
from pruneval.harness.attention import HeadAttention
from pruneval.methods.views import Passed

Size = tuple[int, int]


@dataclass(frozen=True)
class Sheet:
    """One grid of tokens: the cells of some tiles put together, cut out and perhaps resampled, in raster order.

    Attributes:
        tiles: (rows, columns) of tiles.
        cut: rows and columns of cells that are left, as (top, left, height, width).
        size: (rows, columns) of tokens.
        resample: maps (1, c, height, width) to (1, c, rows, columns), or None when tokens are cells.
        newline: after every row, once at the end, or not at all.
    """

    tiles: Size
    cut: tuple[int, int, int, int]
    size: Size
    resample: Callable[[Tensor], Tensor] | None = None
    newline: Literal["rows", "end", "none"] = "none"

    @property
    def tokens(self) -> int:
        """How many tokens the sheet has, newlines included."""
        rows, columns = self.size
        return rows * columns + {"rows": rows, "end": 1, "none": 0}[self.newline]

    def numbers(self, cells: Tensor, fill: float) -> Tensor:
        """(k, tiles, h, w) numbers on the cells of the sheet's tiles as (k, tokens) numbers; newlines get `fill`."""
        top, left, height, width = self.cut
        grid = cells.unflatten(1, self.tiles).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        grid = grid[:, top : top + height, left : left + width]
        if self.resample is not None:
            grid = self.resample(grid[None])[0]
        return self._with_newlines(grid, fill)

    def nearest(self, cell: Size) -> Tensor:
        """(tokens, 2) tile of the sheet and cell of the tile under the middle of each token; (-1, -1) for newlines.

        Args:
            cell: (h, w) cells of a tile.
        """
        top, left, height, width = self.cut
        row = (torch.arange(self.size[0]) * 2 + 1) * height // (2 * self.size[0]) + top
        column = (torch.arange(self.size[1]) * 2 + 1) * width // (2 * self.size[1]) + left
        tile = (row // cell[0])[:, None] * self.tiles[1] + column // cell[1]
        inside = (row % cell[0])[:, None] * cell[1] + column % cell[1]
        return torch.stack([self._with_newlines(tile, -1), self._with_newlines(inside, -1)], dim=1)

    def places(self) -> Tensor:
        """(tokens, 2) row and column; a newline stands right of its row, or below the last one."""
        rows, columns = self.size
        columns += self.newline == "rows"
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return torch.cat([places, torch.tensor([[rows, 0]])]) if self.newline == "end" else places

    def _with_newlines(self, grid: Tensor, fill: float) -> Tensor:
        if self.newline == "rows":
            grid = nn.functional.pad(grid, (0, 1), value=fill)
        return nn.functional.pad(grid.flatten(-2), (0, int(self.newline == "end")), value=fill)


@dataclass(frozen=True)
class Item:
    """One image or video: its sheets, and where each of its tiles went through the tower (run and row)."""

    sheets: tuple[Sheet, ...]
    where: tuple[tuple[Encoding, int], ...]

    @property
    def tokens(self) -> int:
        """Visual tokens, newlines included."""
        return sum(sheet.tokens for sheet in self.sheets)


class AnyRes(Adapter):
    """What the families have in common. A subclass says how a video is laid out, and what differs for images."""

    tiled: ClassVar[bool] = True
    sheets: ClassVar[bool] = True
    whole_items: ClassVar[bool] = True

    @property
    def has_cls(self) -> bool:  # type: ignore[override]
        return self.config.vision_feature_select_strategy == "default"

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.vision_tower.encoder.layers)

    @property
    def grid(self) -> Size:
        """(rows, columns) of cells in a tile."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        mask = input_ids == self.config.image_token_id
        video = getattr(self.config, "video_token_id", None)
        return mask if video is None else mask | (input_ids == video)

    def cropped(self, encoding: Encoding) -> list[bool]:
        """Whether each image of a run is cut into crops; those that are not are one view and one newline."""
        return [True] * len(encoding.arguments["image_sizes"])

    def resize(self, height: int, width: int, encoding: Encoding) -> Size:
        """The size to which the stitched crops are resampled."""
        return height, width

    def frame(self) -> Sheet:
        """A frame of a video, without newline."""
        raise NotImplementedError

    def video(self, frames: int) -> tuple[Sheet, ...]:
        """The sheets of a video."""
        return (self.frame(),) * frames

    def token_grid(self, kind: str) -> Size:
        return self.frame().size if kind == "video" else self.grid

    def tile_tokens(self, kind: str, cells: int) -> int:
        rows, columns = self.token_grid(kind)
        return rows * columns

    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        items = {kind: self._items(kind, encodings) for kind in ("image", "video")}
        views = []
        for ids in placeholders:
            mine, start = [], 0
            while start < len(ids):
                mine.append(next(items[self.kind(int(ids[start]))]))
                start += mine[-1].tokens
            views.append(SheetView(self, mine, ids.device))
        return views

    def image(self, size: Tensor, cropped: bool, encoding: Encoding) -> tuple[Sheet, ...]:
        """The sheets of an image.

        Args:
            size: (2,) its height and width in pixels.
            cropped: whether it is cut into crops.
            encoding: the run it belongs to.
        """
        height, width = self.grid
        whole = (0, 0, height, width)
        if not cropped:
            return (Sheet((1, 1), whole, self.grid, newline="end"),)
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        tiles = get_anyres_image_grid_shape(size, pinpoints, side)
        stitched = (tiles[0] * height, tiles[1] * width)
        left = unpad_image(torch.arange(stitched[0] * stitched[1]).reshape(1, *stitched), size)[0]
        cut = (*divmod(int(left[0, 0]), stitched[1]), *left.shape)
        shape = self.resize(left.shape[0], left.shape[1], encoding)
        resample = None if shape == tuple(left.shape) else Bilinear(shape)
        return Sheet((1, 1), whole, self.grid), Sheet(tiles, cut, shape, resample, "rows")

    def _items(self, kind: str, encodings: list[Encoding]) -> Iterator[Item]:
        for encoding in encodings:
            if encoding.kind != kind:
                continue
            if kind == "image":
                sizes = encoding.arguments["image_sizes"]
                flags = self.cropped(encoding)
                laid = [self.image(size, flag, encoding) for size, flag in zip(sizes, flags, strict=True)]
            else:
                videos = encoding.arguments["pixel_values_videos"]
                laid = [self.video(videos.shape[1])] * videos.shape[0]
            row = 0
            for sheets, length in zip(laid, encoding.lengths, strict=True):
                tiles = sum(sheet.tiles[0] * sheet.tiles[1] for sheet in sheets)
                item = Item(sheets, tuple((encoding, row + tile) for tile in range(tiles)))
                if item.tokens != length:
                    raise RuntimeError(f"the {kind} is laid out as {item.tokens} tokens, the model made {length}")
                yield item
                row += tiles


@dataclass(frozen=True)
class Bilinear:
    """Resamples (1, c, h, w) to (1, c, *size) as the models do, without aligned corners."""

    size: Size

    def __call__(self, grid: Tensor) -> Tensor:
        return nn.functional.interpolate(grid, self.size, mode="bilinear")


class SheetView:
    """The view of one sample: see `pruneval.methods.views.Sheets`."""

    def __init__(self, adapter: AnyRes, items: Sequence[Item], device: torch.device) -> None:
        """
        Args:
            adapter: the model's adapter.
            items: the sample's images and videos, in prompt order.
            device: where indices go.
        """
        self._device, self._items = device, items
        self._where = [tile for item in items for tile in item.where]
        self._sheets = [sheet for item in items for sheet in item.sheets]
        self.project, self.grid, self.has_cls = adapter.project, adapter.grid, adapter.has_cls
        self.tiles, self.images = len(self._where), tuple(len(item.where) for item in items)
        self.grids = tuple(
            self.grid if sheet.newline == "rows" else sheet.size
            for sheet in self._sheets
            for _ in range(sheet.tiles[0] * sheet.tiles[1])
        )

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile."""
        return [encoding.calls[layer][0].sample(row) for encoding, row in self._where]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P or P + 1, d_v) per tile."""
        return [encoding.hidden[layer][row] for encoding, row in self._where]

    def clips(self) -> list[Tensor]:
        """(F, P) for each video; newlines are in none."""
        clips, start = [], 0
        for item in self._items:
            if item.where[0][0].kind == "video":  # its newline comes last, if there is one
                stop = start + item.tokens - (item.sheets[-1].newline == "end")
                clips.append(torch.arange(start, stop).unflatten(0, (len(item.sheets), -1)))
            start += item.tokens
        return clips

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """(tiles, P) -> (N,) or (tiles, P, k) -> (N, k): put together, cut, resampled or pooled as the model does with
        features; newlines get `fill`.
        """
        stack = torch.stack([torch.as_tensor(part) for part in cells]).unflatten(1, self.grid)
        stack = stack if stack.is_floating_point() else stack.to(torch.get_default_dtype())
        maps = stack[None] if stack.ndim == 3 else stack.movedim(-1, 0)
        tokens = torch.cat([sheet.numbers(maps[:, first:last], fill) for sheet, first, last in self._parts()], dim=1)
        return tokens[0] if stack.ndim == 3 else tokens.T

    def tile_of(self) -> Tensor:
        """(N,) the tile under the middle of each token, -1 for newlines."""
        return self._nearest()[:, 0]

    def cell_of(self) -> Tensor:
        """(N,) the cell of that tile under the middle of each token, -1 for newlines."""
        return self._nearest()[:, 1]

    def is_newline(self) -> Tensor:
        """(N,) which tokens are newlines."""
        return self.tile_of() < 0

    def token_of(self) -> Tensor:
        """(tiles, P) the visual token that is this cell, -1 where there is none: cut away, resampled or pooled."""
        tokens = torch.full((self.tiles, self.grid[0] * self.grid[1]), -1)
        start = 0
        for sheet, first, _ in self._parts():
            tile, cell = sheet.nearest(self.grid).unbind(1)
            if sheet.resample is None:
                real = (tile >= 0).nonzero().squeeze(-1)
                tokens[first + tile[real], cell[real]] = start + real
            start += sheet.tokens
        return tokens.to(self._device)

    def sheet_of(self) -> Tensor:
        """(N,) number of the sheet each token is in; a newline is in the sheet it belongs to."""
        counts = torch.tensor([sheet.tokens for sheet in self._sheets], device=self._device)
        return torch.arange(len(counts), device=self._device).repeat_interleave(counts)

    def place_of(self) -> Tensor:
        """(N, 2) row and column in that sheet; newlines stand right of their row, or below the last one."""
        return torch.cat([sheet.places() for sheet in self._sheets]).to(self._device)

    def pixels(self) -> list[Tensor]:
        """(3, height, width) per tile, in [0, 1]."""
        return pixels(self._where)

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when all of it did."""
        return passed(self._where)

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: the visual tokens of passed cells, -1 where there is none."""
        tokens = self.token_of()
        return [tokens[tile, part.cells.to(tokens.device)] for tile, part in enumerate(self.passed() or [])]

    def _parts(self) -> Iterator[tuple[Sheet, int, int]]:
        """Sheets with the first of their tiles and the one after the last."""
        first = 0
        for sheet in self._sheets:
            last = first + sheet.tiles[0] * sheet.tiles[1]
            yield sheet, first, last
            first = last

    def _nearest(self) -> Tensor:
        parts = []
        for sheet, first, _ in self._parts():
            near = sheet.nearest(self.grid)
            parts.append(near + torch.tensor([first, 0]) * (near[:, :1] >= 0))
        return torch.cat(parts).to(self._device)
