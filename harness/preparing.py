"""What a model is given for a question, made once: the chat text, its tokens, the pixels.

The methods of a sweep ask the same questions of the same model, so what its processor makes of a question is kept, in
a bounded store that lives as long as the processor. A batch is put together from single questions: tokens padded on
the left, pixels one after another, exactly as the processor does with several questions at once (a test compares).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pruneval.harness.errors import UserError
from pruneval.harness.generation import picture_digest
from pruneval.harness.video import Clip

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
