"""Full-size models with random weights, from dimensions alone: what is timed does not depend on what was learned.

`config_of` is the inverse of `dimensions_config.dimensions_of`; `scaled` makes a narrower and shallower model of the
same shape for machines without a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import nn

from pruneval.harness.dimensions import Decoder, Dimensions, Vision
from pruneval.harness.errors import UserError

IMAGE, VIDEO, START, END, PAD, BOS, EOS = 10, 11, 12, 13, 0, 1, 2
SPECIAL = (IMAGE, VIDEO, START, END, PAD, BOS, EOS)
SIDES = (1, 2, 3, 4, 5, 6)
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Rows and columns of tiles: of LLaVA-OneVision any pair of `SIDES`, of LLaVA-NeXT these."""


def scaled(dimensions: Dimensions, width: float = 1.0, depth: float = 1.0) -> Dimensions:
    """A model with a fraction of the heads, features and layers; heads keep their width.

    Raises: UserError when less than one head or two layers would be left.
    """
    if (width, depth) == (1.0, 1.0):
        return dimensions
    if not (0 < width <= 1 and 0 < depth <= 1):
        raise UserError(f"width and depth must be in (0, 1], not {width:g} and {depth:g}")
    vision, decoder = dimensions.vision, dimensions.decoder
    heads, seen = round(decoder.heads * width), round(vision.heads * width)
    layers, seen_layers = round(decoder.layers * depth), round(vision.layers * depth)
    if min(heads, seen) < 1 or min(layers, seen_layers) < 2:
        raise UserError(f"width {width:g} and depth {depth:g} leave nothing of {dimensions.name}")
    kv = max(1, heads * decoder.kv_heads // decoder.heads)
    while heads % kv:
        kv -= 1
    small = replace(
        decoder,
        layers=layers,
        hidden=heads * decoder.head_dim,
        heads=heads,
        kv_heads=kv,
        mlp=round(decoder.mlp * width),
    )
    full = tuple(sorted({min(seen_layers - 1, round((layer + 1) * depth) - 1) for layer in vision.full_layers}))
    tower = replace(
        vision, layers=seen_layers, hidden=seen * vision.head_dim, heads=seen, mlp=round(vision.mlp * width),
        full_layers=full,
    )  # fmt: skip
    wide = tower.hidden * dimensions.projector.merge
    middle = wide if dimensions.family.startswith("qwen") else small.hidden
    norm = dimensions.projector.norm * tower.hidden // vision.hidden
    projector = replace(dimensions.projector, inputs=wide, middle=middle, outputs=small.hidden, norm=norm)
    name = f"{dimensions.name} at {width:g} of its width and {depth:g} of its depth"
    return replace(dimensions, name=name, vision=tower, decoder=small, projector=projector)


def config_of(dimensions: Dimensions) -> Any:
    """The transformers config of a model with these dimensions. Raises: UserError for an unknown family."""
    family, vision = dimensions.family, dimensions.vision
    common: dict[str, Any] = {"tie_word_embeddings": dimensions.decoder.tied, "image_token_id": IMAGE}
    text = _text(dimensions.decoder)
    if family == "qwen2_5_vl":
        return hf.Qwen2_5_VLConfig(
            vision_config=_qwen_tower(vision, dimensions.decoder.hidden),
            text_config=_mrope(dimensions.decoder),
            video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END, **common,
        )  # fmt: skip
    if family == "internvl":
        side = int(vision.patches**0.5) * 14
        tower = _tower(vision) | {
            "model_type": "internvl_vision", "image_size": [side, side], "patch_size": [14, 14],
            "attention_bias": vision.qkv_bias, "use_qk_norm": vision.qk_norm,
            "norm_type": "rms_norm" if vision.norm == "rms" else "layer_norm",
            "use_mean_pooling": not vision.final_norm, "use_absolute_position_embeddings": bool(vision.positions),
        }  # fmt: skip
        per = (dimensions.tile or (0, 0))[0]
        return hf.InternVLConfig(vision_config=tower, text_config=text, image_seq_length=per, **common)
    per = (dimensions.tile or (0, 0))[0]
    side = int(vision.patches**0.5) * 14
    siglip = vision.class_tokens == 0
    kind = hf.SiglipVisionConfig if siglip else hf.CLIPVisionConfig
    tower = kind(**_tower(vision), image_size=side, patch_size=14, **({"vision_use_head": False} if siglip else {}))
    common |= {"vision_config": tower, "text_config": text}
    if family == "llava":
        return hf.LlavaConfig(**common, image_seq_length=per)
    pinpoints = [[side * rows, side * columns] for rows in SIDES for columns in SIDES]
    if family == "llava_onevision":
        return hf.LlavaOnevisionConfig(**common, image_grid_pinpoints=pinpoints, video_token_id=VIDEO)
    few = [[side * rows, side * columns] for rows, columns in NEXT]
    if family == "llava_next":
        return hf.LlavaNextConfig(**common, image_grid_pinpoints=few, image_seq_length=per)
    if family == "llava_next_video":
        return hf.LlavaNextVideoConfig(**common, image_grid_pinpoints=few, image_seq_length=per, video_token_id=VIDEO)
    if family == "video_llava":
        del common["image_token_id"]
        return hf.VideoLlavaConfig(**common, image_token_index=IMAGE, video_token_index=VIDEO)
    raise UserError(f"no random weights for the family {family!r}")


def build(dimensions: Dimensions, device: str = "cpu", dtype: str = "float32", kernel: str = "sdpa") -> nn.Module:
    """A stock transformers model with random weights, ready to generate answers that never end by themselves."""
    config = config_of(dimensions)
    own = dimensions.family == "video_llava"  # in no auto class
    make = hf.VideoLlavaForConditionalGeneration._from_config if own else hf.AutoModelForImageTextToText.from_config
    torch.manual_seed(0)
    with torch.device(device):
        model = make(config, attn_implementation=kernel, dtype=getattr(torch, dtype)).eval()
    endless(model)
    return model


def endless(model: nn.Module) -> None:
    """Lets the model generate exactly as many tokens as asked for, and no placeholder among them."""
    config = model.config
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    placeholders = [getattr(config, name, None) for name in names]
    model.generation_config.suppress_tokens = [one for one in placeholders if one is not None]


def _tower(vision: Vision) -> dict[str, Any]:
    return {
        "hidden_size": vision.hidden, "intermediate_size": vision.mlp, "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
    }  # fmt: skip


def _qwen_tower(vision: Vision, out: int) -> dict[str, Any]:
    return {
        "depth": vision.layers, "hidden_size": vision.hidden, "intermediate_size": vision.mlp,
        "num_heads": vision.heads, "out_hidden_size": out, "patch_size": 14, "temporal_patch_size": 2,
        "window_size": 14 * vision.window, "fullatt_block_indexes": list(vision.full_layers),
    }  # fmt: skip


def _sizes(decoder: Decoder) -> dict[str, Any]:
    return {
        "hidden_size": decoder.hidden, "intermediate_size": decoder.mlp, "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads, "num_key_value_heads": decoder.kv_heads, "vocab_size": decoder.vocab,
        "max_position_embeddings": 32768, "tie_word_embeddings": decoder.tied, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS,
    }  # fmt: skip


def _mrope(decoder: Decoder) -> dict[str, Any]:
    part = decoder.head_dim // 2 // 8
    sections = [2 * part, 3 * part, 3 * part]
    return _sizes(decoder) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}


def _text(decoder: Decoder) -> Any:
    """Qwen2 has biases on queries, keys and values; every other decoder here is a Llama by its dimensions."""
    if decoder.qkv_bias:
        return hf.Qwen2Config(**_sizes(decoder))
    return hf.LlamaConfig(**_sizes(decoder), head_dim=decoder.head_dim)
