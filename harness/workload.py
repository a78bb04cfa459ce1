"""Prompts of a wished length for a model of any family: random pixels, random words, a placeholder per feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruneval.harness.adapters import Adapter
from pruneval.harness.errors import UserError

Inputs = dict[str, Tensor]
WORDS = (100, 1000)
"""Ids that random text is drawn from."""


@dataclass(frozen=True)
class Workload:
    """A batch of prompts of equal length, so that nothing is padded.

    Attributes:
        inputs: what the model takes, on its device.
        visual: visual tokens of each prompt.
        text: all other tokens of each prompt.
    """

    inputs: Inputs
    visual: int
    text: int

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return len(self.inputs["input_ids"])


def workload(adapter: Adapter, visual: int, text: int = 75, batch: int = 1, seed: int = 0) -> Workload:
    """Prompts with about `visual` visual tokens (as near as the family's images or videos come) and `text` others.

    Raises: UserError when `text` is too short or the family is unknown.
    """
    if text < 4:
        raise UserError(f"text tokens must be at least 4, not {text}")
    model, draw = adapter.model, torch.Generator().manual_seed(seed)
    parts = [_shown(adapter, visual, draw) for _ in range(batch)]
    kind, first = parts[0]
    count = _features(model, kind, _placed(first, model))
    video = getattr(model.config, "video_token_id", None)
    placeholder = video if kind == "video" else model.config.image_token_id
    before = min(text - 2, 8)
    words = torch.randint(*_range(model), (batch, text), generator=draw)
    ids = torch.cat([words[:, :before], torch.full((batch, count), placeholder), words[:, before:]], dim=1)
    inputs: Inputs = {name: torch.cat([part[name] for _, part in parts]) for name in first}
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == placeholder).long() * (2 if kind == "video" else 1)
    return Workload(_placed(inputs, model), count, text)


def _range(model: nn.Module) -> tuple[int, int]:
    vocab = model.config.get_text_config().vocab_size
    return WORDS if vocab > WORDS[1] else (vocab // 4, vocab // 2)  # placeholders have low or high ids


def _placed(inputs: Inputs, model: nn.Module) -> Inputs:
    dtype = model.dtype
    return {
        name: part.to(model.device, dtype if part.is_floating_point() else part.dtype) for name, part in inputs.items()
    }


def _features(model: nn.Module, kind: str, inputs: Inputs) -> int:
    encode = model.model.get_image_features if kind == "image" else model.model.get_video_features
    with torch.no_grad():
        features: Any = encode(**inputs).pooler_output
    return sum(item.shape[:-1].numel() for item in features)


def _shown(adapter: Adapter, visual: int, draw: torch.Generator) -> tuple[str, Inputs]:
    """What one prompt shows, and of which kind it is."""
    config, family = adapter.config, adapter.config.model_type
    vision = config.vision_config
    if family.startswith("qwen"):
        rows = max(1, int(visual**0.5))
        grid = torch.tensor([[1, 2 * rows, 2 * max(1, round(visual / rows))]])
        values = 3 * 2 * vision.patch_size**2
        return "image", {"pixel_values": torch.randn(int(grid.prod()), values, generator=draw), "image_grid_thw": grid}
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    cells = (size // patch) ** 2
    if family in ("llava", "internvl"):
        tiles = max(1, round(visual / (cells // adapter.merge)))
        return "image", {"pixel_values": torch.randn(tiles, 3, size, size, generator=draw)}
    if family in ("video_llava", "llava_next_video"):
        each = cells + 1 if family == "video_llava" else cells // config.spatial_pool_stride**2
        frames = max(1, round(visual / each))
        return "video", {"pixel_values_videos": torch.randn(1, frames, 3, size, size, generator=draw)}
    if family in ("llava_next", "llava_onevision"):
        height, width = _image(adapter, visual, size)
        tiles = 1 + -(-height // size) * -(-width // size)
        return "image", {
            "pixel_values": torch.randn(1, tiles, 3, size, size, generator=draw),
            "image_sizes": torch.tensor([[height, width]]),
        }
    raise UserError(f"no workload for the family {family!r}")


def _image(adapter: Any, visual: int, size: int) -> tuple[int, int]:
    """The whole number of tiles, (height, width) in pixels, whose tokens come nearest; the squarest of equals."""

    class Plain:
        arguments: dict[str, Any] = {}  # noqa: RUF012  read only

    def tokens(shape: tuple[int, int]) -> int:
        return sum(sheet.tokens for sheet in adapter.image(torch.tensor(shape), True, Plain()))

    shapes = [tuple(pair) for pair in adapter.config.image_grid_pinpoints]
    return min(shapes, key=lambda shape: (abs(tokens(shape) - visual), abs(shape[0] - shape[1])))
