"""The ledger against what torch itself counts, on tiny randomly initialised models with the eager kernel."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
)

from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.errors import UserError
from pruneval.harness.flops import ledger, lengths_of
from pruneval.harness.kv_cache import kv_bytes

CLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "vocab_size": 256,
}
IMAGE = 250


def _llama(**more):
    return LlamaConfig(**TEXT, num_key_value_heads=2, **more)


def _qwen2(**more):
    return Qwen2Config(**TEXT, num_key_value_heads=2, **more)


def _internvit(**more):
    return InternVLVisionConfig(**{**CLIP, "image_size": [56, 56], "patch_size": [14, 14]}, **more)


def _configs():
    siglip = SiglipVisionConfig(**{**CLIP, "image_size": 42}, vision_use_head=False)
    ids = {"image_token_index": IMAGE, "image_token_id": IMAGE}
    text = {"text_config": _llama(), "vision_config": CLIPVisionConfig(**CLIP), "tie_word_embeddings": False}
    qwen_vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 96,
    }
    qwen_text = {
        **TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    return {
        "llava": LlavaConfig(**text, **ids),
        "llava-tied": LlavaConfig(**{**text, "tie_word_embeddings": True}, **ids),
        "llava_next": LlavaNextConfig(**text, **ids),
        "llava_onevision": LlavaOnevisionConfig(
            text_config=_qwen2(), vision_config=siglip, vision_feature_select_strategy="full", tie_word_embeddings=False
        ),
        "internvl": InternVLConfig(
            text_config=_qwen2(),
            vision_config=_internvit(attention_bias=True),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        "internvl-6b": InternVLConfig(
            text_config=_llama(),
            vision_config=_internvit(attention_bias=False, use_qk_norm=True, norm_type="rms_norm"),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        "qwen2_5_vl": Qwen2_5_VLConfig(vision_config=qwen_vision, text_config=qwen_text, tie_word_embeddings=True),
        "video_llava": VideoLlavaConfig(**text, image_token_index=IMAGE, video_token_index=251),
        "llava_next_video": LlavaNextVideoConfig(**text, image_token_index=IMAGE, video_token_index=251),
    }


CONFIGS = _configs()


def _build(config, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        if config.model_type == "video_llava":
            from transformers import VideoLlavaForConditionalGeneration

            return VideoLlavaForConditionalGeneration(config).eval()
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_a_config_are_exact(name):
    model = _build(CONFIGS[name], "meta")
    dimensions = dimensions_of(model.config)
    assert sum(dimensions.params.values()) == sum(p.numel() for p in model.parameters())


def _run(model, text: int, tiles: int, keep: tuple[int, ...], visual: int) -> int:
    """FLOPs torch counts for a prefill in which layer l sees the text, then the first `keep[l]` visual tokens."""
    size = CLIP["image_size"]
    ids = torch.tensor([[1] * text + [IMAGE] * visual])
    hooks = []
    for count, layer in zip(keep, model.model.language_model.layers, strict=True):

        def cut(module, args, kwargs, n=text + count):
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos[:, :n], sin[:, :n]
            kwargs["attention_mask"] = kwargs["attention_mask"][..., :n, :n]
            return (args[0][:, :n],), kwargs

        hooks.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, pixel_values=torch.randn(tiles, 3, size, size), use_cache=False, logits_to_keep=0)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops()


@pytest.mark.parametrize("keep", [(1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.5, 0.25), (1.0, 0.5, 0.5, 0.0)], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava-tied", "internvl", "internvl-6b"])
def test_ledger_is_what_torch_counts(name, keep):
    model = _build(CONFIGS[name])
    dimensions = dimensions_of(model.config)
    tiles = 1 if name.startswith("llava") else 3
    visual = lengths_of(dimensions, tiles=tiles).given
    plan = tuple(int(visual * share) for share in keep)
    counted = ledger(dimensions, lengths_of(dimensions, plan, tiles=tiles, text=21))
    implied = 2 * counted.total(
        "patch_embedding",
        "vision_linear",
        "vision_attention",
        "projector",
        "llm_linear",
        "llm_attention_square",
        "head_all",
    )
    assert implied == pytest.approx(_run(model, 21, tiles, plan, visual), rel=1e-3)


def test_decode_is_what_torch_counts():
    """One step on top of a prefill: the query meets every cached token and itself."""
    model = _build(CONFIGS["llava"])
    dimensions = dimensions_of(model.config)
    ids = torch.tensor([[1] * 30])
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[2]]), past_key_values=cache)
    counted = ledger(dimensions, lengths_of(dimensions, [0] * 4, text=30, new_tokens=2))
    implied = 2 * counted.total("decode_linear", "decode_attention", "decode_head")
    assert implied == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_cache_bytes_are_what_the_cache_holds():
    model = _build(CONFIGS["llava"])
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[1] * 30])).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(dimensions_of(model.config).decoder, [30] * 4, bytes_per_value=4) == held


@pytest.mark.parametrize("grid", [(1, 16, 24), (1, 10, 14), (4, 20, 28)], ids=str)
def test_window_attention_is_what_torch_counts(grid):
    model = _build(CONFIGS["qwen2_5_vl"])
    patches = grid[0] * grid[1] * grid[2]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(torch.randn(patches, 1176), grid_thw=torch.tensor([grid]))
    dimensions = dimensions_of(model.config)
    counted = ledger(dimensions, lengths_of(dimensions, grid=grid))
    implied = 2 * counted.total("patch_embedding", "vision_linear", "vision_attention", "projector")
    assert implied == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_unknown_family_is_named():
    with pytest.raises(UserError, match="no cost model for the family 'llama'"):
        dimensions_of(_llama())
