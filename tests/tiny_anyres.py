"""Tiny random LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video with their real processors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torchvision.transforms.v2.functional import to_pil_image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

FAMILIES = ("llava_next", "llava_onevision", "llava_next_video")
NEXT_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
OV_PINPOINTS = [[42 * rows, 42 * columns] for rows in range(1, 7) for columns in range(1, 7)]
HALF = [0.5, 0.5, 0.5]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, left padding; `<image>` and `<video>` are tokens of their own."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>"]
    vocabulary = {token: index for index, token in enumerate(specials + [chr(code) for code in range(32, 127)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<image>|<video>|[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}, padding_side="left",
    )  # fmt: skip


@functools.cache
def processor(family: str) -> Any:
    """The family's own processor at tiny sizes."""
    if family == "llava_onevision":
        size = {"height": 42, "width": 42}
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=OV_PINPOINTS, image_mean=HALF, image_std=HALF),
            tokenizer(),
            LlavaOnevisionVideoProcessor(size=size, image_mean=HALF, image_std=HALF),
            num_image_tokens=9,
            vision_feature_select_strategy="full",
        )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    image = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=NEXT_PINPOINTS)
    common = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava_next":
        return LlavaNextProcessor(image, tokenizer(), **common)
    return LlavaNextVideoProcessor(LlavaNextVideoVideoProcessor(**sizes), image, tokenizer(), **common)


@functools.cache
def model(family: str, kernel: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A model of the family for tests that leave it as it was; weights that are large enough to matter."""
    text = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14,
    }  # fmt: skip
    tokens = tokenizer()
    ids = {"image_token_id": tokens.image_token_id, "tie_word_embeddings": False}
    if family == "llava_onevision":
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision, image_size=42, vision_use_head=False),
            text_config=Qwen2Config(**text, max_position_embeddings=32768),
            image_grid_pinpoints=OV_PINPOINTS, video_token_id=tokens.video_token_id, **ids,
        )  # fmt: skip
        cls: Any = LlavaOnevisionForConditionalGeneration
    else:
        parts = {
            "vision_config": CLIPVisionConfig(**vision, image_size=56, projection_dim=16),
            "text_config": LlamaConfig(**text, max_position_embeddings=4096),
            "image_grid_pinpoints": NEXT_PINPOINTS, "image_seq_length": 16,
        }  # fmt: skip
        if family == "llava_next":
            config, cls = LlavaNextConfig(**parts, **ids), LlavaNextForConditionalGeneration
        else:
            config = LlavaNextVideoConfig(**parts, **ids, video_token_id=tokens.video_token_id)
            cls = LlavaNextVideoForConditionalGeneration
    config._attn_implementation = kernel
    torch.manual_seed(0)
    made = cls(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                weight.mul_(2 if "vision_tower" in name else 4)
            elif "image_newline" in name:
                weight.mul_(4)
    made.set_attn_implementation(kernel)
    made.generation_config.eos_token_id = None
    return made.to(dtype).eval()


def picture(height: int, width: int, seed: int = 0) -> Any:
    """A PIL image of blocks of colour."""
    generator = torch.Generator().manual_seed(1000 * height + width + seed)
    blocks = torch.rand(3, 5, 6, generator=generator)
    return to_pil_image(torch.nn.functional.interpolate(blocks[None], (height, width))[0])


def clip(frames: int = 8, seed: int = 0) -> torch.Tensor:
    """A video, (frames, 3, 60, 80) bytes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(frames, 3, 60, 80, generator=generator) * 255).byte()


def inputs(family: str, *samples: tuple[str, list[Any], list[Any]], nested: bool = True) -> dict[str, Any]:
    """A batch made by the processor.

    Args:
        family: whose processor.
        samples: text with `<image>` and `<video>`, images, videos.
        nested: whether images come as one list per sample with images, or in one flat list.
    """
    text = [sample[0] for sample in samples]
    images = [sample[1] for sample in samples if sample[1]]
    videos = [video for sample in samples for video in sample[2]]
    if not nested:
        images = [image for group in images for image in group]
    made = processor(family)(
        text=text, images=images or None, **({"videos": videos} if videos else {}), padding=True, return_tensors="pt"
    )
    return {name: value.double() if value.is_floating_point() else value for name, value in made.items()}
