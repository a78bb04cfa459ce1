"""Attention rows on demand, under any kernel and without a full map.

Within `watching(...)` the attention modules somebody asked about run through a function that keeps their queries, keys
and values (references, no copies) and then calls the kernel the model runs on anyway. A row is computed from them when
a method asks for it: in float32, over the full causal row, heads of grouped queries expanded. Each watched module gets
a copy of its config that names our function, so masks, the model's config and every other layer stay as they are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruneval.harness.errors import UserError

CHUNK = 2**22  # float32 numbers of attention held at once when all rows are asked for

_RECORDERS: dict[nn.Module, tuple[Recorder, Any]] = {}


class HeadAttention:
    """The attention of one layer for one sample: see `pruneval.methods.base.Attention` for the contract."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        causal: bool,
        origin: Tensor | None = None,
        window: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """
        Args:
            query: (H, n, d_h), position encoding applied.
            key: (H_kv, n, d_h), likewise.
            value: (H_kv, n, d_h).
            scaling: factor on the dot products.
            causal: whether a row sees only the columns up to itself.
            origin: (n,) origins of the tokens.
            window: (n,) number of the window each token is in, where a row sees only its own.
            rotation: cos and sin, (n, d_h) each, with which queries and keys were rotated.
            weight: (n,) how many tokens each column counts as.
        """
        self.query, self.key, self.value, self.scaling = query, key, value, scaling
        self.causal, self.origin, self.window = causal, origin, window
        self.rotation, self.weight = rotation, weight

    def rotated(self, vectors: Tensor) -> Tensor:
        """(..., n, d_h) vectors with the rotary embedding of the n tokens."""
        return _rotated(vectors, *self._rotation())

    def unrotated(self) -> HeadAttention:
        """The same attention without rotary embedding."""
        cos, sin = self._rotation()
        norm = cos**2 + sin**2  # not 1 where a long-context variant scales cos and sin
        query, key = (_rotated(part, cos / norm, -sin / norm) for part in (self.query, self.key))
        return HeadAttention(
            query, key, self.value, self.scaling, self.causal, self.origin, self.window, weight=self.weight
        )

    def _rotation(self) -> tuple[Tensor, Tensor]:
        if self.rotation is None:
            raise UserError("this attention has no rotary embedding")
        dtype = torch.promote_types(torch.float32, self.query.dtype)
        cos, sin = self.rotation
        return cos.to(dtype), sin.to(dtype)

    def rows(self, index: Tensor | Sequence[int] | int) -> Tensor:
        """Attention of the query rows `index` (negative counts from the end), float32 (H, r, n)."""
        (heads, n, _), columns = self.query.shape, self.key.shape[1]
        index = torch.as_tensor(index, device=self.query.device).reshape(-1)
        index = torch.where(index < 0, index + n, index)
        dtype = torch.promote_types(torch.float32, self.query.dtype)
        query = self.query[:, index].to(dtype).unflatten(0, (self.key.shape[0], -1)).flatten(1, 2)
        logits = (query @ self.key.to(dtype).transpose(-1, -2) * self.scaling).reshape(heads, len(index), columns)
        if self.causal:
            # queries are the last of the columns: at decode steps there are fewer
            future = torch.arange(columns, device=index.device)[None, :] > index[:, None] + columns - n
            logits = logits.masked_fill(future, float("-inf"))
        if self.window is not None:
            logits = logits.masked_fill(self.window[None, :] != self.window[index, None], float("-inf"))
        if self.weight is not None:
            logits = logits + self.weight.to(logits).log()
        return logits.softmax(-1)

    def received(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Mean over the rows `index` (default all) of what each token receives, (H, n); rows are summed chunk
        by chunk.
        """
        total: Any = 0
        count = 0
        for block in self.blocks(index):
            total, count = total + block.sum(1), count + block.shape[1]
        return total / count

    def blocks(self, index: Tensor | Sequence[int] | None = None) -> Iterator[Tensor]:
        """The rows `index` (default all) in blocks of bounded size, (H, r, n) each."""
        heads, n, _ = self.query.shape
        index = range(n) if index is None else index
        for part in torch.as_tensor(index, device=self.query.device).split(max(1, CHUNK // (heads * n))):
            yield self.rows(part)


class Call:
    """One recorded call of an attention module: query (B, H, n, d_h), key and value (B, H_kv, n, d_h)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> None:
        self.query, self.key, self.value, self.scaling, self.causal = query, key, value, scaling, causal

    def sample(
        self,
        index: int,
        start: int = 0,
        origin: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        weight: Tensor | None = None,
        stop: int | None = None,
    ) -> HeadAttention:
        """The attention of batch row `index` without the (padding) tokens before `start` and from `stop` on;
        `rotation` is the batch's, (B or 1, n, d_h) cos and sin.
        """
        query, key, value = (tensor[index, :, start:stop] for tensor in (self.query, self.key, self.value))
        if rotation is not None:
            cos, sin = (table[index if len(table) > 1 else 0, start:] for table in rotation)
            rotation = (cos, sin)
        return HeadAttention(query, key, value, self.scaling, self.causal, origin, rotation=rotation, weight=weight)

    def row(self, index: int) -> Call:
        """The call for one row of the batch, in memory of its own."""
        query, key, value = (part[index : index + 1].clone() for part in (self.query, self.key, self.value))
        return Call(query, key, value, self.scaling, self.causal)

    @staticmethod
    def joined(calls: Sequence[Call]) -> Call:
        """Calls of one module with equal shapes, as one."""
        query, key, value = (torch.cat([getattr(call, name) for call in calls]) for name in ("query", "key", "value"))
        return Call(query, key, value, calls[0].scaling, calls[0].causal)


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of every decoder here: the second half of a head is the first one's partner."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat([-second, first], dim=-1) * sin


class _Peeked(Exception):
    """Unwinds an attention module after its queries and keys are known."""


class Recorder:
    """Keeps the calls of watched attention modules while `on`.

    Attributes:
        calls: what was recorded, by the key under which a module is watched; a module called once per image or window
            has several.
        on: whether calls are kept.
        peeking: whether a call ends as soon as it is recorded.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, list[Call]] = {}
        self.on = False
        self.peeking = False

    def record(self, key: Any, call: Call) -> None:
        self.calls.setdefault(key, []).append(call)
        if self.peeking:
            raise _Peeked

    def peek(self, key: Any, attention: nn.Module, **kwargs: Any) -> Call:
        """The call `attention` would make with these inputs; neither the kernel nor the cache is touched."""
        before, self.on, self.peeking = self.on, True, True
        try:
            attention(past_key_values=None, attention_mask=None, **kwargs)
        except _Peeked:
            return self.calls[key].pop()
        finally:
            self.on, self.peeking = before, False
        raise RuntimeError("the attention module did not go through the attention interface")


@contextmanager
def watching(modules: Mapping[Any, nn.Module]) -> Iterator[Recorder]:
    """Records the calls of attention modules, by key.

    Args:
        modules: key -> attention module. Each must look its kernel up under its own `config`.

    Raises:
        UserError: when a module does not choose its kernel through transformers' attention interface.
    """
    recorder, previous = Recorder(), {}
    try:
        for key, module in modules.items():
            config = getattr(module, "config", None)
            kernel = getattr(config, "_attn_implementation", None)
            if kernel is None:
                raise UserError(f"{type(module).__name__} has no attention interface, so its attention can't be read")
            previous[module] = config
            watched: Any = copy.copy(config)
            watched._attn_implementation_internal = _watched_name(kernel)
            module.config = watched
            _RECORDERS[module] = (recorder, key)
        yield recorder
    finally:
        for module, config in previous.items():
            module.config = config
            _RECORDERS.pop(module, None)


def _watched_name(kernel: str) -> str:
    name = f"pruneval_{kernel}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            _note(module, query, key, value, kwargs)
            return _kernel(module, kernel)(module, query, key, value, attention_mask, *args, **kwargs)

        AttentionInterface.register(name, attend)
    return name


def _note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]) -> None:
    recorder, name = _RECORDERS.get(module, (None, None))
    if recorder is None or not recorder.on:
        return
    scaling = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    recorder.record(name, Call(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, causal))


def _kernel(module: nn.Module, kernel: str) -> Any:
    if kernel == "eager":  # eager functions live beside their model class and are not in the registry
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kernel]
