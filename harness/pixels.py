"""Images scaled down before the vision tower, so that it sees fewer patches: see `Method.at_pixels`.

Pixels are scaled as processors do it, bicubic with antialiasing, but after normalisation. Towers with learned positions
interpolate them, as transformers does on request. What comes out fills the places of all tokens of the tile, each with
the nearest one, so that projector, newlines, pooling and placeholders find the counts they expect; the method drops
the copies at the input of the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pruneval.harness.adapters import Adapter

Size = tuple[int, int]
Scale = Callable[[Size], Size]


def see(
    adapter: Adapter, kind: str, scale: Scale, forward: Callable[..., Any], pixels: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The output of a vision tower that has seen its tiles scaled down.

    Args:
        adapter: the model's adapter.
        kind: "image" or "video".
        scale: grid of a tile's tokens -> the grid it is to have.
        forward: of the tower.
        pixels: (tiles, c, H, W), or (patches, numbers of a patch) for towers that pack tiles of many sizes.
        args, kwargs: the other arguments of `forward`.
    """
    if adapter.patching is None:
        return _tiles(adapter, adapter.token_grid(kind), scale, forward, pixels, *args, **kwargs)
    return _patches(*adapter.patching, scale, forward, pixels, *args, **kwargs)


def sources(cells: int, tokens: int, few: int, small: int) -> Tensor:
    """(cells,) which of the `few` cells left along a side each cell takes, where `tokens` tokens became `small`.

    A token takes all cells of the nearest token that is left, each from its own place in it.
    """
    place = (torch.arange(cells, dtype=torch.float64) + 0.5) * tokens / cells
    token = place.floor()
    nearest = ((token + 0.5) * small / tokens).floor()
    return ((nearest + place - token) * few / small).long()


def _tiles(
    adapter: Adapter, tokens: Size, scale: Scale, forward: Callable[..., Any], pixels: Tensor, *args: Any, **kwargs: Any
) -> Any:
    small, cells = scale(tokens), adapter.grid
    if small == tokens:
        return forward(pixels, *args, **kwargs)
    few = tuple(max(1, round(part * of / whole)) for part, of, whole in zip(small, cells, tokens, strict=True))
    if "interpolate_pos_encoding" in inspect.signature(forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    out = forward(_scaled(pixels, few[0] * (pixels.shape[-2] // cells[0]), few[1] * (pixels.shape[-1] // cells[1])),
                  *args, **kwargs)  # fmt: skip
    rows, columns = (sources(*side) for side in zip(cells, tokens, few, small, strict=True))
    index = (rows[:, None] * few[1] + columns).flatten().to(pixels.device)
    cls = out.last_hidden_state.shape[1] - few[0] * few[1]
    index = torch.cat([torch.arange(cls, device=index.device), index + cls])
    out.last_hidden_state = out.last_hidden_state[:, index]
    if out.hidden_states is not None:
        # those nobody asked for are None
        out.hidden_states = tuple(hidden if hidden is None else hidden[:, index] for hidden in out.hidden_states)
    return out


def _patches(
    merge: int, temporal: int, side: int, scale: Scale, forward: Callable[..., Any], pixels: Tensor, grid_thw: Tensor,
    **kwargs: Any,
) -> Any:  # fmt: skip
    small, sizes, index, first = [], [], [], 0
    lengths = grid_thw.prod(-1).tolist()
    for (time, height, width), mine in zip(grid_thw.tolist(), pixels.split(lengths), strict=True):
        tokens = (height // merge, width // merge)
        rows, columns = scale(tokens)
        images = _images(mine, (time, *tokens), merge, temporal, side)
        images = _scaled(images, rows * merge * side, columns * merge * side)
        small.append(_as_patches(images, (time, rows, columns), merge, temporal, side))
        sizes.append((time, rows * merge, columns * merge))
        nearest = sources(tokens[0], tokens[0], rows, rows)[:, None] * columns
        nearest = nearest + sources(tokens[1], tokens[1], columns, columns)
        index.append((first + torch.arange(time)[:, None, None] * rows * columns + nearest).flatten())
        first += time * rows * columns
    if sizes == [tuple(size) for size in grid_thw.tolist()]:
        return forward(pixels, grid_thw=grid_thw, **kwargs)
    out, places = forward(torch.cat(small), grid_thw=grid_thw.new_tensor(sizes), **kwargs), torch.cat(index)
    out.pooler_output = out.pooler_output[places.to(out.pooler_output.device)]
    deep = getattr(out, "deepstack_features", None)
    if deep is not None:
        out.deepstack_features = [features[places.to(features.device)] for features in deep]
    return out


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    """(..., c, height, width) images."""
    flat = images.flatten(0, -4).to(torch.promote_types(torch.float32, images.dtype))
    flat = torch.nn.functional.interpolate(flat, (height, width), mode="bicubic", antialias=True)
    return flat.to(images.dtype).reshape(*images.shape[:-2], height, width)


def _images(patches: Tensor, size: tuple[int, int, int], merge: int, temporal: int, side: int) -> Tensor:
    """(frames, c, H, W) of patches in the processor's order; `size` in slices, rows and columns of tokens."""
    time, rows, columns = size
    parts = patches.reshape(time, rows, columns, merge, merge, -1, temporal, side, side)
    parts = parts.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return parts.reshape(time * temporal, -1, rows * merge * side, columns * merge * side)


def _as_patches(images: Tensor, size: tuple[int, int, int], merge: int, temporal: int, side: int) -> Tensor:
    """The way back."""
    time, rows, columns = size
    parts = images.reshape(time, temporal, -1, rows, merge, side, columns, merge, side)
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns * merge * merge, -1)
