"""Image and video features, computed once and used by every method that leaves the vision tower's work as it is.

Within `reusing(adapter)` what an encoding function of the model returns is kept, image by image, by everything it was
called with, and given again for the same image in whatever batch. For methods that read what happens inside the tower,
what they read is kept with it, and given to every method that reads the same. Where a family does not take images one
by one (Qwen-VL packs them; crops, when a method reads them), the whole call is kept. Methods that change what happens
in the tower are not served: the session takes the function itself then. What does not fit into memory goes to a
temporary folder, what does not fit there is forgotten, oldest first. Nothing is measured on this path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneval.harness.attention import Call
from pruneval.harness.override import override

MEMORY, DISK = 2**30, 2**33
"""Bytes kept in memory and on disk."""
UNUSED = ("last_hidden_state", "hidden_states", "attentions")
"""What of a tower's output the model does not read behind the projector."""
ENCODERS = ("get_image_features", "get_video_features")


@dataclass(frozen=True)
class Seen:
    """What was recorded in a vision tower while it ran.

    Attributes:
        calls: attention calls, by encoder layer.
        hidden: outputs of encoder layers, (tiles, n, d_v) where tiles are not packed.
        pixels: (tiles, 3, height, width) in [0, 1], if asked for.
    """

    calls: Mapping[int, list[Call]] = field(default_factory=dict)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None

    def split(self, count: int) -> list[Seen] | None:
        """What was seen of each of `count` images; None where it is not one row of each."""
        single = all(len(made) == 1 and len(made[0].query) == count for made in self.calls.values())
        others = [*self.hidden.values(), *([] if self.pixels is None else [self.pixels])]
        if not single or any(len(part) != count for part in others):
            return None
        return [
            Seen(
                {layer: [made[0].row(row)] for layer, made in self.calls.items()},
                {layer: part[row : row + 1].clone() for layer, part in self.hidden.items()},
                None if self.pixels is None else self.pixels[row : row + 1].clone(),
            )
            for row in range(count)
        ]

    @staticmethod
    def joined(parts: list[Seen]) -> Seen:
        """What was seen of several images that were each seen alone."""
        first = parts[0]
        return Seen(
            {layer: [Call.joined([part.calls[layer][0] for part in parts])] for layer in first.calls},
            {layer: torch.cat([part.hidden[layer] for part in parts]) for layer in first.hidden},
            None if first.pixels is None else torch.cat([part.pixels for part in parts if part.pixels is not None]),
        )


class Features:
    """A bounded store of encodings: memory first, then disk.

    Attributes:
        hits, misses: calls served from here and computed.
        tasks: what the benchmarks evaluated meanwhile were built as, by benchmark; see `harness/evaluate.py`.
    """

    def __init__(self, folder: Path, memory: int = MEMORY, disk: int = DISK) -> None:
        self.folder, self.memory, self.disk = folder, memory, disk
        self.hits = self.misses = 0
        self.tasks: OrderedDict[str, list[Any]] = OrderedDict()
        self._near: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._far: OrderedDict[str, int] = OrderedDict()

    def find(self, key: str) -> Any | None:
        """What is kept under `key`, if anything is."""
        if key in self._near:
            self._near.move_to_end(key)
            return self._near[key][0]
        if key not in self._far:
            return None
        del self._far[key]
        path = self.folder / key
        value = torch.load(path, weights_only=False)  # written by this process a moment ago
        path.unlink()
        self.put(key, value)
        return value

    def put(self, key: str, value: Any) -> None:
        """Keeps a value; the oldest make room."""
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


def shared(model: Any) -> Features | None:
    """The store that answers for the model's encoding functions, if one does."""
    found = (getattr(getattr(model.model, name, None), "encoder", None) for name in ENCODERS)
    return next((encoder.features for encoder in found if encoder is not None), None)


def reusing(adapter: Any, memory: int = MEMORY, disk: int = DISK) -> AbstractContextManager[Features]:
    """Lets the encoding functions of an adapter's model answer from a store within the block."""
    return serving(adapter.model, memory, disk)


@contextmanager
def serving(model: Any, memory: int = MEMORY, disk: int = DISK) -> Iterator[Features]:
    """Lets a model's encoding functions answer from a store of so many bytes within the block."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pruneval-features-"))
        features, inner = Features(Path(folder), memory, disk), model.model
        for name in ENCODERS:
            original = getattr(inner, name, None)
            if original is not None:
                override(inner, name, _Encoder(features, name, original).function, stack)
        yield features


Look = Callable[[Callable[[], Any]], tuple[Any, Seen]]
"""Runs a tower; its output, and what was seen in it."""


class _Encoder:
    """An encoding function that asks the store first."""

    def __init__(self, features: Features, name: str, original: Any) -> None:
        self.features, self.name, self.original = features, name, original
        self.signature = inspect.signature(original)
        self.uncached = getattr(original, "uncached", original)
        """The model's own function, behind however many stores."""
        self.whole: set[str] = set()
        """For which readings images can't be told apart in what comes out."""

        @functools.wraps(original)  # generate reads the signature to know what to pass
        def encode(*args: Any, **kwargs: Any) -> Any:
            arguments = self.signature.bind(*args, **kwargs).arguments
            return self._find("", lambda run: (run(), Seen()), original, arguments)[0]

        # For sessions: the function itself for methods that change the tower, and the way for those that read in it.
        encode.uncached, encode.encoder = self.uncached, self  # type: ignore[attr-defined]
        self.function = encode

    def seen(self, reading: str, look: Look, arguments: dict[str, Any]) -> tuple[Any, Seen]:
        """What the function gives for these arguments, and what is seen in the tower.

        Args:
            reading: names what `look` sees.
            look: runs the tower.
            arguments: of the function, by name.
        """
        return self._find(reading, look, self.uncached, arguments)

    def _find(self, reading: str, look: Look, function: Any, arguments: dict[str, Any]) -> tuple[Any, Seen]:
        parts = None if reading in self.whole else _parts(arguments)
        keys = [_key(self.name + reading, part) for part in parts or [arguments]]
        found: dict[str, Any] = {key: self.features.find(key) for key in keys}
        missing = {key: place for place, key in reversed(list(enumerate(keys))) if found[key] is None}
        if not missing:
            self.features.hits += 1
            return _joined([found[key] for key in keys])
        places = sorted(missing.values())
        asked = arguments
        if len(places) < len(keys):
            asked = {name: _chosen(value, places) for name, value in arguments.items()}
        out, seen = look(lambda: function(**self._named(asked)))
        made = _kept(out), seen
        each = None if parts is None else _split(made, len(places))
        if each is None:
            if parts is not None:
                self.whole.add(reading)
            if asked is not arguments:  # it was not the whole call
                return self._find(reading, look, function, arguments)
            self.features.put(_key(self.name + reading, arguments), made)
        else:
            for place, value in zip(places, each, strict=True):
                found[keys[place]] = value
                self.features.put(keys[place], value)
        self.features.misses += 1
        return made if len(places) == len(keys) else _joined([found[key] for key in keys])

    def _named(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, as the model's decorators want them."""
        rest = next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        return {name: value for name, value in arguments.items() if name != rest} | arguments.get(rest, {})


def _parts(arguments: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The arguments for each image alone; None where the tensors do not have one row per image."""
    counts = {len(value) for value in arguments.values() if isinstance(value, Tensor) and value.dim()}
    if len(counts) != 1 or any(isinstance(value, list | tuple) for value in arguments.values()):
        return None
    return [{name: _chosen(value, [place]) for name, value in arguments.items()} for place in range(counts.pop())]


def _chosen(value: Any, places: list[int]) -> Any:
    return value[places] if isinstance(value, Tensor) and value.dim() else value


def _split(made: tuple[Any, Seen], count: int) -> list[tuple[Any, Seen]] | None:
    """An encoding as one of each image; None when it does not say which part is whose."""
    output, seen = made[0], made[1].split(count)
    pooled = output.pooler_output
    others = [item.name for item in dataclasses.fields(output) if item.name != "pooler_output"]
    if seen is None or len(pooled) != count or any(getattr(output, name) is not None for name in others):
        return None
    if isinstance(pooled, Tensor):
        alone = [part[None].clone() for part in pooled]
    else:
        alone = [[part.clone()] for part in pooled]
    return [(dataclasses.replace(output, pooler_output=part), mine) for part, mine in zip(alone, seen, strict=True)]


def _joined(parts: list[tuple[Any, Seen]]) -> tuple[Any, Seen]:
    if len(parts) == 1:
        return parts[0]
    pooled = [output.pooler_output for output, _ in parts]
    whole = torch.cat(pooled) if isinstance(pooled[0], Tensor) else [one for part in pooled for one in part]
    return dataclasses.replace(parts[0][0], pooler_output=whole), Seen.joined([seen for _, seen in parts])


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
    if isinstance(value, Seen | Call):
        return _size(vars(value))
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
