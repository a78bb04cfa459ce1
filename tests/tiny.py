"""Tiny random models of the real transformers classes, for offline tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, PAD, BOS, EOS = 250, 3, 1, 2
RECIPE = Path(__file__).parent / "fitprune_four_layers.json"


def params(method: str, keep: float, layers: int = 4) -> dict[str, Any]:
    """Parameters that bring a method to a budget: most by `keep`, calibrated ones by a recipe for this depth."""
    if method == "gsearch":
        return {"rates": ",".join([str(keep)] * len(range(2, layers, 3)))}
    extra = {"fitprune": {"recipe": str(RECIPE)}, "prunevid": {"layer": 1}}
    return {"keep": keep} | extra.get(method, {})


def llava(
    kernel: str = "sdpa", layers: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small: 16 visual tokens per image, grouped queries, deterministic weights that are large enough
    to matter.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    config._attn_implementation = kernel
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    model.set_attn_implementation(kernel)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


shared = functools.cache(llava)
"""One model per kind for all tests; they leave it as it was."""


def prompt(
    before: int, after: int, images: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """One sample: text, `images` images of 16 tokens with a text token between them, text."""
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(4, 200, (n,), generator=generator).tolist()

    ids = [BOS, *text(before - 1)]
    for image in range(images):
        ids += text(1) * (image > 0) + [IMAGE] * 16
    ids += text(after)
    pixels = torch.randn(images, 3, 56, 56, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels,
    }


def batch(*samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left-padded batch of samples."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    pad = torch.nn.functional.pad
    ids = [pad(sample["input_ids"], (width - sample["input_ids"].shape[1], 0), value=PAD) for sample in samples]
    masks = [pad(sample["attention_mask"], (width - sample["input_ids"].shape[1], 0)) for sample in samples]
    pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    out = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    return out | ({"pixel_values": torch.cat(pixels)} if pixels else {})
