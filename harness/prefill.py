"""One prompt on its way through the decoder: it is read once (`enter`, layer by layer, then `finish`) and then
continued (`decode`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneval.harness.decoding import Decoding
from pruneval.harness.errors import UserError
from pruneval.harness.layout import Layout, Tokens, Trace
from pruneval.harness.sight import Sight
from pruneval.harness.stream import Stream, prompt_layout, starts
from pruneval.methods.base import MethodError, Reduction, Step

if TYPE_CHECKING:
    from pruneval.harness.adapters.base import Encoding
    from pruneval.harness.session import Session


class Prefill:
    """The state of one prompt batch. Born at prefill, replaced by the next one.

    Attributes:
        trace: the layouts so far.
        done: whether the prompt has been read.
    """

    def __init__(self, session: Session, ids: Tensor, mask: Tensor | None, cache: Any, encoded: list[Encoding]) -> None:
        """
        Args:
            session: the running block.
            ids: (B, S) prompt ids.
            mask: (B, S) padding mask, or None.
            cache: the empty KV cache, or None.
            encoded: the runs of the vision tower for this batch.
        """
        self.session, self.ids, self.cache, self.encoded = session, ids, cache, encoded
        self.visual = session.adapter.visual_mask(ids)
        self.real = torch.ones_like(self.visual) if mask is None else mask.bool()
        self.active = bool(self.visual.any()) and bool(session.needs)
        if self.active and bool((self.real[:, :-1] & ~self.real[:, 1:]).any()):
            raise UserError("pruning needs left padding: set the tokenizer's padding_side to left")
        if self.active and cache is not None and any(_fixed(layer) for layer in cache.layers):
            raise UserError("pruning needs a cache that grows: static and sliding-window caches are not supported")
        self.done = False
        self.decoding: Decoding | None = None
        self.everywhere = 0  # boundary up to which caches lose what the last reduction there dropped
        self.streams: dict[int, Stream] = {}
        self.stream: Stream | None = None
        self.memory: list[dict[str, Any]] = [{} for _ in range(ids.shape[0])]
        self.trace: Trace
        self._sight: Sight  # while the prompt is read

    # Reading the prompt

    def enter(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """The hidden states and the changed arguments of decoder layer `index`; None for the latter when
        nothing changes.
        """
        if index == 0:
            self._start(hidden, kwargs.get("position_embeddings"))
        if self.active and index in self.session.needs:
            hidden = self._reduce(index, hidden, kwargs)
        self.session.recorder.on = self.active and index in self.session.read
        if self.stream is None:
            return hidden, None
        self.streams[index] = self.stream
        width = self.stream.layout.width
        return hidden, {
            "attention_mask": self.stream.mask(width, width, hidden.dtype),
            "position_embeddings": self.stream.rotation(hidden),
            "position_ids": None,
        }

    def finish(self) -> None:
        """Closes the trace and compares it with the cache. Raises: RuntimeError when they differ."""
        self.done = True
        self.session.recorder.on = False
        self.encoded = []
        del self._sight  # with all that decoding does not need
        if self.cache is None or not self.active:
            return
        lengths = [self.cache.layers[layer].keys.shape[-2] for layer in range(self.trace.layers)]
        expected = [
            self.streams[layer].layout.width if layer in self.streams else self.ids.shape[1]
            for layer in range(self.trace.layers)
        ]
        if lengths != expected:
            raise RuntimeError(f"the trace says {expected} cached tokens per layer, the cache holds {lengths}")
        if self.session.evicting or self.session.selecting or self.everywhere:
            self.decoding = Decoding(self, self.session.evicting, self.session.selecting)
            self.decoding.follow(self.trace.entering(self.everywhere), range(self.everywhere))

    def _start(self, hidden: Tensor, rotation: Any) -> None:
        position = self.session.rotary_position
        batch, length = self.ids.shape
        position = position.expand(*position.shape[:-2], batch, length)
        self.trace = Trace(prompt_layout(self.visual, self.real, position), self.session.shape.layers)
        self._sight = Sight(self, hidden, rotation)
        self.last_position = position[..., -1].reshape(-1, batch).amax(0)

    def _reduce(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        before = self.trace.layouts[-1] if self.trace.layouts else self.trace.prompt
        pads = starts(before, hidden.shape[1])
        upcoming = functools.cache(functools.partial(self._sight.ahead, index, hidden))
        results: list[Reduction | None] = []
        for row, tokens in enumerate(before.samples):
            if not bool(tokens.visual.any()):
                results.append(None)
                continue
            step = self._sight.step(index, row, tokens, hidden[row, pads[row] :], upcoming)
            results.append(self._checked(self.session.method.reduce(step), tokens))
            if step.helping is not None and self.session.method.settles(step):
                self.session.early[row // self._sight.beams] = step.helper.answer
            if index == 0 and self.session.towers.places:
                self._note_tower(row, step, results[-1])
        if all(result is None for result in results):
            return hidden
        keeps = [
            torch.arange(len(tokens), device=hidden.device) if result is None else result.keep.to(hidden.device)
            for result, tokens in zip(results, before.samples, strict=True)
        ]
        samples = tuple(self._after(row, tokens, keeps[row], results[row]) for row, tokens in enumerate(before.samples))
        if any(result is not None and result.everywhere for result in results):
            self.everywhere = index
        layout = Layout(index, samples)
        self.trace.layouts.append(layout)
        kernel = self.session.adapter.text_model.config._attn_implementation
        self.stream = Stream(layout, kernel, self.session.adapter.rotary.forward, self.last_position, hidden.device)
        out = self.stream.gather(hidden, keeps, pads)
        for row, result in enumerate(results):
            if result is not None and result.slots is not None and result.values is not None:
                out[row, out.shape[1] - len(keeps[row]) + result.slots.to(out.device)] = result.values.to(out)
        return out

    def _after(self, row: int, tokens: Tokens, keep: Tensor, result: Reduction | None) -> Tokens:
        compact = self.session.method.position_ids == "compact"
        if result is not None and result.compact is not None:
            compact = result.compact
        origin, made = tokens.origin[keep], tokens.made[keep]
        if result is not None and result.slots is not None:
            slots = result.slots.to(made.device)
            made[slots] = True
            if result.added is not None:
                new = slots[result.added.to(made.device)]
                first = max(int(tokens.origin.max()) + 1, len(self.trace.prompt.samples[row]))
                origin[new] = torch.arange(first, first + len(new), device=made.device)
        if compact and result is not None:
            position = torch.arange(len(keep), device=keep.device).expand(*tokens.position.shape[:-1], -1)
        else:
            position = tokens.position[..., keep]
        weight = tokens.weight
        if result is not None and result.weights is not None:
            weight = result.weights.to(keep.device)
        elif weight is not None:
            weight = weight[keep]
        return Tokens(origin, tokens.visual[keep], made, position, weight)

    def _checked(self, result: Reduction | None, tokens: Tokens) -> Reduction | None:
        if result is None:
            return None
        name = self.session.method.card.name
        inherited = torch.ones(len(result.keep), dtype=torch.bool)
        if result.slots is not None and result.added is not None:
            inherited[result.slots[result.added].cpu()] = False
        index = result.keep.cpu()[inherited]
        text = (~tokens.visual).nonzero().squeeze(-1).cpu()
        if len(index.unique()) != len(index):
            raise MethodError(f"{name}: a token would go on twice")
        if not bool(torch.isin(text, index).all()):
            raise MethodError(f"{name}: text tokens may not be dropped")
        return result

    def _note_tower(self, row: int, step: Step, result: Reduction | None) -> None:
        passed = step.vision.passed()
        if passed is None:
            return
        self.trace.towers[row] = [tile.entered for tile in passed]
        if result is None:
            name = self.session.method.card.name
            raise MethodError(f"{name}: visual tokens whose cells left the vision tower must be dropped at layer 0")

    # Continuing it

    def decode(self, index: int, hidden: Tensor, position: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The changed arguments of decoder layer `index` at a decode step; None when nothing changes."""
        queries, attended = hidden.shape[1], None
        self.session.recorder.on = self.decoding is not None and bool(self.session.evicting or self.session.selecting)
        if self.decoding is not None and queries == 1:
            attended = self.decoding.attended(index, self.session.recorder.calls)
        stream = self.streams.get(index)
        if stream is None:
            return None
        keys = queries + kwargs["past_key_values"].layers[index].keys.shape[-2]
        changed = {"attention_mask": stream.mask(queries, keys, hidden.dtype, attended), "position_ids": None}
        if stream.shift is not None:
            changed["position_embeddings"] = stream.decode_rotation(hidden, position)
        return changed

    def stepped(self) -> None:
        """Closes a decode step."""
        if self.decoding is not None:
            self.session.recorder.on = False
            self.decoding.stepped(self.session.recorder.calls)
            self.session.recorder.calls.clear()


def _fixed(layer: Any) -> bool:
    """Whether a cache layer has a length of its own."""
    return bool(getattr(layer, "is_sliding", False)) or bool(getattr(layer, "max_cache_len", 0))
