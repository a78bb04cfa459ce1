"""One prompt on its way through the decoder: it is read once (`enter`, layer by layer, then `finish`) and then
continued (`decode`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneval.harness.clip import ClipView, Questions
from pruneval.harness.decoding import Decoding
from pruneval.harness.errors import UserError
from pruneval.harness.layout import Layout, Tokens, Trace
from pruneval.harness.stream import Stream, prompt_layout, starts
from pruneval.methods.base import MethodError, Reduction, Step

if TYPE_CHECKING:
    from pruneval.harness.adapters.base import Encoding
    from pruneval.harness.attention import HeadAttention
    from pruneval.harness.helper import HelperView
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
        self._questions = Questions(session.text_tower, session.adapter.processor)
        self._helped: dict[int, list[HelperView | None]] = {}
        self.trace: Trace
        self.embeddings: Tensor

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
        self.encoded, self.embeddings = [], self.embeddings[:, :0]  # what decoding does not need
        self.rotation = None
        self.__dict__.pop("_visions", None)
        self._helped.clear()
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
        self.embeddings, self.rotation = hidden, rotation
        self.last_position = position[..., -1].reshape(-1, batch).amax(0)

    def _reduce(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        before = self.trace.layouts[-1] if self.trace.layouts else self.trace.prompt
        pads = starts(before, hidden.shape[1])
        upcoming = functools.cache(functools.partial(self._peek, index, hidden, kwargs))
        results: list[Reduction | None] = []
        for row, tokens in enumerate(before.samples):
            if not bool(tokens.visual.any()):
                results.append(None)
                continue
            step = self._step(index, row, tokens, hidden[row, pads[row] :], pads[row], upcoming)
            results.append(self._checked(self.session.method.reduce(step), tokens))
            if step.helping is not None and self.session.method.settles(step):
                self.session.early[row // self._beams] = step.helper.answer
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
            if result is not None and result.slots is not None:
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

    # What a method sees

    def _step(
        self, index: int, row: int, tokens: Tokens, hidden: Tensor, pad: int, upcoming: Callable[[], Any]
    ) -> Step:
        session, need = self.session, self.session.needs[index]
        prompt = self.trace.prompt.samples[row]
        start = self.embeddings.shape[1] - len(prompt)
        key = self._key(row)
        return Step(
            layer=index,
            hidden=hidden,
            origin=tokens.origin,
            visual=tokens.visual.nonzero().squeeze(-1),
            total=int(prompt.visual.sum()),
            shape=session.shape,
            embeddings=self.embeddings[row, start:],
            spans=self._spans[row],
            generator=lambda: session.generator(key, index),
            seen={layer: self._seen(layer, row) for layer in need.attention},
            vision=self._visions[row] if need.vision or session.towers.places or session.resizing else None,
            clips=self._clips(row) if need.frames else (),
            clip=self._clip(row) if need.clip else None,
            upcoming=(lambda: self._sampled(upcoming(), row, tokens, self.stream)) if need.next else None,
            helping=functools.partial(self._help, index, row) if need.helper else None,
            memory=self.memory[row],
            final_norm=session.adapter.final_norm,
        )

    def _clips(self, row: int) -> list[Tensor]:
        visual = self.trace.prompt.samples[row].visual.nonzero().squeeze(-1)
        return [visual[clip.to(visual.device)] for clip in self._visions[row].clips()]

    def _clip(self, row: int) -> ClipView:
        given, real = self.session.questions, self.real[row]
        text = None if given is None else self._of_sample(given, row, "questions")
        return self._questions.view(self.ids[row][real], self.visual[row][real], text)

    def _help(self, index: int, row: int) -> HelperView:
        """What the helper makes of a sample; it reads the whole batch when the first sample asks."""
        session, beams = self.session, self._beams
        if not beams:
            raise UserError(f"{session.method.card.name}: images must be encoded within the pruned() block")
        if index not in self._helped:
            rows = range(0, len(self.memory), beams)
            prompts = [(self.ids[each][self.real[each]], self.visual[each][self.real[each]]) for each in rows]
            self._helped[index] = session.helping.read(session.needs[index].helper, prompts, self.encoded)
        return self._helped[index][row // beams]

    def _seen(self, layer: int, row: int) -> HeadAttention:
        """The attention of an earlier layer, over the tokens that entered it."""
        call = self.session.recorder.calls[("text", layer)][-1]
        tokens = self.trace.entering(layer).samples[row]
        return self._sampled(call, row, tokens, self.streams.get(layer))

    def _sampled(self, call: Any, row: int, tokens: Tokens, stream: Stream | None) -> HeadAttention:
        rotation = self.rotation if stream is None else stream.rotation(self.embeddings)
        return call.sample(row, call.query.shape[2] - len(tokens), tokens.origin, rotation, tokens.weight)

    def _peek(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        adapter = self.session.adapter
        rotation = self.rotation if self.stream is None else self.stream.rotation(hidden)
        normed = adapter.attention_norm(index)(hidden)
        return self.session.recorder.peek(
            ("text", index), adapter.attention(index), hidden_states=normed, position_embeddings=rotation
        )

    @functools.cached_property
    def _visions(self) -> list[Any]:
        adapter, beams = self.session.adapter, self._beams
        if not beams:
            name = self.session.method.card.name
            raise UserError(f"{name} reads the vision tower, so images must be encoded within the pruned() block")
        views = adapter.visions(self._placeholders[::beams], self.encoded)
        views = [adapter.placed(view, mine) for view, mine in zip(views, self._spans[::beams], strict=True)]
        return [views[row // beams] for row in range(len(self._placeholders))]

    @functools.cached_property
    def _spans(self) -> list[tuple[tuple[int, int], ...]]:
        runs, beams = [_runs(tokens.visual) for tokens in self.trace.prompt.samples], self._beams
        if not beams:
            return runs
        spans = self.session.adapter.spans(runs[::beams], self._placeholders[::beams], self.encoded)
        return [spans[row // beams] for row in range(len(runs))]

    @functools.cached_property
    def _placeholders(self) -> list[Tensor]:
        return [ids[visual] for ids, visual in zip(self.ids, self.visual, strict=True)]

    @functools.cached_property
    def _beams(self) -> int:
        """How many rows each encoded sample fills; 0 when the features did not come from this block's encoders."""
        count, total = sum(map(len, self._placeholders)), sum(sum(encoding.lengths) for encoding in self.encoded)
        return count // total if total and count % total == 0 else 0

    def _key(self, row: int) -> str:
        keys = self.session.sample_keys
        if keys is None:
            ids = self.ids[row][self.real[row]].tolist()
            return hashlib.sha256(repr(ids).encode()).hexdigest()
        return self._of_sample(keys, row, "sample_keys")

    def _of_sample(self, given: Sequence[str], row: int, name: str) -> str:
        if not given or len(self.memory) % len(given):
            raise UserError(f"session.{name} names {len(given)} samples, the batch has {len(self.memory)}")
        return given[row // (len(self.memory) // len(given))]

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


def _runs(visual: Tensor) -> tuple[tuple[int, int], ...]:
    """Unbroken runs of visual tokens, as (start, stop)."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff()
    return tuple(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
