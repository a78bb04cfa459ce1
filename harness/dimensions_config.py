"""The dimensions of a model that is not shipped as facts, read from its transformers config.

Works on the attributes of a config object alone, so neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pruneval.harness.dimensions import Decoder, Dimensions, Input, Projector, TextTower, Vision
from pruneval.harness.errors import UserError

T = TypeVar("T")

FAMILIES = (
    "internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "video_llava",
)  # fmt: skip
GRID = ("qwen2_5_vl", "qwen3_vl")
"""Families whose tower takes an image at its own size."""

OWN = "one tile (or 16 x 16 tokens) and 75 others; no published length"


def read(folder: Path, name: str | None = None) -> Dimensions:
    """The dimensions of the model in a folder. Transformers is imported only for a config that leaves out defaults."""
    found = _read(folder, lambda config: dimensions_of(config, name))
    beside = Path(folder, "text_tower")
    return replace(found, text_tower=_read(beside, text_tower_of)) if (beside / "config.json").is_file() else found


def _read(folder: Path, of: Callable[[Any], T]) -> T:
    try:
        return of(json.loads(Path(folder, "config.json").read_text(encoding="utf-8"), object_hook=_namespace))
    except AttributeError:
        from transformers import AutoConfig

        return of(AutoConfig.from_pretrained(folder, local_files_only=True))


def _namespace(fields: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def text_tower_of(config: Any) -> TextTower:
    """The text tower of a `CLIPConfig`."""
    text = config.text_config
    return TextTower(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.max_position_embeddings,
        config.projection_dim,
    )


def dimensions_of(config: Any, name: str | None = None) -> Dimensions:
    """Read the dimensions off a transformers config.

    Args:
        config: the config of a whole multimodal model, such as `model.config`.
        name: what to call the model; its family if not given.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise UserError(f"no cost model for the family {family!r}; known: {', '.join(FAMILIES)}")
    tower = config.vision_config
    decoder = _decoder(config)
    vision = (
        _qwen(tower, family == "qwen2_5_vl")
        if family in GRID
        else _internvit(tower)
        if family == "internvl"
        else _vit(tower)
    )
    common = {"name": name or family, "family": family, "vision": vision, "decoder": decoder}
    full = vision.patches + vision.class_tokens
    if family in GRID:
        merge = tower.spatial_merge_size**2
        wide, deep = vision.hidden * merge, len(tower.deepstack_visual_indexes) if family == "qwen3_vl" else 0
        norm = vision.hidden if family == "qwen2_5_vl" else 2 * vision.hidden + 2 * wide * deep
        projector = Projector(wide, wide, decoder.hidden, norm, merge, 1 + deep)
        side = tower.spatial_merge_size
        return Dimensions(**common, projector=projector, input=Input(grid=(1, 16 * side, 16 * side), source=OWN))
    if family == "internvl":
        merge = round(1 / config.downsample_ratio**2)
        projector = Projector(vision.hidden * merge, decoder.hidden, decoder.hidden, 2 * vision.hidden * merge, merge)
        per = vision.patches // merge
        return Dimensions(
            **common, projector=projector, tile=(per, per), frame=(per, per), input=Input(tiles=1, source=OWN)
        )
    projector = Projector(vision.hidden, decoder.hidden, decoder.hidden)
    per = vision.patches if config.vision_feature_select_strategy == "default" else full
    common |= {"projector": projector, "input": Input(tiles=1, source=OWN), "tile": (per, per)}
    if family == "llava_onevision":
        side = -(-int(vision.patches**0.5) // 2)
        return Dimensions(**common, newline=True, frame=(side * side, per), frame_extra=1)
    if family == "llava_next_video":
        side = int(vision.patches**0.5) // config.spatial_pool_stride
        return Dimensions(**common, newline=True, frame=(side * side, side * side))
    if family == "video_llava":
        return Dimensions(**common, towers=2, frame=(full, full))
    return Dimensions(**common, newline=family == "llava_next")


def _decoder(config: Any) -> Decoder:
    text = config.text_config
    own = text.head_dim if config.model_type == "qwen3_vl" else getattr(text, "head_dim", None)
    return Decoder(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=own or text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        qkv_bias=text.model_type.startswith("qwen2"),
        qk_norm=text.model_type.startswith("qwen3"),
        tied=bool(config.tie_word_embeddings),
    )


def _vit(tower: Any) -> Vision:
    """CLIP (a class token, norms on both ends) or SigLIP (neither, and a bias on the patches)."""
    clip = tower.model_type.startswith("clip")
    patches = (tower.image_size // tower.patch_size) ** 2
    return Vision(
        layers=tower.num_hidden_layers,
        hidden=tower.hidden_size,
        heads=tower.num_attention_heads,
        head_dim=tower.hidden_size // tower.num_attention_heads,
        mlp=tower.intermediate_size,
        patch_values=tower.num_channels * tower.patch_size**2,
        patches=patches,
        class_tokens=int(clip),
        positions=patches + clip,
        patch_bias=not clip,
        pre_norm=clip,
        final_norm=True,
    )


def _internvit(tower: Any) -> Vision:
    patch, image = _pair(tower.patch_size), _pair(tower.image_size)
    patches = prod(side // cut for side, cut in zip(image, patch, strict=True))
    return Vision(
        layers=tower.num_hidden_layers,
        hidden=tower.hidden_size,
        heads=tower.num_attention_heads,
        head_dim=tower.hidden_size // tower.num_attention_heads,
        mlp=tower.intermediate_size,
        patch_values=tower.num_channels * prod(patch),
        patches=patches,
        class_tokens=1,
        norm="rms" if tower.norm_type == "rms_norm" else "layer",
        qkv_bias=tower.attention_bias,
        qk_norm=tower.use_qk_norm,
        layer_scale=True,
        patch_bias=True,
        positions=patches + 1 if tower.use_absolute_position_embeddings else 0,
        final_norm=not tower.use_mean_pooling,
    )


def _qwen(tower: Any, windows: bool) -> Vision:
    """Qwen2.5-VL (windows, gated, RMS norms) or Qwen3-VL (none of them, but a learned position table)."""
    return Vision(
        layers=tower.depth,
        hidden=tower.hidden_size,
        heads=tower.num_heads,
        head_dim=tower.hidden_size // tower.num_heads,
        mlp=tower.intermediate_size,
        gated=windows,
        patch_values=tower.in_channels * tower.temporal_patch_size * tower.patch_size**2,
        patches=0,
        norm="rms" if windows else "layer",
        patch_bias=not windows,
        positions=0 if windows else tower.num_position_embeddings,
        window=tower.window_size // tower.patch_size if windows else 0,
        full_layers=tuple(tower.fullatt_block_indexes) if windows else (),
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
