"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; cells of a frame are pooled 2 x 2 before the projector, no newlines."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pruneval.harness.adapters.anyres import AnyRes, Sheet
from pruneval.methods.base import Method


class LlavaNextVideo(AnyRes):
    """`LlavaNextVideoForConditionalGeneration` with a CLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)

    @property
    def pool(self) -> nn.Module:
        """What pools (1, c, h, w) maps of a frame; averages in the released checkpoints."""
        return self.model.model.vision_resampler.pool

    def frame(self) -> Sheet:
        stride = self.config.spatial_pool_stride
        size = (self.grid[0] // stride, self.grid[1] // stride)
        return Sheet((1, 1), (0, 0, *self.grid), size, self.pool)

    def projects_cells(self, kind: str) -> bool:
        return kind == "image"

    def supports(self, method: Method) -> str | None:
        reason = super().supports(method)
        reads = reason is None and any(need.vision for need in method.needs(self.shape).values())
        if reads and isinstance(self.pool, nn.Conv2d):
            return f"{method.card.name} reads the vision tower, but frames pooled by a convolution have no scores"
        return reason
