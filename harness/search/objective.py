"""What searches ask of a model on their calibration samples: right answers, last states, distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruneval.harness.chat import chat
from pruneval.harness.errors import UserError
from pruneval.harness.layout import Tokens
from pruneval.harness.models import LoadedModel, adapter_of
from pruneval.harness.search.data import Calibration, Sample
from pruneval.harness.search.prefix import Shared, shared
from pruneval.harness.session import pruned
from pruneval.methods.base import Method, MethodError

NEW_TOKENS = 16
"""The longest answer generated; calibration answers are short."""


@dataclass
class Objective:
    """The calibration samples, ready for the model, in batches of equal prompt length where that is possible.

    Attributes:
        loaded: the model.
        data: the samples.
        batch_size: samples per forward.
        seed: of methods that draw at random.
    """

    loaded: LoadedModel
    data: Calibration
    batch_size: int = 16
    seed: int = 0
    on_batch: Callable[[], None] = lambda: None
    _shared: Shared | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        order = sorted(range(len(self.data.samples)), key=lambda i: (len(self.data.samples[i].prompt), i))
        size = self.batch_size
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.inputs = [self._encode([self.data.samples[i] for i in batch]) for batch in self.batches]

    @contextmanager
    def sharing(self) -> Iterator[Shared]:
        """Within the block image features, and lower layers if said so, are computed once per batch."""
        with shared(self.loaded.adapter) as kept:
            self._shared = kept
            try:
                yield kept
            finally:
                self._shared = None

    def accuracy(self, method: Method) -> float:
        """Share of the samples answered right, greedily, as a fraction: exact match, case and full stops apart."""
        right = 0
        tokenizer = self.loaded.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for batch, inputs, running in self._runs(method, "answers"):
            with running:
                out = self.loaded.model.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, pad_token_id=pad
                )
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(_right(text, self.data.samples[i]) for i, text in zip(batch, texts, strict=True))
        return right / len(self.data.samples)

    def states(self, method: Method, choose: Callable[[Tensor, Tokens], Tensor] | None = None) -> list[Tensor]:
        """What the last decoder layer gives behind the final norm, at the last prompt token: (d,) per sample.

        Args:
            method: what prunes.
            choose: what to take instead of a sample's (n, d) states, given which tokens these are.
        """
        found: list[Tensor | None] = [None] * len(self.data.samples)
        for batch, inputs, running in self._runs(method, "states"):
            outputs: list[Any] = []
            norm = self.loaded.adapter.final_norm
            hook = norm.register_forward_hook(lambda module, args, out, kept=outputs: kept.append(out))
            try:
                with running as session:
                    self.loaded.model(**inputs)
                layout = session.trace.entering(session.shape.layers - 1)
            finally:
                hook.remove()
            for i, row, tokens in zip(batch, outputs[0], layout.samples, strict=True):
                row = row[len(row) - len(tokens) :]
                found[i] = row[-1] if choose is None else choose(row, tokens)
        return [state for state in found if state is not None]

    def distributions(self, method: Method) -> Tensor:
        """Logarithms of the next token's distribution behind each prompt, (samples, vocabulary), float32."""
        head = self.loaded.model.get_output_embeddings()
        states = torch.stack(self.states(method))
        with torch.inference_mode():
            return head(states).float().log_softmax(-1)

    def tokens(self) -> int:
        """Visual tokens of a sample, the mean over all, rounded: the nominal N of a recipe."""
        counts = [self.loaded.adapter.visual_mask(inputs["input_ids"]).sum(1) for inputs in self.inputs]
        return round(float(torch.cat(counts).double().mean()))

    def _runs(self, method: Method, kind: str) -> Iterator[tuple[list[int], Any, Any]]:
        for number, (batch, inputs) in enumerate(zip(self.batches, self.inputs, strict=True)):
            # generate and a plain forward count the positions of padded prompts differently
            used = method if self._shared is None else self._shared.start((kind, number), method)
            yield batch, inputs, self._session(used, batch)
            self.on_batch()

    @contextmanager
    def _session(self, method: Method, batch: list[int]) -> Iterator[Any]:
        try:
            with (
                torch.inference_mode(),
                pruned(self.loaded.model, method, seed=self.seed, adapter=adapter_of(self.loaded, method)) as session,
            ):
                session.sample_keys = [f"calibration/{i}" for i in batch]
                yield session
        except MethodError as error:
            raise UserError(str(error)) from error

    def _encode(self, samples: list[Sample]) -> Any:
        processor = self.loaded.processor
        texts = [chat(processor, sample.prompt) for sample in samples]
        images = [sample.image for sample in samples]
        inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        return inputs.to(self.loaded.device, self.loaded.model.dtype)


def _right(text: str, sample: Sample) -> bool:
    return _plain(text) in {_plain(answer) for answer in sample.answers}


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".").strip()
