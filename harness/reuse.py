"""Image and video features, computed once and used by every method that prunes behind the vision tower.

Within `reusing(adapter)` what an encoding function of the model returns is kept, by everything it was called with, and
given again for the same call. Methods that read what happens inside the tower, or change it, are not served: the
session takes the function itself then. What does not fit into memory goes to a temporary folder, what does not fit
there is forgotten, oldest first. Nothing is measured on this path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneval.harness.adapters import Adapter
from pruneval.harness.override import override

MEMORY, DISK = 2**30, 2**33
"""Bytes kept in memory and on disk."""
UNUSED = ("last_hidden_state", "hidden_states", "attentions")
"""What of a tower's output the model does not read behind the projector."""


class Features:
    """A bounded store of encodings: memory first, then disk.

    Attributes:
        hits, misses: calls served from here and computed.
    """

    def __init__(self, folder: Path, memory: int = MEMORY, disk: int = DISK) -> None:
        self.folder, self.memory, self.disk = folder, memory, disk
        self.hits = self.misses = 0
        self._near: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._far: OrderedDict[str, int] = OrderedDict()

    def get(self, key: str, compute: Any) -> Any:
        """What is kept under `key`, or what `compute()` gives."""
        if key in self._near:
            self.hits += 1
            self._near.move_to_end(key)
            return self._near[key][0]
        if key in self._far:
            self.hits += 1
            del self._far[key]
            path = self.folder / key
            value = torch.load(path, weights_only=False)  # written by this process a moment ago
            path.unlink()
        else:
            self.misses += 1
            value = _kept(compute())
        self._put(key, value)
        return value

    def _put(self, key: str, value: Any) -> None:
        self._near[key] = (value, _size(value))
        while len(self._near) > 1 and sum(size for _, size in self._near.values()) > self.memory:
            old, (gone, size) = self._near.popitem(last=False)
            if size > self.disk:
                continue
            torch.save(gone, self.folder / old)
            self._far[old] = size
            while sum(self._far.values()) > self.disk:
                oldest, _ = self._far.popitem(last=False)
                (self.folder / oldest).unlink()


@contextmanager
def reusing(adapter: Adapter, memory: int = MEMORY, disk: int = DISK) -> Iterator[Features]:
    """Lets the model's encoding functions answer from a store within the block."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pruneval-features-"))
        features, inner = Features(Path(folder), memory, disk), adapter.model.model
        for name in ("get_image_features", "get_video_features"):
            original = getattr(inner, name, None)
            if original is not None:
                override(inner, name, _answering(features, name, original), stack)
        yield features


def _answering(features: Features, name: str, original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        return features.get(_key(name, arguments), lambda: original(*args, **kwargs))

    # For methods that look into the tower: the model's own function, behind however many stores.
    encode.uncached = getattr(original, "uncached", original)  # type: ignore[attr-defined]
    return encode


def _key(name: str, arguments: dict[str, Any]) -> str:
    seen = hashlib.blake2b(name.encode(), digest_size=16)
    for key, value in sorted(arguments.items()):
        seen.update(key.encode())
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Tensor):
                seen.update(f"{part.dtype}{tuple(part.shape)}{part.device}".encode())
                seen.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                seen.update(repr(part).encode())
    return seen.hexdigest()


def _kept(output: Any) -> Any:
    """An encoding without what nobody reads."""
    names = {item.name for item in dataclasses.fields(output)}
    return dataclasses.replace(output, **{name: None for name in UNUSED if name in names})


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
