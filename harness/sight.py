"""What a method sees of a prompt while it is read: its tokens and, on demand, all that was recorded on the way."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneval.harness.attention import Call, HeadAttention
from pruneval.harness.clip import ClipView, Questions
from pruneval.harness.errors import UserError
from pruneval.harness.layout import Tokens
from pruneval.harness.stream import Stream
from pruneval.methods.base import Step

if TYPE_CHECKING:
    from pruneval.harness.helper import HelperView
    from pruneval.harness.prefill import Prefill


class Sight:
    """Makes the steps of one prompt batch."""

    def __init__(self, run: Prefill, embeddings: Tensor, rotation: Any) -> None:
        """
        Args:
            run: the prompt on its way.
            embeddings: (B, S, d) what enters decoder layer 0.
            rotation: cos and sin of the un-pruned prompt.
        """
        self.run, self.session, self.embeddings, self.rotation = run, run.session, embeddings, rotation
        self._questions = Questions(run.session.text_tower, run.session.adapter.processor)
        self._helped: dict[int, list[Any]] = {}

    def step(self, index: int, row: int, tokens: Tokens, hidden: Tensor, upcoming: Callable[[], Call]) -> Step:
        """What the method sees of a sample before decoder layer `index`.

        Args:
            index: the layer.
            row: the sample's number in the batch.
            tokens: its n tokens there.
            hidden: (n, d) their states.
            upcoming: gives the layer's own attention call, see `ahead`.
        """
        run, session, need = self.run, self.session, self.session.needs[index]
        prompt = run.trace.prompt.samples[row]
        start = self.embeddings.shape[1] - len(prompt)
        key = self._key(row)
        vision: Any = self._visions[row] if need.vision or session.towers.places or session.resizing else None
        clip: Any = self._clip(row) if need.clip else None
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
            vision=vision,
            clips=self._clips(row) if need.frames else (),
            clip=clip,
            upcoming=(lambda: self._sampled(upcoming(), row, tokens, run.stream)) if need.next else None,
            helping=functools.partial(self._help, index, row) if need.helper else None,
            memory=run.memory[row],
            final_norm=session.adapter.final_norm,
        )

    def ahead(self, index: int, hidden: Tensor) -> Call:
        """The attention call that decoder layer `index` would make on the (B, n, d) stream in front of it."""
        adapter = self.session.adapter
        rotation = self.rotation if self.run.stream is None else self.run.stream.rotation(hidden)
        normed = adapter.attention_norm(index)(hidden)
        return self.session.recorder.peek(
            ("text", index), adapter.attention(index), hidden_states=normed, position_embeddings=rotation
        )

    @functools.cached_property
    def beams(self) -> int:
        """How many rows each encoded sample fills; 0 when the features did not come from this block's encoders."""
        count, total = sum(map(len, self._placeholders)), sum(sum(encoding.lengths) for encoding in self.run.encoded)
        return count // total if total and count % total == 0 else 0

    def _clips(self, row: int) -> list[Tensor]:
        visual = self.run.trace.prompt.samples[row].visual.nonzero().squeeze(-1)
        return [visual[clip.to(visual.device)] for clip in self._visions[row].clips()]

    def _clip(self, row: int) -> ClipView:
        given = self.session.questions
        text = None if given is None else self._of_sample(given, row, "questions")
        return self._questions.view(*self._prompt(row), text)

    def _help(self, index: int, row: int) -> HelperView:
        """What the helper makes of a sample; it reads the whole batch when the first sample asks."""
        session, beams = self.session, self.beams
        if not beams:
            raise UserError(f"{session.method.card.name}: images must be encoded within the pruned() block")
        if index not in self._helped:
            rows = range(0, len(self.run.memory), beams)
            prompts = [self._prompt(each) for each in rows]
            helping, reading = session.helping, session.needs[index].helper
            assert helping is not None and reading is not None  # else the pair is not supported
            self._helped[index] = helping.read(reading, prompts, self.run.encoded)
        return self._helped[index][row // beams]

    def _prompt(self, row: int) -> tuple[Tensor, Tensor]:
        """(n,) a sample's ids without padding, and which of them are visual."""
        real = self.run.real[row]
        return self.run.ids[row][real], self.run.visual[row][real]

    def _seen(self, layer: int, row: int) -> HeadAttention:
        """The attention of an earlier layer, over the tokens that entered it."""
        call = self.session.recorder.calls[("text", layer)][-1]
        tokens = self.run.trace.entering(layer).samples[row]
        return self._sampled(call, row, tokens, self.run.streams.get(layer))

    def _sampled(self, call: Any, row: int, tokens: Tokens, stream: Stream | None) -> HeadAttention:
        rotation = self.rotation if stream is None else stream.rotation(self.embeddings)
        return call.sample(row, call.query.shape[2] - len(tokens), tokens.origin, rotation, tokens.weight)

    @functools.cached_property
    def _visions(self) -> list[Any]:
        adapter, beams = self.session.adapter, self.beams
        if not beams:
            name = self.session.method.card.name
            raise UserError(f"{name} reads the vision tower, so images must be encoded within the pruned() block")
        views = adapter.visions(self._placeholders[::beams], self.run.encoded)
        views = [adapter.placed(view, mine) for view, mine in zip(views, self._spans[::beams], strict=True)]
        return [views[row // beams] for row in range(len(self._placeholders))]

    @functools.cached_property
    def _spans(self) -> list[tuple[tuple[int, int], ...]]:
        runs, beams = [_runs(tokens.visual) for tokens in self.run.trace.prompt.samples], self.beams
        if not beams:
            return runs
        spans = self.session.adapter.spans(runs[::beams], self._placeholders[::beams], self.run.encoded)
        return [spans[row // beams] for row in range(len(runs))]

    @functools.cached_property
    def _placeholders(self) -> list[Tensor]:
        return [ids[visual] for ids, visual in zip(self.run.ids, self.run.visual, strict=True)]

    def _key(self, row: int) -> str:
        keys = self.session.sample_keys
        if keys is None:
            ids, _ = self._prompt(row)
            return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()
        return self._of_sample(keys, row, "sample_keys")

    def _of_sample(self, given: Sequence[str], row: int, name: str) -> str:
        if not given or len(self.run.memory) % len(given):
            raise UserError(f"session.{name} names {len(given)} samples, the batch has {len(self.run.memory)}")
        return given[row // (len(self.run.memory) // len(given))]


def _runs(visual: Tensor) -> tuple[tuple[int, int], ...]:
    """Unbroken runs of visual tokens, as (start, stop)."""
    edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff()
    return tuple(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
