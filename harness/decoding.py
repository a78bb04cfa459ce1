"""The caches of one prompt while its answer is generated: after every token a method may let visual tokens go.

A cache keeps the order of its tokens. Prompt tokens stand left-padded before the generated ones, as after prefill.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneval.harness.attention import Call, HeadAttention
from pruneval.harness.layout import Eviction, Layout, Tokens
from pruneval.harness.stream import Stream
from pruneval.methods.base import DecodeStep, MethodError

if TYPE_CHECKING:
    from pruneval.harness.prefill import Prefill


class Decoding:
    """Asks the method after every generated token, and evicts what it lets go.

    Attributes:
        generated: tokens read after the prompt.
    """

    def __init__(self, run: Prefill, layers: tuple[int, ...], selecting: tuple[int, ...] = ()) -> None:
        """
        Args:
            run: the prompt, already read.
            layers: the decoder layers whose caches may shrink.
            selecting: the decoder layers before which the method says what is attended to.
        """
        self.run, self.layers, self.selecting = run, layers, selecting
        self.generated = 0
        self.memory: list[dict[int, dict[str, Any]]] = [
            {layer: {} for layer in (*layers, *selecting)} for _ in run.memory
        ]
        self._unseen: list[Tensor] = []  # origins of each sample's tokens that this step does not attend to
        cache = run.cache
        if cache is not None and len(run.memory) > 1:
            reorder = cache.reorder_cache

            def follow(beams: Tensor) -> None:
                reorder(beams)
                self.reorder(beams.tolist())

            cache.reorder_cache = follow

    def follow(self, layout: Layout, layers: Iterable[int]) -> None:
        """Lets the caches of `layers` hold, of every sample, only the tokens of a later layout."""
        for layer in layers:
            stored = self.run.trace.stored(layer)
            kept = [
                torch.isin(tokens.origin, later.origin).nonzero().squeeze(-1)
                for tokens, later in zip(stored.samples, layout.samples, strict=True)
            ]
            if any(len(keep) < len(tokens) for keep, tokens in zip(kept, stored.samples, strict=True)):
                self._evict(layer, kept, stored)

    def stepped(self, calls: dict[Any, list[Call]]) -> None:
        """Takes in one decode step.

        Args:
            calls: the attention calls of the step, by ("text", layer).

        Raises:
            RuntimeError: when a cache is not as long as the trace says.
        """
        if not self.layers:
            return
        self.generated += calls["text", self.layers[0]][-1].query.shape[2]
        for layer in self.layers:
            call, stored = calls["text", layer][-1], self.run.trace.stored(layer)
            if call.key.shape[2] != stored.width + self.generated:
                raise RuntimeError(
                    f"layer {layer}: the trace says {stored.width + self.generated} cached tokens, the cache holds "
                    f"{call.key.shape[2]}"
                )
            kept = [self._kept(layer, row, tokens, call, stored) for row, tokens in enumerate(stored.samples)]
            if any(len(keep) < len(tokens) for keep, tokens in zip(kept, stored.samples, strict=True)):
                self._evict(layer, kept, stored)

    def attended(self, layer: int, calls: dict[Any, list[Call]]) -> Tensor | None:
        """(B, width) which prompt tokens of the layer's cache this decode step attends to; None when all.

        Args:
            layer: the layer that comes next.
            calls: the attention calls of the step so far, by ("text", layer).
        """
        trace = self.run.trace
        if layer == 0:
            self._unseen = []
        if layer in self.selecting:
            self._unseen = self._select(layer, calls["text", layer - 1][-1])
        if not any(map(len, self._unseen)):
            return None
        stored = trace.stored(layer)
        if layer not in self.run.streams:
            self._stream(layer, stored, None)
        out = torch.ones(trace.batch, stored.width, dtype=torch.bool, device=self._unseen[0].device)
        for row, (tokens, unseen) in enumerate(zip(stored.samples, self._unseen, strict=True)):
            out[row, stored.width - len(tokens) :] = ~torch.isin(tokens.origin, unseen)
        return out

    def _select(self, layer: int, call: Call) -> list[Tensor]:
        stored, out = self.run.trace.stored(layer - 1), []
        for row, tokens in enumerate(stored.samples):
            visual = tokens.visual.nonzero().squeeze(-1)
            chosen = None
            if len(visual):
                chosen = self.run.session.method.select(self._step(layer, layer - 1, row, call, stored))
            unseen = torch.zeros_like(tokens.visual)
            if chosen is not None:
                unseen[visual] = True
                unseen[visual[chosen.to(visual.device)]] = False
            out.append(tokens.origin[unseen])
        return out

    def reorder(self, beams: list[int]) -> None:
        """Lets every row continue another one, as beam search does."""
        trace, run = self.run.trace, self.run
        self.memory = [{layer: dict(mine) for layer, mine in self.memory[row].items()} for row in beams]
        trace.evictions = [
            Eviction(one.generated, one.layer, Layout(one.layer, tuple(one.layout.samples[row] for row in beams)))
            for one in trace.evictions
        ]
        for layer in {one.layer for one in trace.evictions}:
            self._stream(layer, trace.stored(layer), run.streams[layer].shift)

    def _kept(self, layer: int, row: int, tokens: Tokens, call: Call, stored: Layout) -> Tensor:
        """Which of the sample's prompt tokens stay, as indices into `tokens`."""
        visual, session = tokens.visual.nonzero().squeeze(-1), self.run.session
        everything = torch.arange(len(tokens), device=visual.device)
        if not len(visual):
            return everything
        step = self._step(layer, layer, row, call, stored)
        chosen = session.method.at_decode(step)
        if chosen is None:
            return everything
        chosen = chosen.to(visual.device)
        if len(chosen.unique()) != len(chosen):
            raise MethodError(f"{session.method.card.name}: a cached token would stay twice")
        stays = ~tokens.visual
        stays[visual[chosen]] = True
        return everything[stays]

    def _step(self, layer: int, seen: int, row: int, call: Call, stored: Layout) -> DecodeStep:
        """What the method sees of one sample: the cache of layer `seen`, which made `call`."""
        run, tokens = self.run, stored.samples[row]
        start, generated = stored.width - len(tokens), call.key.shape[2] - stored.width
        weight = tokens.weight
        if weight is not None:
            weight = torch.nn.functional.pad(weight, (0, generated), value=1)
        attention = HeadAttention(
            call.query[row], call.key[row, :, start:], call.value[row, :, start:], call.scaling, True, weight=weight
        )
        visual = tokens.visual.nonzero().squeeze(-1)
        entered = int(run.trace.entering(seen).samples[row].visual.sum())
        memory = self.memory[row][layer]
        return DecodeStep(layer, generated, attention, visual, entered, run.session.shape, memory)

    def _evict(self, layer: int, kept: list[Tensor], stored: Layout) -> None:
        run = self.run
        for other in range(run.trace.layers):  # the model's own masks fit caches of one length only
            if other not in run.streams:
                self._stream(other, run.trace.prompt, None)
        layout = Layout(layer, tuple(_chosen(tokens, keep) for tokens, keep in zip(stored.samples, kept, strict=True)))
        cached = run.cache.layers[layer]
        cached.keys, cached.values = (_shrunk(part, stored, layout, kept) for part in (cached.keys, cached.values))
        run.trace.evictions.append(Eviction(self.generated, layer, layout))
        self._stream(layer, layout, run.streams[layer].shift)

    def _stream(self, layer: int, layout: Layout, shift: Tensor | None) -> None:
        run, adapter = self.run, self.run.session.adapter
        kernel = adapter.text_model.config._attn_implementation
        stream = Stream(layout, kernel, adapter.rotary.forward, run.last_position, run.last_position.device)
        stream.shift = shift  # decoded tokens go on from where the prompt ended, whatever has gone since
        run.streams[layer] = stream


def _chosen(tokens: Tokens, keep: Tensor) -> Tokens:
    weight = None if tokens.weight is None else tokens.weight[keep]
    return Tokens(tokens.origin[keep], tokens.visual[keep], tokens.made[keep], tokens.position[..., keep], weight)


def _shrunk(part: Tensor, before: Layout, after: Layout, kept: list[Tensor]) -> Tensor:
    """Keys or values (B, H, n, d_h) of what stays, left-padded with zeros, and of the generated tokens."""
    batch, heads, _, size = part.shape
    out = part.new_zeros(batch, heads, after.width, size)
    for row, keep in enumerate(kept):
        out[row, :, after.width - len(keep) :] = part[row][:, keep + before.width - len(before.samples[row])]
    return torch.cat([out, part[:, :, before.width :]], dim=2)
