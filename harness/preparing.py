"""What a model is given for a question, made once: the chat text, its tokens, the pixels.

The methods of a sweep ask the same questions of the same model, so what its processor makes of a question is kept, in
a bounded store that lives as long as the processor. A batch is put together from single questions: tokens padded on
the left, pixels one after another, exactly as the processor does with several questions at once (a test compares).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.generation import one_line, picture_digest
from pruneval.harness.video import Clip, read

MEMORY = 2**29
"""Bytes of prepared questions kept for each processor."""
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What has one number per token."""


@dataclass(frozen=True)
class Prepared:
    """One question as the model gets it."""

    text: str
    """The prompt in the chat template, placeholders not yet expanded."""
    tensors: Mapping[str, Tensor]
    """The processor's output for this question alone."""
    picture: str | None
    """Digest of the pixels shown; None without any."""
    shown: int
    """Images and videos."""

    @property
    def tokens(self) -> int:
        """Length of the prompt, visual tokens included."""
        return self.tensors["input_ids"].shape[1]

    @property
    def bytes(self) -> int:
        """What keeping this takes."""
        return sum(part.numel() * part.element_size() for part in self.tensors.values())


class Store:
    """Prepared questions, the latest used of them, up to so many bytes."""

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Hashable, Prepared] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """What is kept under `key`, or what `make()` gives."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = make()
        self.size += made.bytes
        while self.size > self.limit and len(self._kept) > 1:
            self.size -= self._kept.popitem(last=False)[1].bytes
        return made


_STORES: weakref.WeakKeyDictionary[Any, Store] = weakref.WeakKeyDictionary()


def store_of(processor: Any) -> Store:
    """The processor's store."""
    return _STORES.setdefault(processor, Store())


def forget(processor: Any) -> None:
    """Drops what is kept of a processor's work."""
    _STORES.pop(processor, None)


class Preparing:
    """Prepares requests for one model, and lets its processor's store know them.

    Args:
        loaded: the model, with `processor` and `entry`.
        frames: of each video.
        chat: a request's text in the chat template, its images and the paths of its videos.
    """

    def __init__(self, loaded: Any, frames: int, chat: Callable[[Any], tuple[str, list[Any], list[str]]]) -> None:
        self.loaded, self.frames, self.chat = loaded, frames, chat

    def of(self, request: Any) -> Prepared:
        """The request as the model gets it; the request holds it from now on."""
        if request.prepared is None:
            request.prepared = self._kept(request, lambda: self._alone(request))
        return request.prepared

    def measure(self, request: Any) -> tuple[int, int]:
        """Images and videos of a request, and tokens."""
        prepared = self.of(request)
        return prepared.shown, prepared.tokens

    def ready(self, window: Sequence[Any]) -> None:
        """Prepares requests, at once where the processor allows it. Raises: SampleFailure, UserError."""
        new = [request for request in window if self._key(request) not in store_of(self.loaded.processor)]
        with contextlib.suppress(Exception):  # whose fault it is shows when they are prepared one by one
            chats = [self.chat(request) for request in new]
            if len(new) > 1 and not any(paths for _, _, paths in chats):
                texts, images, _ = zip(*chats, strict=True)
                for request, made in zip(new, together(self.loaded.processor, texts, images) or (), strict=False):
                    request.prepared = self._kept(request, functools.partial(_itself, made))
        for request in window:
            try:
                self.of(request)
            except UserError:
                raise
            except Exception as error:
                raise SampleFailure(request.key, one_line(error)) from error

    def _alone(self, request: Any) -> Prepared:
        text, images, paths = self.chat(request)
        clips = [read(path, self.frames) for path in paths]
        return prepare(self.loaded.processor, text, images, clips, self.loaded.entry.name if clips else "")

    def _kept(self, request: Any, make: Callable[[], Prepared]) -> Prepared:
        return store_of(self.loaded.processor).get(self._key(request), make) if request.data else make()

    def _key(self, request: Any) -> Hashable:
        return request.data, request.key, request.digest, self.frames


def _itself(made: Prepared) -> Prepared:
    return made


def prepare(processor: Any, text: str, images: Sequence[Any], clips: Sequence[Clip], model: str = "") -> Prepared:
    """One question through the model's processor.

    Args:
        text: the prompt in the chat template.
        images: PIL images, in the order of their placeholders.
        clips: sampled videos, likewise.
        model: its name, for the message.

    Raises: UserError when the model takes no videos.
    """
    made = processor(images=list(images) or None, text=[text], return_tensors="pt", **videos(processor, clips, model))
    frames = [Image.fromarray(frame) for clip in clips for frame in clip.frames]
    return Prepared(text, dict(made), picture_digest([*images, *frames]), len(images) + len(clips))


def together(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> list[Prepared] | None:
    """Several questions through the processor at once, which costs less than one by one.

    None where its output cannot be taken apart again: where an image does not have exactly one row of pixels (tiles,
    packed patches).
    """
    shown = [image for each in images for image in each]
    made = dict(
        processor(images=shown or None, text=list(texts), padding=True, padding_side="left", return_tensors="pt")
    )
    rest = [part for name, part in made.items() if name not in TEXT]
    if any(len(part) != len(shown) or part.dim() > 4 for part in rest):
        return None
    found, start = [], 0
    for row, (text, each) in enumerate(zip(texts, images, strict=True)):
        first = int((made["attention_mask"][row] == 0).sum())
        tensors = {name: part[row : row + 1, first:].clone() for name, part in made.items() if name in TEXT}
        if each:
            stop = start + len(each)
            tensors |= {name: part[start:stop].clone() for name, part in made.items() if name not in TEXT}
            start = stop
        found.append(Prepared(text, tensors, picture_digest(list(each)), len(each)))
    return found


def videos(processor: Any, clips: Sequence[Clip], model: str = "") -> dict[str, Any]:
    """The processor's arguments for sampled videos; none where there are no videos."""
    if not clips:
        return {}
    if getattr(processor, "video_processor", None) is None:
        raise UserError(f"model {model!r} takes no videos")
    metadata = [clip.metadata for clip in clips]
    return {"videos": [clip.frames for clip in clips], "do_sample_frames": False, "video_metadata": metadata}


def collate(batch: Sequence[Prepared], pad: int) -> dict[str, Tensor]:
    """The tensors of several questions as one batch: tokens padded on the left, tiles filled up with zeros."""
    names = dict.fromkeys(name for one in batch for name in one.tensors)
    parts = {name: [one.tensors[name] for one in batch if name in one.tensors] for name in names}
    return {name: _joined(name, found, pad if name == "input_ids" else 0) for name, found in parts.items()}


def _joined(name: str, parts: list[Tensor], fill: int) -> Tensor:
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [most - size for most, size in zip(largest, part.shape[1:], strict=True)]
        sides = [side for lack in reversed(missing) for side in ((lack, 0) if name in TEXT else (0, lack))]
        padded.append(functional.pad(part, sides, value=fill))
    return torch.cat(padded)
