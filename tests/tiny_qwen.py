"""Tiny random Qwen2.5-VL and Qwen3-VL with prompts that need no processor: patches are random, ids are written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END, PAD, BOS, EOS = 240, 241, 242, 243, 3, 1, 2
ROW = {"qwen2_5_vl": 3 * 2 * 14 * 14, "qwen3_vl": 3 * 2 * 16 * 16}  # numbers per patch

Size = tuple[int, int, int]  # time, rows and columns of patches


def qwen25(kernel: str = "sdpa", layers: int = 4, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL in small: windows of 4 x 4 tokens in vision layers 0 and 2, full attention in 1 and 3."""
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 64,
        "tokens_per_second": 2,
    }
    text = _text(layers) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_ids())
    return _made(Qwen2_5_VLForConditionalGeneration, config, kernel, seed)


def qwen3(kernel: str = "sdpa", layers: int = 5, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL in small: features of vision layers 0 and 2 are added behind decoder layers 0 and 1."""
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
        "out_hidden_size": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = _text(layers) | {"head_dim": 16, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_ids())
    return _made(Qwen3VLForConditionalGeneration, config, kernel, seed)


def prompt(family: str, *parts: int | Size, seed: int = 0, slices: bool = False) -> dict[str, Any]:
    """One sample of text and visual parts.

    Args:
        family: "qwen2_5_vl" or "qwen3_vl".
        parts: a number of text tokens, or the size of an image (one slice) or video (more) in patches.
        seed: of text and patches.
        slices: whether every slice of a video stands in its own frame of start and end tokens, as Qwen3-VL has it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, kinds = [BOS], [0]
    patches: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    sizes: dict[str, list[Size]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(4, 200, (part,), generator=generator).tolist()
            kinds += [0] * part
            continue
        time, rows, columns = part
        kind, token, number = ("image", IMAGE, 1) if time == 1 else ("video", VIDEO, 2)
        frames = time if slices and time > 1 else 1
        each = time * rows * columns // 4 // frames
        ids += ([START] + [token] * each + [END]) * frames
        kinds += ([0] + [number] * each + [0]) * frames
        patches[kind].append(torch.randn(time * rows * columns, ROW[family], generator=generator, dtype=torch.float64))
        sizes[kind].append(part)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([kinds]),
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if patches[kind]:
            inputs |= {name: torch.cat(patches[kind]), f"{kind}_grid_thw": torch.tensor(sizes[kind])}
    return inputs


def batch(*samples: dict[str, Any]) -> dict[str, Any]:
    """Left-padded batch of samples."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    out = {}
    for name, value in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        rows = [sample[name] for sample in samples]
        out[name] = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=value) for row in rows])
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found: Sequence[torch.Tensor] = [sample[name] for sample in samples if name in sample]
        if found:
            out[name] = torch.cat(list(found))
    return out


def _text(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _ids() -> dict[str, Any]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": True,
    }


def _made(kind: Any, config: Any, kernel: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    model.set_attn_implementation(kernel)
    model.generation_config.eos_token_id = None
    return model.double().eval()
