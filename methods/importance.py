"""VFlowOpt's map of importance: attention from the cells that are trusted, and the entropy of what is under a cell."""

from __future__ import annotations

import math

from pruneval.methods.step import Step, torch
from pruneval.methods.views import Attention


def importance(step: Step, trust: float, alpha: float, code: bool) -> torch.Tensor:
    """(N,) importance of the visual tokens; 1 where no cell is (newlines, CLS tokens of video frames).

    Args:
        step: the boundary at layer 0.
        trust: how many times the mean a cell receives that is trusted.
        alpha: weight of the entropy, whose softmax is taken over a tile; 0 needs no pixels.
        code: as the released code has it: the mean over trusted cells instead of the sum, and bytes that wrap.
    """
    view, cls = step.vision, int(step.shape.has_cls)
    maps = [context(attention, cls, trust, code) for attention in view.attention(step.shape.feature_layer)]
    if alpha:
        maps = [
            one + alpha * entropy(pixels, len(one), code).softmax(0).to(one)
            for one, pixels in zip(maps, view.pixels(), strict=True)
        ]
    return view.to_tokens(maps, fill=1.0)


def context(attention: Attention, cls: int, trust: float, mean: bool) -> torch.Tensor:
    """(P,) attention of a tile's cells from the trusted ones, summed or in the mean; received if none is trusted."""
    cells = torch.arange(cls, attention.key.shape[1], device=attention.key.device)
    received = attention.received(cells).mean(0)[cls:]
    trusted = cells[received > trust * received.mean()]
    if not len(trusted):
        return received
    found = attention.received(trusted).mean(0)[cls:]
    return found if mean else found * len(trusted)


def entropy(pixels: torch.Tensor, cells: int, wrapped: bool = False) -> torch.Tensor:
    """(P,) Shannon entropy, in bits, of the grey values (256 bins) of a tile's cells, row by row.

    Args:
        pixels: (3, height, width) in [0, 1].
        cells: P; the tile has as many rows as columns of them.
        wrapped: whether channels are bytes of 255 (2x - 1), where negative ones wrap.
    """
    rows = math.isqrt(cells)
    channels = ((2 * pixels.float() - 1) * 255).long() % 256 if wrapped else pixels.float() * 255
    grey = channels.float().mean(0).round().long()
    side, wide = grey.shape[0] // rows, grey.shape[1] // rows
    patches = grey[: rows * side, : rows * wide].unflatten(0, (rows, side)).unflatten(2, (rows, wide))
    patches = patches.transpose(1, 2).reshape(cells, side * wide)
    counts = torch.zeros(cells, 256, device=grey.device).scatter_add_(1, patches, torch.ones_like(patches).float())
    return torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1) / math.log(2)
