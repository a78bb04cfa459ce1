"""Qwen2.5-VL and Qwen3-VL: images of any size, a merger that makes one token of 2 x 2 patches, three-row ids, videos.

A tile is an image or one temporal slice of a video (the tower's attention never leaves it), a cell is a patch. Cells
come as the processor makes them and the merger needs them: token by token in raster order of the merged grid, four
cells per token. Qwen2.5-VL permutes them into windows inside the tower; that is undone here, and a windowed layer's
attention is zero outside the row's window.

Positions: under "original" a survivor keeps its three ids (time, row, column) and decoding goes on where the un-pruned
prompt ends. Under "compact" all three rows count 0..n-1, which is what the text model itself does with embeddings that
come without ids: the grid is given up.

Qwen3-VL adds features of middle vision layers to the hidden states of visual tokens behind its first decoder layers.
They follow their tokens: a survivor gets its own (a merged token those of the token whose place it takes), tokens of a
method's making with origins of their own get none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from pruneval.harness.adapters.base import Adapter, Encoding, passed
from pruneval.harness.attention import HeadAttention
from pruneval.harness.layout import Layout
from pruneval.harness.override import override
from pruneval.methods.views import Passed


class QwenVL(Adapter):
    """`Qwen2_5_VLForConditionalGeneration` and `Qwen3VLForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen3_vl")
    tiled: ClassVar[bool] = True
    whole_items: ClassVar[bool] = True

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    # The vision side

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.model.visual

    @property
    def vision_layers(self) -> list[nn.Module]:
        return list(self.vision_tower.blocks)

    def vision_attention(self, layer: int, tower: int = 0) -> nn.Module:
        return self.towers[tower][layer].attn

    @property
    def feature_layer(self) -> int:
        return len(self.vision_layers) - 1

    @property
    def merge(self) -> int:  # type: ignore[override]
        """Cells per token."""
        return self.config.vision_config.spatial_merge_size**2

    @property
    def eyes(self) -> list[nn.Module]:
        return []

    @property
    def patching(self) -> tuple[int, int, int]:
        vision = self.config.vision_config
        return vision.spatial_merge_size, vision.temporal_patch_size, vision.patch_size

    @property
    def projector(self) -> nn.Module:
        return self.vision_tower.merger

    def encoder_reason(self) -> str:
        deep = getattr(self.config.vision_config, "deepstack_visual_indexes", None)
        return "this model also uses features of middle vision layers, which need every token" if deep else ""

    def packing(self, kind: str, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
        sizes: Tensor = arguments[f"{kind}_grid_thw"]
        lengths = [height * width for slices, height, width in sizes.tolist() for _ in range(slices)]
        starts = [0, *itertools.accumulate(lengths)]
        order = torch.arange(starts[-1])
        if hasattr(self.config.vision_config, "window_size"):
            config = self.config.vision_config
            windows = get_vision_window_index(sizes, config.spatial_merge_size, config.window_size, config.patch_size)
            order = order.unflatten(0, (-1, self.merge))[windows[0].to(order.device)].flatten()
        return order, starts

    def project(self, hidden: Tensor) -> Tensor:
        """Blocks of tower outputs as language-model inputs.

        Args:
            hidden: (m, 4, d_v), (m, 4 * d_v) or (4 m, d_v), the cells of each block in the order of the tiles.

        Returns:
            (m, d).
        """
        return self.vision_tower.merger(hidden.reshape(-1, self.config.vision_config.hidden_size))

    def windowed(self, layer: int) -> bool:
        """Whether the layer's attention is confined to windows."""
        full = getattr(self.config.vision_config, "fullatt_block_indexes", None)
        return full is not None and layer not in full

    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        runs: dict[str, list[Run]] = {"image": [], "video": []}
        for encoding in encodings:
            runs[encoding.kind].append(Run(self, encoding))
        items = {kind: itertools.chain.from_iterable(run.items() for run in mine) for kind, mine in runs.items()}
        views = []
        for ids in placeholders:
            mine, start = [], 0
            while start < len(ids):
                item = next(items[self.kind(int(ids[start]))])
                mine.append(item)
                start += item.tokens
            views.append(GridView(self, mine))
        return views

    # Between decoder layers

    def attach(self, layouts: Callable[[], tuple[Layout, Layout] | None], stack: ExitStack) -> None:
        model = self.text_model
        original = getattr(model, "_deepstack_process", None)
        if original is None:
            return

        @functools.wraps(original)
        def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            now = layouts()
            if now is None:
                return original(hidden_states, visual_pos_masks, visual_embeds)
            return original(hidden_states, *_follow(*now, visual_pos_masks, visual_embeds))

        override(model, "_deepstack_process", process, stack)


def _follow(prompt: Layout, layout: Layout, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Which places of a reduced stream get features of visual tokens, and those features.

    Args:
        prompt: the un-pruned layout.
        layout: the reduced one.
        mask: (B, S) visual tokens of the un-pruned, left-padded prompt.
        features: (all visual tokens of the batch, d), sample by sample.

    Returns:
        (B, width) places, and (places, d) their features.
    """
    number = (mask.flatten().cumsum(0) - 1).reshape(mask.shape)  # row of `features` of each visual token
    places, rows = torch.zeros(len(layout.samples), layout.width, dtype=torch.bool, device=mask.device), []
    for sample, (before, after) in enumerate(zip(prompt.samples, layout.samples, strict=True)):
        own = after.visual & (after.origin < len(before))
        places[sample, layout.width - len(after) :] = own.to(mask.device)
        rows.append(number[sample, mask.shape[1] - len(before) + after.origin[own].to(mask.device)])
    return places, features[torch.cat(rows).to(features.device)]


class Run:
    """One run of the vision tower, in the order of the processor."""

    def __init__(self, adapter: QwenVL, encoding: Encoding) -> None:
        self.adapter, self.encoding = adapter, encoding
        self.sizes: Tensor = encoding.arguments[f"{encoding.kind}_grid_thw"]
        self._calls: dict[int, tuple[Tensor, Tensor, Tensor, float, Tensor | None]] = {}
        self._hidden: dict[int, Tensor] = {}

    def items(self) -> Iterator[Item]:
        """The images or videos of the run, in order."""
        start, side = 0, self.adapter.config.vision_config.spatial_merge_size
        for slices, height, width in self.sizes.tolist():
            tiles = [slice(start + t * height * width, start + (t + 1) * height * width) for t in range(slices)]
            yield Item(self, tiles, (height // side, width // side))
            start += slices * height * width

    def attention(self, layer: int, tile: slice) -> HeadAttention:
        """The attention of one tile."""
        if layer not in self._calls:
            self._calls[layer] = self._call(layer)
        query, key, value, scaling, window = self._calls[layer]
        window = None if window is None else window[tile]
        return HeadAttention(query[:, tile], key[:, tile], value[:, tile], scaling, causal=False, window=window)

    def hidden(self, layer: int, tile: slice) -> Tensor:
        """The output of a layer for one tile, (P, d_v)."""
        if layer not in self._hidden:
            self._hidden[layer] = self._ordered(self.encoding.hidden[layer])
        return self._hidden[layer][tile]

    def _call(self, layer: int) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
        calls = self.encoding.calls[layer]  # one per segment, or one in all
        query, key, value = (
            self._ordered(torch.cat([getattr(call, name)[0] for call in calls], dim=1).transpose(0, 1)).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        window = None
        if self.adapter.windowed(layer):
            lengths = self._windows[1].diff().long()
            window = self._ordered(torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths))
        return query, key, value, calls[0].scaling, None if window is None else window.to(query.device)

    def _ordered(self, cells: Tensor) -> Tensor:
        """(P, ...) cells as the tower had them, in the processor's order."""
        if not hasattr(self.adapter.config.vision_config, "window_size"):
            return cells
        back = self._windows[0].argsort().to(cells.device)
        return cells.unflatten(0, (-1, self.adapter.merge))[back].flatten(0, 1)

    @functools.cached_property
    def _windows(self) -> tuple[Tensor, Tensor]:
        config = self.adapter.config.vision_config
        return get_vision_window_index(self.sizes, config.spatial_merge_size, config.window_size, config.patch_size)


class Item:
    """An image or a video of a run: its tiles (places in the run) and their common grid of tokens."""

    def __init__(self, run: Run, tiles: list[slice], grid: tuple[int, int]) -> None:
        self.run, self.tiles, self.grid = run, tiles, grid
        self.tokens = len(tiles) * grid[0] * grid[1]


class GridView:
    """The view of one sample: see `pruneval.methods.base.Vision`. Cells come token by token, so they have no `grid`."""

    has_cls = False

    def __init__(self, adapter: QwenVL, items: Sequence[Item]) -> None:
        """
        Args:
            adapter: the model's adapter.
            items: the sample's images and videos, in prompt order.
        """
        self._items = items
        self._where = [(item.run, tile) for item in items for tile in item.tiles]
        self.project, self.merge = adapter.project, adapter.merge
        self.tiles, self.images = len(self._where), tuple(len(item.tiles) for item in items)
        self.grids = tuple(item.grid for item in items for _ in item.tiles)

    def attention(self, layer: int) -> list[HeadAttention]:
        """Attention of a vision layer, one per tile, between cells."""
        return [run.attention(layer, tile) for run, tile in self._where]

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P, d_v) per tile, four cells per token."""
        return [run.hidden(layer, tile) for run, tile in self._where]

    def clips(self) -> list[Tensor]:
        """(T, P) for each video of T temporal slices, each of which shows two frames."""
        clips, start = [], 0
        for item in self._items:
            if item.run.encoding.kind == "video":
                clips.append(torch.arange(start, start + item.tokens).unflatten(0, (len(item.tiles), -1)))
            start += item.tokens
        return clips

    def blocks(self, cells: Tensor) -> Tensor:
        """(P, ...) of a tile's cells as (t, 4, ...) of its tokens' blocks."""
        return cells.unflatten(0, (-1, self.merge))

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """One (P,) per tile -> (N,), or (P, k) -> (N, k): the mean over a token's four cells."""
        return torch.cat([self.blocks(torch.as_tensor(part)).mean(1) for part in cells])

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when all of it did."""
        places = {id(run): [tile for item in run.items() for tile in item.tiles] for run, _ in self._where}
        return passed([(run.encoding, places[id(run)].index(tile)) for run, tile in self._where])

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: the visual tokens of passed cells, in raster order."""
        tokens, start = [], 0
        for part in self.passed() or []:
            tokens.append(start + part.cells[:: self.merge] // self.merge)
            start += part.total // self.merge
        return tokens
