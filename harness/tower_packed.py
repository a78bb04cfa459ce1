"""Tokens that leave inside a vision tower whose tiles are packed into one row (Qwen-VL): its segments get shorter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruneval.harness.attention import HeadAttention
from pruneval.methods.base import EncodeStep, MethodError
from pruneval.methods.views import Passed

if TYPE_CHECKING:
    from pruneval.harness.tower import Towers


class Packed:
    """One encoding of tiles packed into one row, (sum of P, d_v), each of which attends within itself or its windows.

    Windows may permute a tile's blocks: at encode steps cells are numbered in the tower's order, in `passed` in the
    processor's.
    """

    def __init__(self, towers: Towers, order: Tensor, starts: list[int]) -> None:
        self.towers, self.order, self.starts = towers, order, starts
        self.passed: tuple[Passed, ...] = ()
        self.memory: list[dict[str, Any]] = [{} for _ in starts[1:]]
        self.entered: list[list[int]] = [[] for _ in starts[1:]]
        self.places = torch.arange(starts[-1])  # of the cells still there
        self.cells = self._tiles()

    def layer(self, tower: int, index: int, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> Tensor:
        """The output of one layer."""
        self.places = self.places.to(hidden.device)
        for entered, cells in zip(self.entered, self.cells, strict=True):
            entered.append(len(cells))
        ends = kwargs["cu_seqlens"]
        segment = torch.bucketize(self.places, ends[1:].to(self.places), right=True)
        if len(self.places) < self.starts[-1]:
            kwargs = kwargs | self._arguments(segment, kwargs)
        hidden = forward(hidden, **kwargs)
        if index in self.towers.places:
            hidden = self._reduce(tower, index, hidden, segment)
        if index == len(self.towers.adapter.towers[tower]) - 1:
            hidden = self._leave(hidden)
        return hidden

    def projected(self, features: Tensor) -> None:
        """The projector has got all cells."""

    def _tiles(self) -> list[Tensor]:
        """The places of each tile."""
        edges = torch.searchsorted(self.places, torch.tensor(self.starts, device=self.places.device))
        return list(self.places.split(edges.diff().tolist()))

    def _arguments(self, segment: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A layer's arguments for what is left of its segments."""
        lengths = torch.bincount(segment)
        lengths = lengths[lengths > 0]
        longest = kwargs.get("max_seqlen")
        if longest is not None:
            longest = lengths.max().to(longest) if isinstance(longest, Tensor) else int(lengths.max())
        return {
            "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).to(kwargs["cu_seqlens"]),
            "max_seqlen": longest,
            "position_embeddings": tuple(part[self.places] for part in kwargs["position_embeddings"]),
        }

    def _reduce(self, tower: int, index: int, hidden: Tensor, segment: Tensor) -> Tensor:
        calls = self.towers.recorded(tower, index)  # one per segment, or one in all
        query, key, value = (
            torch.cat([getattr(call, name)[0] for call in calls], dim=1) for name in ("query", "key", "value")
        )
        kept, first, shape = [], 0, self.towers.session.shape
        for row, cells in enumerate(self.cells):
            mine, start, stop = slice(first, first + len(cells)), self.starts[row], self.starts[row + 1]
            first = mine.stop
            attention = HeadAttention(
                query[:, mine], key[:, mine], value[:, mine], calls[0].scaling, causal=False, window=segment[mine]
            )
            step = EncodeStep(
                layer=index,
                hidden=hidden[mine],
                cells=cells - start,
                blocks=(cells - start) // shape.merge,
                attention=attention,
                total=stop - start,
                tokens=(stop - start) // shape.merge,
                shape=shape,
                memory=self.memory[row],
            )
            result = self.towers.ask(step)
            if result is not None and (result.slots is not None or result.weights is not None):
                raise MethodError(f"{self.towers.method.card.name}: a packed vision tower can't merge tokens")
            keep = torch.arange(len(cells)) if result is None else result.keep.sort().values
            kept.append(mine.start + keep.to(hidden.device))
        chosen = torch.cat(kept)
        if len(chosen) == len(self.places):
            return hidden
        self.places = self.places[chosen]
        self.cells = self._tiles()
        return hidden[chosen]

    def _leave(self, hidden: Tensor) -> Tensor:
        """What leaves the tower: every cell in its place."""
        order, passed = self.order.to(self.places.device), []
        for cells, entered, start, stop in zip(self.cells, self.entered, self.starts, self.starts[1:], strict=False):
            passed.append(Passed(order[cells].sort().values - start, stop - start, tuple(entered)))
        self.passed = tuple(passed)
        return hidden.new_zeros(self.starts[-1], hidden.shape[-1]).index_copy_(0, self.places, hidden)
