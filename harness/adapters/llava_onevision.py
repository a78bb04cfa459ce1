"""LLaVA-OneVision: SigLIP without CLS; large grids are resampled, images of a group stay whole, frames are pooled.

The image of a prompt with one image is laid out as in LLaVA-NeXT; when its stitched grid is larger than the configured
number of tiles by more than a tenth (of a side), it is resampled to that size. An image of a prompt with several is one
view and one newline. Frames are projected and resampled to half the side, rounded up; one newline ends the video.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pruneval.harness.adapters.anyres import AnyRes, Bilinear, Sheet, Size
from pruneval.harness.adapters.base import Encoding


class LlavaOnevision(AnyRes):
    """`LlavaOnevisionForConditionalGeneration`."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def cropped(self, encoding: Encoding) -> list[bool]:
        counts = encoding.arguments.get("batch_num_images")
        if counts is None:
            return super().cropped(encoding)
        return [int(count) == 1 for count in counts for _ in range(int(count))]

    def resize(self, height: int, width: int, encoding: Encoding) -> Size:
        limit = encoding.arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        tiles = int(limit.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (tiles * self.grid[0] ** 2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)

    def frame(self) -> Sheet:
        size = (math.ceil(self.grid[0] / 2), math.ceil(self.grid[1] / 2))
        return Sheet((1, 1), (0, 0, *self.grid), size, Bilinear(size))

    def video(self, frames: int) -> tuple[Sheet, ...]:
        return (self.frame(),) * (frames - 1) + (dataclasses.replace(self.frame(), newline="end"),)
