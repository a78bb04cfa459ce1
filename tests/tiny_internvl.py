"""Tiny random InternVL models: every language model and both vision encoders that InternVL2 comes with."""

from __future__ import annotations

import functools

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, Phi3Config, Qwen2Config

IMAGE, START, END, PAD, BOS = 249, 247, 248, 3, 1
PER_TILE = 4  # 4 x 4 cells, 2 x 2 tokens

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 4096, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


def text_config(kind: str) -> Qwen2Config | LlamaConfig | Phi3Config:
    """The language model's config: "qwen2", "llama" (InternLM2) or "phi3"."""
    if kind == "qwen2":
        return Qwen2Config(**SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    if kind == "llama":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        return LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=rope)
    factors = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors}
    return Phi3Config(**SIZES | {"max_position_embeddings": 131072}, num_key_value_heads=4, rope_parameters=rope)


@functools.cache
def shared(
    kind: str = "qwen2", large_vision: bool = False, kernel: str = "sdpa", dtype: torch.dtype = torch.float64
) -> InternVLForConditionalGeneration:
    """One model per kind for tests that leave it as it was."""
    return internvl(kind, large_vision, kernel, dtype)


def internvl(
    kind: str = "qwen2",
    large_vision: bool = False,
    kernel: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> InternVLForConditionalGeneration:
    """InternVL in small: 4 visual tokens per tile, weights that are large enough to matter.

    Args:
        kind: language model, as in `text_config`.
        large_vision: an encoder like InternViT-6B (RMSNorm, normalised queries and keys, no biases) instead of -300M.
        kernel: attention implementation.
        dtype: of the weights.
        seed: of the weights.
    """
    vision = {
        "model_type": "internvl_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "attention_bias": not large_vision,
        "use_qk_norm": large_vision, "norm_type": "rms_norm" if large_vision else "layer_norm",
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=text_config(kind), image_token_id=IMAGE, image_seq_length=PER_TILE,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = kernel
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "cls_token" in name or "position_embeddings" in name or weight.ndim == 1:
                weight.add_(torch.randn_like(weight) / 2)  # fresh ones are zeros, ones, or all alike
            else:
                weight.mul_(4)
    model.set_attn_implementation(kernel)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def prompt(
    before: int, after: int, images: tuple[int, ...] = (2,), seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """One sample: text, images between their start and end tokens, text.

    Args:
        before: text tokens before the first image.
        after: text tokens after the last.
        images: tiles of each image.
        seed: of text and pixels.
        dtype: of the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *torch.randint(4, 200, (before - 1,), generator=generator).tolist()]
    for tiles in images:
        ids += [START, *[IMAGE] * (PER_TILE * tiles), END]
    ids += torch.randint(4, 200, (after,), generator=generator).tolist()
    out = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if images:
        pixels = torch.randn(sum(images), 3, 56, 56, generator=generator, dtype=torch.float64)
        out["pixel_values"] = pixels.to(dtype)
    return out


def batch(*samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left-padded batch of samples."""
    width = max(sample["input_ids"].shape[1] for sample in samples)
    pad = torch.nn.functional.pad
    ids = [pad(sample["input_ids"], (width - sample["input_ids"].shape[1], 0), value=PAD) for sample in samples]
    masks = [pad(sample["attention_mask"], (width - sample["input_ids"].shape[1], 0)) for sample in samples]
    pixels = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    out = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
    return out | ({"pixel_values": torch.cat(pixels)} if pixels else {})
