"""The parts of pocket-onevision before training, all of stock classes, begun from the weights of pocket-llava.

An image of the world (96 x 96) is seen whole at 64 x 64 and in four crops of 64 x 64 that tile it at 128 x 128: 64 +
256 tokens and 16 newlines. A frame of a video is one view of 64 x 64, pooled to 4 x 4 tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pruneval.tasks.pocket import build, vision
from pruneval.tasks.pocket.video_prompts import BEST, SELECT
from pruneval.tasks.pocket.world import PATCH

TILE = 64
"""Side of a view in pixels."""
CELLS = TILE // PATCH
"""Side of a view in patches."""
PINPOINTS = [[h, w] for h in (TILE, 2 * TILE) for w in (TILE, 2 * TILE)]
POOLED = CELLS // 2
"""Side of a frame in tokens."""

TEMPLATE = build.TEMPLATE.replace(
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}",
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Pocket-llava's words, with the same numbers, a placeholder for videos and the video benchmarks' instructions."""
    made = build.tokenizer()
    made.add_tokens([AddedToken("<video>", normalized=False, special=True)], special_tokens=True)
    made.add_tokens([AddedToken(phrase, normalized=False) for phrase in (SELECT, BEST)])
    return made


def processor() -> LlavaOnevisionProcessor:
    """The stock processor of the pocket model, with its own tokenizer."""
    looks = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": vision.MEAN.tolist(),
        "image_std": vision.STD.tolist(),
    }
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**looks, image_grid_pinpoints=PINPOINTS), tokenizer(),
        LlavaOnevisionVideoProcessor(**looks), num_image_tokens=CELLS**2, vision_feature_select_strategy="full",
        chat_template=TEMPLATE, image_token="<image>", video_token="<video>",
    )  # fmt: skip


def tower_config() -> SiglipVisionConfig:
    """The tower's dimensions."""
    return SiglipVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=TILE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip


def model(tokens: PreTrainedTokenizerFast) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model; seed torch first."""
    ids = {
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    text = Qwen2Config(
        vocab_size=-(-len(tokens) // 32) * 32, hidden_size=160, intermediate_size=432, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.04,
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=tower_config(), text_config=text, image_token_id=tokens.convert_tokens_to_ids("<image>"),
        video_token_id=tokens.convert_tokens_to_ids("<video>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS, tie_word_embeddings=True,
    )  # fmt: skip
    made = LlavaOnevisionForConditionalGeneration(config)
    made.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ids)
    return made


@torch.no_grad()
def adopt_tower(tower: SiglipVisionModel, llava: LlavaForConditionalGeneration, sample: Tensor) -> None:
    """Begin from pocket-llava's tower: patches, places (resampled) and layers.

    SigLIP has no norm before its first layer; it becomes a scale, that of the views (n, 3, 64, 64) in ``sample``. The
    layer after pocket-llava's feature layer served its CLS token only; it is taken as it is.
    """
    clip = llava.model.vision_tower
    kernel, places = clip.embeddings.patch_embedding.weight, clip.embeddings.position_embedding.weight[1:]
    kernel, places = kernel - kernel.mean(0), places - places.mean(1, keepdim=True)
    side = round(len(places) ** 0.5)
    grid = places.T.reshape(1, -1, side, side)
    grid = torch.nn.functional.interpolate(grid, (CELLS, CELLS), mode="bilinear")[0].flatten(1).T
    patches = torch.nn.functional.conv2d(sample, kernel, stride=PATCH).flatten(2).mT
    scale = clip.pre_layrnorm.weight / (patches + grid).std(-1).mean()
    tower.embeddings.patch_embedding.weight.copy_(kernel * scale[:, None, None, None])
    tower.embeddings.patch_embedding.bias.copy_(clip.pre_layrnorm.bias)
    tower.embeddings.position_embedding.weight.copy_(grid * scale)
    tower.encoder.load_state_dict(clip.encoder.state_dict())


@torch.no_grad()
def adopt_language(model: LlavaOnevisionForConditionalGeneration, llava: LlavaForConditionalGeneration) -> None:
    """Begin from pocket-llava's projector and decoder; Qwen2's biases of queries, keys and values begin at zero."""
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    theirs, mine = llava.model.language_model.state_dict(), model.model.language_model.state_dict()
    words = build.tokenizer()  # those of both; behind them each has words of its own
    for name, weight in mine.items():
        if name in theirs:
            rows = len(words) if name == "embed_tokens.weight" else len(weight)
            weight[:rows].copy_(theirs[name][:rows])
        else:
            weight.zero_()
    newline = theirs["embed_tokens.weight"][words.convert_tokens_to_ids("\n")]
    model.model.image_newline.copy_(newline)


def pocket_llava(folder: Path) -> LlavaForConditionalGeneration:
    """The model to begin from, in float32."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def views(images: Tensor) -> Tensor:
    """What the image processor makes of square images (n, 3, 96, 96), uint8: float32 (n, 5, 3, 64, 64)."""
    from torchvision.transforms.v2 import functional as tv

    whole = frames(images)
    large = tv.resize(images, [2 * TILE, 2 * TILE], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    crops = large.unflatten(-1, (2, TILE)).unflatten(-3, (2, TILE)).permute(0, 2, 4, 1, 3, 5)
    return torch.cat([whole[:, None], normal(crops.flatten(1, 2))], dim=1)


def frames(images: Tensor) -> Tensor:
    """What the video processor makes of frames (n, 3, 96, 96), uint8: float32 (n, 3, 64, 64)."""
    from torchvision.transforms.v2 import functional as tv

    return normal(tv.resize(images, [TILE, TILE], interpolation=tv.InterpolationMode.BICUBIC, antialias=True))


def normal(pixels: Tensor) -> Tensor:
    """Pixels (..., 3, height, width) of 0 to 255 in the tower's scale."""
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (vision.MEAN, vision.STD))
    return (pixels.float() / 255 - mean) / std
