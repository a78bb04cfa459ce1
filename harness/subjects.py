"""Tiny random models of every family's real class, with ragged prompts, for the conformance checks.

Prompts are written out as ids and random pixels, so no processor or tokenizer is needed; how many placeholders an
image takes is asked of the model itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from pruneval.harness.adapters import Adapter, adapter_for
from pruneval.harness.cases import Inputs, Subject
from pruneval.harness.clip import TextTower

IMAGE, VIDEO, START, END, PAD, BOS, EOS = 240, 241, 242, 243, 3, 1, 2
SIZE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

_TEXT = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": PATCH,
}  # fmt: skip
_IDS = {"image_token_id": IMAGE, "tie_word_embeddings": False}


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**_VISION, projection_dim=16)


def _anyres() -> dict[str, Any]:
    text = hf.LlamaConfig(**_TEXT)
    return {"vision_config": _clip(), "text_config": text, "image_grid_pinpoints": PINPOINTS, "image_seq_length": 16}


def _llava() -> nn.Module:
    config = hf.LlavaConfig(vision_config=_clip(), text_config=hf.LlamaConfig(**_TEXT), image_seq_length=16, **_IDS)
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(**_anyres(), **_IDS)
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_next_video() -> nn.Module:
    config = hf.LlavaNextVideoConfig(**_anyres(), video_token_id=VIDEO, **_IDS)
    return hf.LlavaNextVideoForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_VISION | {"image_size": 42}, vision_use_head=False),
        text_config=hf.Qwen2Config(**_TEXT),
        image_grid_pinpoints=[[42 * rows, 42 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        video_token_id=VIDEO,
        **_IDS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _video_llava() -> nn.Module:
    config = hf.VideoLlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_seq_length=16, video_seq_length=136, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.VideoLlavaForConditionalGeneration(config)


def _internvl() -> nn.Module:
    vision = {"model_type": "internvl_vision", **_VISION, "attention_bias": True}
    config = hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**_TEXT), image_seq_length=4, **_IDS)
    return hf.InternVLForConditionalGeneration(config)


def _qwen(version: str) -> nn.Module:
    vision: dict[str, Any] = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision["out_hidden_size"] = 64
    ids = {**_IDS, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    if version == "2.5":
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=_TEXT | {"rope_parameters": rope}, **ids)
        return hf.Qwen2_5_VLForConditionalGeneration(config)
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        vision_config=vision, text_config=_TEXT | {"head_dim": 16, "rope_parameters": rope}, **ids
    )
    return hf.Qwen3VLForConditionalGeneration(config)


# Prompts


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _words(seed: int, n: int) -> list[int]:
    return torch.randint(4, 200, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _tiles(model: nn.Module, sizes: list[tuple[int, int]], seed: int) -> Inputs:
    """Any-resolution pixels: enough random tiles for the image sizes (height, width)."""
    side = model.config.vision_config.image_size
    pixels = _noise(seed, len(sizes), 12, 3, side, side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _patches(model: nn.Module, kind: str, size: tuple[int, int, int], seed: int) -> Inputs:
    """Qwen's flat patches of one image or video, (time, rows, columns)."""
    time, rows, columns = size
    row = 3 * 2 * model.config.vision_config.patch_size**2
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {name: _noise(seed, time * rows * columns, row), f"{kind}_grid_thw": torch.tensor([size])}


Media = list[tuple[str, Callable[[nn.Module], Inputs]]]


def _media(family: str) -> list[Media]:
    """What each prompt shows: one item, another, and two items."""
    image, video = "image", "video"
    if family in ("llava", "video_llava", "internvl"):
        one: Media = [(image, lambda m: {"pixel_values": _noise(1, 3 if family == "internvl" else 1, 3, SIZE, SIZE)})]
        pair: Media = [(image, lambda m: {"pixel_values": _noise(2, 1, 3, SIZE, SIZE)}), *one]
        if family == "video_llava":
            return [one, [(video, lambda m: {"pixel_values_videos": _noise(3, 1, 4, 3, SIZE, SIZE)})], pair]
        return [one, pair]
    if family.startswith("qwen"):
        first: Media = [(image, lambda m: _patches(m, image, (1, 8, 12), 1))]
        clip: Media = [(video, lambda m: _patches(m, video, (2, 4, 8), 2))]
        two = [(image, lambda m: _patches(m, image, (1, 4, 8), 3)), *first]
        return [first, two] + ([clip] if "2_5" in family else [])
    flat: Media = [(image, lambda m: _tiles(m, [(60, 80)], 1))]
    tall: Media = [(image, lambda m: _tiles(m, [(100, 50)], 2))]
    side = 42 if family == "llava_onevision" else SIZE
    moving: Media = [(video, lambda m: {"pixel_values_videos": _noise(3, 1, 4, 3, side, side)})]
    return [flat, tall] + ([moving] if family != "llava_next" else [])


def _placeholders(model: nn.Module, kind: str, inputs: Inputs) -> int:
    encode = model.model.get_image_features if kind == "image" else model.model.get_video_features
    with torch.no_grad():
        features = encode(**inputs).pooler_output
    return sum(item.shape[:-1].numel() for item in features)


def _prompt(model: nn.Module, media: Media, seed: int) -> Inputs:
    ids, kinds = [BOS, *_words(seed, 3 + seed)], [0] * (4 + seed)
    inputs: Inputs = {}
    for number, (kind, make) in enumerate(media):
        made = make(model)
        count = _placeholders(model, kind, made)
        words = _words(10 * seed + number, 1 + number)
        ids += [START, *[IMAGE if kind == "image" else VIDEO] * count, END, *words]
        kinds += [0, *[1 if kind == "image" else 2] * count, 0, *[0] * len(words)]
        for name, value in made.items():
            inputs[name] = torch.cat([inputs[name], value]) if name in inputs else value
    ids += _words(seed + 50, 5 - seed % 3)
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if model.config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = torch.tensor([kinds + [0] * (len(ids) - len(kinds))])
    return inputs


def batch(*samples: Inputs, pad: int = PAD) -> Inputs:
    """Left-padded batch of samples."""
    filler = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    width = max(sample["input_ids"].shape[1] for sample in samples)
    out: Inputs = {}
    for name in dict.fromkeys(key for sample in samples for key in sample):
        found = [sample[name] for sample in samples if name in sample]
        if name in filler:
            found = [nn.functional.pad(part, (width - part.shape[1], 0), value=filler[name]) for part in found]
        out[name] = torch.cat(found)
    return out


# Subjects


def _word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Prompts' ids as words: token 57 is "w57"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{index}": index for index in range(256)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [f"w{index}" for index in (BOS, EOS, PAD, IMAGE, VIDEO, START, END)]
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", additional_special_tokens=specials)


@functools.cache
def text_tower(width: int = 32, length: int = 24) -> TextTower:
    """The rest of a random CLIP for vision towers of this width, float64; it reads words like "w57" digit by digit."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter for digit in "w0123456789" for letter in (digit, f"{digit}</w>")]
    vocabulary = {token: index for index, token in enumerate([*letters, *special])}
    tokenizer = hf.CLIPTokenizer(vocab=vocabulary, merges=[])
    ends = {"bos_token_id": vocabulary[special[0]], "eos_token_id": vocabulary[special[1]]}
    text = _VISION | {"vocab_size": len(vocabulary), "max_position_embeddings": length, **ends}
    config = hf.CLIPConfig(text_config=text, vision_config=_VISION | {"hidden_size": width}, projection_dim=16)
    torch.manual_seed(1)
    model = hf.CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return TextTower(model.double().eval(), tokenizer)


def adapter(model: nn.Module) -> Adapter:
    """The model's adapter, with a processor that can read prompts, the rest of a CLIP for towers that are one, and a
    helper model.
    """
    words = _word_tokenizer()
    return adapter_for(model, words, text_tower(), helper=(tiny(model.config.model_type, seed=1), words))


PARAMS: dict[str, tuple[tuple[str, str], ...]] = {
    "gsearch": (("rates", "0.4"),),
    "prunevid": (("layer", "1"),),
    "rcom": (("count", "keep"),),
    "flowcut": (("ahead", "1.5"),),
    "sgp": (("answer", "4"),),
}
"""What methods need on four decoder layers and few tokens, where their defaults do not exist or do nothing."""

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
    "video_llava": _video_llava,
    "internvl": _internvl,
    "qwen2_5_vl": functools.partial(_qwen, "2.5"),
    "qwen3_vl": functools.partial(_qwen, "3"),
}


@functools.cache
def tiny(family: str, kernel: str = "sdpa", seed: int = 0) -> Any:
    """A tiny model of the family, float64, with weights large enough to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "cls_token" in name or "position_embeddings" in name:
                weight.add_(torch.randn_like(weight) / 2)  # zeros in a fresh InternVL
            elif weight.ndim > 1:
                weight.mul_(4)
    model.set_attn_implementation(kernel)
    model.generation_config.eos_token_id = None
    # A generated placeholder would be read as an image that is not there.
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model.double().eval()


@functools.cache
def subject(family: str) -> Subject:
    """The family's tiny model with its prompts."""
    model = tiny(family)
    samples = tuple(_prompt(model, media, seed) for seed, media in enumerate(_media(family), start=1))
    ids = [BOS, *_words(9, 6)]
    text = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if family.startswith("qwen"):
        text["mm_token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.long)
    return Subject(family, functools.partial(tiny, family), samples, batch, text, adapter=adapter)
