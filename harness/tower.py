"""Tokens that leave inside the vision tower: fewer rows enter its next layers, under any kernel.

Tiles of a batch may keep different counts: they are padded on the right and masked. From the first reduction on the
two halves of a layer (attention, feed-forward) are run here with the layer's own modules; before it layers get what the
tower passed them. A tower whose tiles are packed into one row (Qwen-VL) needs no padding: see
`pruneval.harness.tower_packed`.

What the model does with the features afterwards (projector, newlines, pooling) expects all of them, so they are put
back in their places with zeros between: behind the projector where that takes cells one by one, else behind the layer
whose output is used. The method drops the empty ones at the input of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruneval.harness.attention import Call
from pruneval.harness.errors import UserError
from pruneval.harness.override import override
from pruneval.harness.tower_packed import Packed
from pruneval.methods.base import EncodeStep, MethodError, Reduction
from pruneval.methods.views import Passed

if TYPE_CHECKING:
    from pruneval.harness.session import Session


class Towers:
    """Runs the towers of a model for a method with `encoding`; one `Tiles` or `Packed` per encoding."""

    def __init__(self, session: Session) -> None:
        self.session, self.adapter, self.method = session, session.adapter, session.method
        self.places = session.method.encoding(session.shape)
        self.run: Tiles | Packed | None = None

    def install(self, stack: ExitStack) -> None:
        """Puts the towers' layers under control; `stack` undoes it."""
        if not self.places:
            return
        for number, layers in enumerate(self.adapter.towers):
            for index, layer in enumerate(layers):
                forward = functools.partial(self._layer, number, index, layer, layer.forward)
                override(layer, "forward", forward, stack)
        stack.callback(self.adapter.projector.register_forward_hook(self._projected).remove)

    def begin(self, kind: str, arguments: Mapping[str, Any]) -> None:
        """The model is about to encode images or videos."""
        if self.places:
            packing = self.adapter.packing(kind, arguments)
            self.run = Tiles(self, kind) if packing is None else Packed(self, *packing)

    def end(self) -> tuple[Passed, ...]:
        """What came through, one per tile; nothing for a method that leaves the tower alone."""
        run, self.run = self.run, None
        return () if run is None else run.passed

    def ask(self, step: EncodeStep) -> Reduction | None:
        """The method's answer. Raises: MethodError when it makes no sense."""
        result = self.method.at_encode(step)
        if result is None:
            return None
        name, keep = self.method.card.name, result.keep.to(step.blocks.device)
        if len(keep.unique()) != len(keep):
            raise MethodError(f"{name}: a token of the vision tower would go on twice")
        if step.cls and not (len(keep) and int(keep[0]) == 0):
            raise MethodError(f"{name}: the CLS token must stay the first token in the vision tower")
        blocks, left = torch.unique(step.blocks[keep][step.cls :], return_counts=True)
        if bool((left < torch.bincount(step.blocks[step.cls :])[blocks]).any()):
            raise MethodError(f"{name}: cells that become one visual token must stay or go together")
        return result

    def recorded(self, tower: int, index: int) -> list[Call]:
        """The attention calls of a layer, which are forgotten unless the method also reads them later."""
        calls, key = self.session.recorder.calls, ("vision", index, tower)
        return calls[key] if any(index in need.vision for need in self.session.needs.values()) else calls.pop(key)

    def _layer(
        self, tower: int, index: int, layer: nn.Module, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.run is None:
            return forward(hidden, *args, **kwargs)
        return self.run.layer(tower, index, layer, lambda rows, **named: forward(rows, *args, **named), hidden, kwargs)

    def _projected(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self.run is None else self.run.projected(output)


class Tiles:
    """One encoding of equal tiles, (T, CLS + P, d_v). `passed` is what came through, one per tile."""

    def __init__(self, towers: Towers, kind: str) -> None:
        self.towers, self.adapter, self.kind = towers, towers.adapter, kind
        self.cls = int(towers.session.shape.has_cls)
        self.passed: tuple[Passed, ...] = ()
        self.cells: list[Tensor] = []
        self.reduced = False

    def layer(self, tower: int, index: int, layer: nn.Module, forward: Any, hidden: Tensor, kwargs: dict) -> Tensor:
        """The output of one layer."""
        if index == 0:
            self._start(hidden)
        place = self.towers.places.get(index)
        for entered, cells in zip(self.entered, self.cells, strict=True):
            entered.append(len(cells))
        if self.reduced or place == "attention":
            hidden = self.adapter.attend(layer, hidden, self._mask(tower, hidden))
            if place == "attention":
                hidden = self._reduce(tower, index, hidden)
            hidden = self.adapter.feed(layer, hidden)
        else:
            hidden = forward(hidden, **kwargs)
        if place == "layer":
            hidden = self._reduce(tower, index, hidden)
        if index == self.adapter.feature_layer and not self.adapter.projects_cells(self.kind):
            hidden = self._leave(hidden)
        return hidden

    def projected(self, features: Tensor) -> Tensor | None:
        """(T, m, d) features behind the projector, each at its cell again; None when they are as they should be."""
        if not self.adapter.projects_cells(self.kind):
            return None
        cls = self.cls and features.shape[1] - max(map(len, self.cells)) + 1  # whether CLS was projected with the cells
        self._pass([row[cls : cls + len(cells) - self.cls] for row, cells in zip(features, self.cells, strict=True)])
        return self._restored(features, cls) if self.reduced else None

    def _start(self, hidden: Tensor) -> None:
        if self.cells:
            raise RuntimeError("a vision tower ran twice within one encoding")
        self.total = hidden.shape[1] - self.cls
        blocks = nn.functional.pad(self.adapter.cell_blocks(self.total), (self.cls, 0), value=-1)
        self.blocks = blocks.to(hidden.device)
        self.cells = [torch.arange(-self.cls, self.total, device=hidden.device)] * len(hidden)
        self.weights: list[Tensor | None] = [None] * len(hidden)
        self.memory: list[dict[str, Any]] = [{} for _ in hidden]
        self.entered: list[list[int]] = [[] for _ in hidden]

    def _leave(self, hidden: Tensor) -> Tensor:
        """What leaves the tower where the model pools or merges cells: each in its place, layers behind it see all."""
        features: list[Tensor | None] = [None] * len(self.cells)
        if self.adapter.merge == 1:
            rows = zip(hidden, self.cells, strict=True)
            features = [self.adapter.projector.forward(row[self.cls : len(cells)]) for row, cells in rows]
        self._pass(features)
        if not self.reduced:
            return hidden
        hidden = self._restored(hidden, self.cls)
        self.reduced, self.cells = False, [torch.arange(-self.cls, self.total, device=hidden.device)] * len(hidden)
        self.weights = [None] * len(hidden)
        return hidden

    def _pass(self, features: list[Any]) -> None:
        parts = zip(self.cells, self.entered, features, strict=True)
        self.passed = tuple(
            Passed(cells[self.cls :], self.total, tuple(entered), mine) for cells, entered, mine in parts
        )

    def _restored(self, rows: Tensor, cls: int) -> Tensor:
        """(T, cls + m, d) rows in their places among zeros, (T, cls + P, d)."""
        out = rows.new_zeros(len(rows), cls + self.total, rows.shape[-1])
        out[:, :cls] = rows[:, :cls]
        for tile, cells in enumerate(self.cells):
            mine = cells[self.cls :]
            out[tile, cls + mine] = rows[tile, cls : cls + len(mine)]
        return out

    def _mask(self, tower: int, hidden: Tensor) -> Tensor | None:
        """What hides padding and carries weights; None when there are neither."""
        lengths = torch.tensor([len(cells) for cells in self.cells], device=hidden.device)
        weighted = any(weight is not None for weight in self.weights)
        real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        if bool(real.all()) and not weighted:
            return None
        if "flash" in self.adapter.vision_attention(0, tower).config._attn_implementation:
            if weighted:
                name = self.towers.method.card.name
                raise UserError(f"{name} weighs tokens, which flash attention can't: load the model with sdpa or eager")
            return real
        bias = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device)
        bias.masked_fill_(~real, torch.finfo(hidden.dtype).min)
        for tile, weight in enumerate(self.weights):
            if weight is not None:
                bias[tile, : len(weight)] = weight.log().to(bias)
        return bias[:, None, None]

    def _reduce(self, tower: int, index: int, hidden: Tensor) -> Tensor:
        call = self.towers.recorded(tower, index)[-1]
        results = [self.towers.ask(self._step(index, row, hidden, call)) for row in range(len(self.cells))]
        if all(result is None for result in results):
            return hidden
        self.reduced = True
        rows = [self._after(row, hidden[row], result) for row, result in enumerate(results)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _step(self, index: int, row: int, hidden: Tensor, call: Call) -> EncodeStep:
        cells, weight = self.cells[row], self.weights[row]
        return EncodeStep(
            layer=index,
            hidden=hidden[row, : len(cells)],
            cells=cells,
            blocks=self.blocks[cells + self.cls],
            attention=call.sample(row, stop=len(cells), weight=weight),
            total=self.total,
            tokens=self.adapter.tile_tokens(self.kind, self.total),
            shape=self.towers.session.shape,
            weight=weight,
            memory=self.memory[row],
        )

    def _after(self, row: int, hidden: Tensor, result: Reduction | None) -> Tensor:
        """What goes on of one tile; its cells and weights are noted."""
        if result is None:
            return hidden[: len(self.cells[row])]
        keep, weight = result.keep.to(hidden.device), self.weights[row]
        rows = hidden[keep]
        if result.slots is not None and result.values is not None:
            rows[result.slots.to(rows.device)] = result.values.to(rows)
        self.cells[row] = self.cells[row][keep]
        self.weights[row] = weight[keep] if result.weights is None and weight is not None else result.weights
        return rows
