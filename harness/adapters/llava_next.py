"""LLaVA-NeXT: an image is a base tile and then its crops, stitched and unpadded, with a newline after every row."""

from __future__ import annotations

from typing import ClassVar

from pruneval.harness.adapters.anyres import AnyRes


class LlavaNext(AnyRes):
    """`LlavaNextForConditionalGeneration` with a CLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
