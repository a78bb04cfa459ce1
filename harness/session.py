"""`with pruned(model, method) as session:` runs a stock transformers model with visual-token pruning, and leaves no
trace of it afterwards.

Forward pre-hooks see what enters the model, its text decoder and each decoder layer. At the boundaries the method
names, every sample's stream goes through `method.reduce`; the survivors are gathered and from there on layers get
their own mask and rotation. A decoder layer's KV cache therefore holds exactly the tokens that entered the layer, and
decode steps get a mask and a rotation that fit it. Nothing else of the model changes: while no sample has been
reduced, layers get what the model passed them.

Full-sequence logits of a pruned forward are as long as the last layer's stream (left-padded).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruneval.harness.adapters import Adapter, Encoding, adapter_for
from pruneval.harness.attention import Recorder, watching
from pruneval.harness.errors import UserError
from pruneval.harness.helper import Helping
from pruneval.harness.layout import Layout, Trace
from pruneval.harness.override import override
from pruneval.harness.pixels import see
from pruneval.harness.prefill import Prefill
from pruneval.harness.reuse import Seen
from pruneval.harness.tower import Towers
from pruneval.methods.base import Method

_ACTIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def pruned(model: nn.Module, method: Method, seed: int = 0, adapter: Adapter | None = None) -> Iterator[Session]:
    """Prunes visual tokens in every forward of `model` within the block.

    Args:
        model: a stock transformers model of a supported family.
        method: what `pruneval.methods.build` returns.
        seed: the run's seed, from which the randomness of a method comes.
        adapter: the model's adapter, found by its model type when not given.

    Raises:
        UserError: when the pair is not supported, with the reason.
    """
    adapter = adapter or adapter_for(model)
    reason = adapter.supports(method)
    if reason:
        raise UserError(reason)
    if model in _ACTIVE:
        raise UserError("this model is already in a pruned() block; leave it first")
    session = Session(adapter, method, seed)
    with ExitStack() as stack:
        _ACTIVE.add(model)
        stack.callback(_ACTIVE.discard, model)
        session.install(stack)
        yield session


class Session:
    """A running `pruned` block.

    Attributes:
        sample_keys: names of the samples of the next `generate`, which seed a method's randomness; without them the
            prompt's ids do.
        questions: texts of the questions of the next `generate`, for methods that read them; without them what the
            processor makes of the prompts.
        early: of the last prefill, the helper's answers that the method takes for the model's: sample -> ids, of the
            helper's tokenizer.
    """

    def __init__(self, adapter: Adapter, method: Method, seed: int) -> None:
        self.adapter, self.method, self.seed = adapter, method, seed
        self.sample_keys: Sequence[str] | None = None
        self.questions: Sequence[str] | None = None
        self._trace: Trace | None = None
        self.early: dict[int, Tensor] = {}
        self.shape = adapter.shape
        self.needs = method.needs(self.shape)
        self.read = {index for need in self.needs.values() for index in need.attention}
        self.evicting = method.evicting(self.shape)
        self.selecting = method.selecting(self.shape)
        self.text_tower = adapter.text_tower() if any(need.clip for need in self.needs.values()) else None
        helper = adapter.helper if any(need.helper for need in self.needs.values()) else None
        self.helping = None if helper is None else Helping(adapter, helper)
        self.towers = Towers(self)
        self.resizing = method.resizing(self.shape)
        self.kind = "image"
        self.recorder = Recorder()
        self.encoded: list[Encoding] = []
        self.vision_hidden: dict[int, Tensor] = {}
        self.rotary_position: Tensor
        self._input_ids: Tensor | None = None
        self._pixels: Tensor | None = None
        self._prefill: Prefill | None = None
        self._uncached: Tensor | None = None

    @property
    def trace(self) -> Trace:
        """The trace of the last prefill. Raises: UserError before the first."""
        if self._trace is None:
            raise UserError("no prompt has been read within this pruned() block yet, so there is no trace")
        return self._trace

    def install(self, stack: ExitStack) -> None:
        """Puts the hooks in place; `stack` removes them."""
        adapter = self.adapter
        self.recorder = stack.enter_context(watching(self._watched()))
        adapter.attach(self._layouts, stack)
        self.towers.install(stack)
        if self.resizing:
            for tower in adapter.tower_modules:
                override(tower, "forward", functools.partial(self._see, tower.forward), stack)
        for kind in ("get_image_features", "get_video_features"):
            self._wrap_encoder(kind, stack)
        pre = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        handles = [
            pre(adapter.model, self._before_model),
            pre(adapter.text_model, self._before_text),
            pre(adapter.rotary, self._before_rotary),
            adapter.text_model.register_forward_hook(self._after_text),
        ]
        for index, layer in enumerate(adapter.decoder_layers):
            handles.append(pre(layer, functools.partial(self._before_layer, index)))
        for index in sorted({layer for need in self.needs.values() for layer in need.vision}):
            for tower in adapter.towers:
                handles.append(tower[index].register_forward_hook(functools.partial(self._after_vision_layer, index)))
        if any(need.pixels for need in self.needs.values()):
            handles += [pre(eye, self._before_tower) for eye in adapter.eyes]
        for handle in handles:
            stack.callback(handle.remove)

    def _layouts(self) -> tuple[Layout, Layout] | None:
        """The layouts of the prompt and of the reduced stream that is going through the layers, or None when
        there is none.
        """
        run = self._prefill
        return None if run is None or run.stream is None else (run.trace.prompt, run.stream.layout)

    def _watched(self) -> dict[Any, nn.Module]:
        watched: dict[Any, nn.Module] = {}
        for layer, need in self.needs.items():
            watched |= {("text", index): self.adapter.attention(index) for index in need.attention}
            for tower in range(len(self.adapter.towers)):
                watched |= {
                    ("vision", index, tower): self.adapter.vision_attention(index, tower) for index in need.vision
                }
            if need.next:
                watched[("text", layer)] = self.adapter.attention(layer)
        for tower in range(len(self.adapter.towers)):
            watched |= {
                ("vision", index, tower): self.adapter.vision_attention(index, tower) for index in self.towers.places
            }
        decoding = {*self.evicting, *(index - 1 for index in self.selecting)}
        return watched | {("text", index): self.adapter.attention(index) for index in decoding}

    def _wrap_encoder(self, name: str, stack: ExitStack) -> None:
        """Notes what goes through an encoding function of the inner model, and what the tower saw meanwhile."""
        inner = self.adapter.model.model
        original = getattr(inner, name, None)
        if original is None:
            return
        inside = self._looks_inside()
        store = getattr(original, "encoder", None) if inside and not self._changes_tower() else None
        function = getattr(original, "uncached", original) if inside else original
        signature = inspect.signature(original)

        @functools.wraps(original)  # generate reads the signature to know what to pass
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self.recorder.on:  # a family may encode videos by its function for images
                return function(*args, **kwargs)
            self.kind = name.removeprefix("get_").removesuffix("_features")
            arguments = signature.bind(*args, **kwargs).arguments
            self.towers.begin(self.kind, arguments)
            try:
                if store is not None:
                    out, seen = store.seen(self._reading(), self._look, arguments)
                else:
                    out, seen = self._look(lambda: function(*args, **kwargs))
            finally:
                passed = self.towers.end()
            lengths = tuple(item.shape[:-1].numel() for item in out.pooler_output)
            # one of a kind per prompt: an earlier one belongs to a prompt that failed
            self.encoded = [encoding for encoding in self.encoded if encoding.kind != self.kind]
            self.encoded.append(Encoding(self.kind, arguments, lengths, seen.calls, seen.hidden, passed, seen.pixels))
            return out

        override(inner, name, encode, stack)

    def _look(self, run: Callable[[], Any]) -> tuple[Any, Seen]:
        """Runs a tower; its output, and what the method wants to see of it."""
        self.vision_hidden.clear()
        self.recorder.calls.clear()
        self._pixels, self.recorder.on = None, True
        try:
            out = run()
        finally:
            self.recorder.on = False
        calls = {key[1]: made for key, made in self.recorder.calls.items() if key[0] == "vision"}
        self.recorder.calls.clear()
        return out, Seen(calls, dict(self.vision_hidden), self._pixels)

    def _see(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A vision tower's output, of images that are scaled down."""
        scale = functools.partial(self.method.at_pixels, self.shape)
        name = next(iter(inspect.signature(forward).parameters))  # families pass pixels by position or by name
        pixels = kwargs.pop(name) if name in kwargs else args[0]
        return see(self.adapter, self.kind, scale, forward, pixels, *args[1:], **kwargs)

    def _changes_tower(self) -> bool:
        """Whether the method changes what happens inside the vision tower."""
        return bool(self.towers.places) or bool(self.resizing)

    def _looks_inside(self) -> bool:
        """Whether the method reads, or changes, what happens inside the vision tower."""
        needs = self.needs.values()
        return self._changes_tower() or any(need.vision or need.pixels or need.clip for need in needs)

    def _reading(self) -> str:
        """Names what `_look` sees."""
        layers = sorted({layer for need in self.needs.values() for layer in need.vision})
        return f" layers {layers}" + " pixels" * any(need.pixels for need in self.needs.values())

    # What enters the model

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._input_ids = args[0] if args else kwargs.get("input_ids")

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._pixels = self.adapter.seen(args[0] if args else kwargs["pixel_values"])

    def _before_rotary(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.rotary_position = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def _after_vision_layer(self, index: int, module: nn.Module, args: tuple, output: Any) -> None:
        self.vision_hidden[index] = output[0] if isinstance(output, tuple) else output

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._check_decode()
            return
        ids = self._input_ids
        if ids is None:
            raise UserError("a pruned model needs input_ids, not inputs_embeds: they say which tokens are visual")
        if cache is None:
            self._check_uncached(ids)
        encoded, self.encoded, self.early = self.encoded, [], {}
        self._prefill = Prefill(self, ids, kwargs.get("attention_mask"), cache, encoded)

    def _check_decode(self) -> None:
        if self._prefill is None:
            raise UserError("the prompt was not read within this pruned() block, so its cache can't be continued here")
        ids = self._input_ids  # one id may be a placeholder by accident: a model can generate it
        if ids is not None and ids.shape[1] > 1 and bool(self.adapter.visual_mask(ids).any()):
            raise UserError(
                "visual tokens after the first forward (chunked prefill, a second turn) are not supported while pruning"
            )

    def _check_uncached(self, ids: Tensor) -> None:
        before, self._uncached = self._uncached, ids
        if self.needs and before is not None and torch.equal(ids[:, :-1], before):
            raise UserError(
                "generate(use_cache=False) would choose the visual tokens anew at every step; leave the cache on"
            )

    # What enters a decoder layer

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        run = self._prefill
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if run.done:
            changed = run.decode(index, hidden, self.rotary_position, kwargs)
        else:
            hidden, changed = run.enter(index, hidden, kwargs)
        if changed is None:
            return None
        return (hidden,), {name: value for name, value in (kwargs | changed).items() if name != "hidden_states"}

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> None:
        run = self._prefill
        if run is None:
            return
        if run.done:
            run.stepped()
            return
        run.finish()
        self._trace = run.trace
        self.vision_hidden.clear()
        self.recorder.calls.clear()
        self.sample_keys = self.questions = None

    # Randomness

    def generator(self, key: str, layer: int) -> torch.Generator:
        """A private generator (CPU) for one sample at one boundary, whatever the batch looks like."""
        parts = (str(self.seed), str(self.method.params.get("seed", 0)), key, str(layer))
        digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
