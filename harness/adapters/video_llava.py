"""Video-LLaVA: one CLIP tower for images and one for videos, a projector for both; a tile is an image or a frame.

An image becomes its cells in raster order. A frame of a video becomes its CLS token and then its cells: the CLS is a
visual token like any other, but it stands for no cell, so numbers on cells say nothing about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneval.harness.adapters.base import Adapter, Encoding, passed, pixels
from pruneval.harness.attention import HeadAttention
from pruneval.methods.views import Passed


class VideoLlava(Adapter):
    """`VideoLlavaForConditionalGeneration`; tower 0 reads images, tower 1 videos."""

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    has_cls: ClassVar[bool] = True
    tiled: ClassVar[bool] = True
    whole_items: ClassVar[bool] = True

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.model.image_tower

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.vision_tower.encoder.layers)

    @property
    def towers(self) -> list[list[nn.Module]]:
        return [self.vision_layers, list(self.model.model.video_tower.encoder.layers)]

    @property
    def eyes(self) -> list[nn.Module]:
        return [self.model.model.image_tower, self.model.model.video_tower]

    @property
    def tower_modules(self) -> list[nn.Module]:
        return [self.vision_tower, self.model.model.video_tower]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of cells in a tile."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    def spans(
        self, runs: list[tuple[tuple[int, int], ...]], placeholders: list[Tensor], encodings: list[Encoding]
    ) -> list[tuple[tuple[int, int], ...]]:
        whole = []
        for encoding in encodings:  # a video's lengths are those of its frames
            lengths = tuple(sum(encoding.lengths[row] for _, row in item) for item in _items([encoding]))
            whole.append(dataclasses.replace(encoding, lengths=lengths))
        return super().spans(runs, placeholders, whole)

    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        items = {kind: _items([each for each in encodings if each.kind == kind]) for kind in ("image", "video")}
        views = []
        for ids in placeholders:
            mine, start = [], 0
            while start < len(ids):
                item = next(items[self.kind(int(ids[start]))])
                mine.append(item)
                start += sum(encoding.lengths[row] for encoding, row in item)
            views.append(FrameView(self, mine))
        return views


def _items(encodings: list[Encoding]) -> Iterator[list[tuple[Encoding, int]]]:
    """The images or videos of these runs, in order: the run and row of each of their tiles."""
    for encoding in encodings:
        videos = encoding.arguments.get("pixel_values_videos")
        tiles = 1 if videos is None else videos.shape[1]
        for first in range(0, len(encoding.lengths), tiles):
            yield [(encoding, row) for row in range(first, first + tiles)]


class FrameView:
    """The view of one sample: see `pruneval.methods.base.Vision`."""

    has_cls = True

    def __init__(self, adapter: VideoLlava, items: Sequence[list[tuple[Encoding, int]]]) -> None:
        """
        Args:
            adapter: the model's adapter.
            items: the sample's images and videos, in prompt order; each the runs and rows of its tiles.
        """
        self._items = items
        self._where = [tile for item in items for tile in item]
        self.project, self.grid = adapter.project, adapter.grid
        self.tiles, self.images = len(self._where), tuple(len(item) for item in items)
        self.grids = (self.grid,) * self.tiles

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile; row 0 is the CLS token."""
        return [encoding.calls[layer][0].sample(row) for encoding, row in self._where]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P + 1, d_v) per tile."""
        return [encoding.hidden[layer][row] for encoding, row in self._where]

    def clips(self) -> list[Tensor]:
        """(F, P) for each video; CLS tokens are in none."""
        clips, start, cells = [], 0, self.grid[0] * self.grid[1]
        for item in self._items:
            frames = []
            for encoding, row in item:
                start += encoding.lengths[row]
                frames.append(torch.arange(start - cells, start))
            if item[0][0].kind == "video":
                clips.append(torch.stack(frames))
        return clips

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """(tiles, P) -> (N,) or (tiles, P, k) -> (N, k): a frame's CLS token gets `fill`, cells stay as they are."""
        parts = []
        for part, (encoding, row) in zip(cells, self._where, strict=True):
            extra = encoding.lengths[row] - len(part)
            parts.append(torch.nn.functional.pad(part, (*(0, 0) * (part.ndim - 1), extra, 0), value=fill))
        return torch.cat(parts)

    def pixels(self) -> list[Tensor]:
        """(3, height, width) per tile, in [0, 1]."""
        return pixels(self._where)

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when all of it did."""
        return passed(self._where)

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: the visual tokens of passed cells; a frame's CLS token is none of them."""
        tokens, stop = [], 0
        for part, (encoding, row) in zip(self.passed() or [], self._where, strict=False):
            stop += encoding.lengths[row]
            tokens.append(stop - part.total + part.cells)
        return tokens
