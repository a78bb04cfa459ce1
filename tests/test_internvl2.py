"""Checkpoints of InternVL2's own layout, written here from native models, load into the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_internvl as tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pruneval.harness.errors import UserError
from pruneval.harness.internvl2 import config_from_remote, convert_state_dict, load_internvl2

KINDS = ["qwen2", "llama", "phi3"]
CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM"}
VISION_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.bias": "embeddings.patch_embedding.bias",
}
VISION_PARTS = {
    "attention.projection_layer.weight": "attn.proj.weight", "attention.projection_layer.bias": "attn.proj.bias",
    "attention.q_norm.weight": "attn.q_norm.weight", "attention.k_norm.weight": "attn.k_norm.weight",
    "layernorm_before.weight": "norm1.weight", "layernorm_before.bias": "norm1.bias",
    "layernorm_after.weight": "norm2.weight", "layernorm_after.bias": "norm2.bias",
    "lambda_1": "ls1", "lambda_2": "ls2",
    "mlp.fc1.weight": "mlp.fc1.weight", "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight", "mlp.fc2.bias": "mlp.fc2.bias",
}  # fmt: skip
INTERNLM2_PARTS = {
    "self_attn.o_proj.weight": "attention.wo.weight", "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight", "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight", "mlp.down_proj.weight": "feed_forward.w2.weight",
}  # fmt: skip
PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}


def vision_state(model: nn.Module) -> dict[str, Tensor]:
    """The vision encoder and the projector in the checkpoint's layout."""
    state = {}
    native = model.model.vision_tower.state_dict()
    for name, tensor in native.items():
        if name in VISION_NAMES:
            state[f"vision_model.{VISION_NAMES[name]}"] = tensor
            continue
        _, _, layer, part = name.split(".", 3)
        stem = f"vision_model.encoder.layers.{layer}"
        if part in VISION_PARTS:
            state[f"{stem}.{VISION_PARTS[part]}"] = tensor
        elif "q_proj" in part:
            rest = [native[name.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
            state[f"{stem}.attn.qkv.{part.rsplit('.', 1)[1]}"] = torch.cat([tensor, *rest])
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        layer, leaf = name.split(".")
        state[f"{PROJECTOR[layer]}.{leaf}"] = tensor
    return state


def fuse(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """InternLM2's fused rows, one head at a time: for each key head its query heads, the key head, the value head."""
    size, blocks = len(q) // heads, []
    for group in range(kv_heads):
        for head in range(heads):
            if head // (heads // kv_heads) == group:
                blocks.append(q[head * size : (head + 1) * size])
        blocks += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
    return torch.cat(blocks)


def text_state(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The language model in the checkpoint's layout, with a rotary buffer as old checkpoints have it."""
    native, config = model.model.language_model.state_dict(), model.config.text_config
    state = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if kind != "llama":
        state |= {f"language_model.model.{name}": tensor for name, tensor in native.items()}
        return state | {"language_model.lm_head.weight": model.lm_head.weight.detach()}
    for name, tensor in native.items():
        if not name.startswith("layers."):
            state["language_model.model." + name.replace("embed_tokens", "tok_embeddings")] = tensor
            continue
        _, layer, part = name.split(".", 2)
        stem = f"language_model.model.layers.{layer}"
        if part in INTERNLM2_PARTS:
            state[f"{stem}.{INTERNLM2_PARTS[part]}"] = tensor
        elif "q_proj" in part:
            rest = [native[name.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
            rows = fuse(tensor, *rest, config.num_attention_heads, config.num_key_value_heads)
            state[f"{stem}.attention.wqkv.weight"] = rows
    return state | {"language_model.output.weight": model.lm_head.weight.detach()}


def remote_config(model: nn.Module, kind: str) -> dict[str, Any]:
    """A config.json in the checkpoint's words."""
    text, vision = model.config.text_config, model.config.vision_config
    rope = dict(text.rope_parameters)
    rule, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "pad_token_id",
        "bos_token_id",
    )
    language = {name: getattr(text, name) for name in names}
    language |= {
        "architectures": [CLASSES[kind]],
        "rope_theta": theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    if kind == "llama":
        language |= {"bias": False, "rope_scaling": {"type": rule, "factor": rope["factor"]}}
    if kind == "phi3":
        factors = {name: rope[name] for name in ("short_factor", "long_factor")}
        language |= {"rope_scaling": {"type": "su", **factors}, "original_max_position_embeddings": 4096}
        language |= {"sliding_window": 262144}
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "norm_type",
        "layer_norm_eps",
    )
    seen = {name: getattr(vision, name) for name in names} | {"image_size": 56, "patch_size": 14, "hidden_act": "gelu"}
    seen |= {"qkv_bias": vision.attention_bias, "qk_normalization": vision.use_qk_norm, "drop_path_rate": 0.1}
    templates = {"qwen2": "Hermes-2", "llama": "internlm2-chat", "phi3": "phi3-chat"}
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "remote.Model"},
        "llm_config": language, "vision_config": seen, "select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v2",
        "dynamic_image_size": True, "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12,
        "template": templates[kind], "torch_dtype": "bfloat16", "pad2square": False,
    }  # fmt: skip


def write(model: nn.Module, kind: str, folder: Path, shards: int = 1) -> dict[str, Tensor]:
    """Saves a model as such a checkpoint and returns its tensors."""
    state = {
        name: tensor.contiguous().clone() for name, tensor in (vision_state(model) | text_state(model, kind)).items()
    }
    (folder / "config.json").write_text(json.dumps(remote_config(model, kind)))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return state
    names = sorted(state)
    files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    for index, file in enumerate(files):
        save_file({name: state[name] for name in names[index::shards]}, folder / file)
    placed = {name: files[index % shards] for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return state


def logits(model: nn.Module, **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(tiny.prompt(5, 6, (3,)), tiny.prompt(4, 3, (1, 2), seed=1)) | changes).logits


@pytest.mark.parametrize("large_vision", [False, True], ids=["300M", "6B"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_into_the_same_model(kind: str, large_vision: bool, tmp_path: Path) -> None:
    model = tiny.internvl(kind, large_vision)
    write(model, kind, tmp_path, shards=3 if large_vision else 1)
    loaded = load_internvl2(tmp_path, torch.float64)
    assert torch.equal(logits(loaded), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.image_token_id == tiny.IMAGE
    assert loaded.config.text_config.rope_parameters == model.config.text_config.rope_parameters
    assert not loaded.training


@pytest.mark.parametrize("kind", KINDS)
def test_far_positions_rotate_alike(kind: str, tmp_path: Path) -> None:
    """Beyond the original context the rope rules (dynamic, longrope) take over; the loaded config must hold them."""
    model = tiny.internvl(kind)
    write(model, kind, tmp_path)
    sample = tiny.prompt(5, 6)
    far = torch.arange(sample["input_ids"].shape[1])[None] + 5000
    near = model(**sample).logits
    with torch.no_grad():
        theirs = load_internvl2(tmp_path, torch.float64)(**sample, position_ids=far).logits
        mine = model(**sample, position_ids=far).logits
    assert torch.equal(theirs, mine)
    assert not torch.allclose(mine, near) or kind == "qwen2"


# InternLM2's attention, on its fused rows


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of (n, d_h) rows at positions 0..n-1, halves rotated against each other."""
    n, size = x.shape
    angle = torch.arange(n)[:, None] * theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    first, second = x[:, : size // 2], x[:, size // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def internlm2_attention(x: Tensor, fused: Tensor, out: Tensor, heads: int, kv_heads: int, theta: float) -> Tensor:
    """Causal attention of (n, d) rows from InternLM2's fused projection, one head after the other."""
    size, per_group = fused.shape[1] // heads, heads // kv_heads
    rows = x @ fused.T
    mixed = []
    for head in range(heads):
        start = head // per_group * (per_group + 2) * size
        query, key, value = (
            rows[:, start + slot * size : start + (slot + 1) * size]
            for slot in (head % per_group, per_group, per_group + 1)
        )
        scores = rotated(query, theta) @ rotated(key, theta).T / size**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        mixed.append(scores.softmax(-1) @ value)
    return torch.cat(mixed, -1) @ out.T


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 3), (8, 2), (4, 4)])
def test_fused_rows_attend_as_internlm2_does(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    model = tiny.internvl("llama")
    remote = remote_config(model, "llama")
    hidden = 16 * heads
    remote["llm_config"] |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    config = config_from_remote(remote)
    fused = torch.randn((heads + 2 * kv_heads) * 16, hidden, dtype=torch.float64) / hidden**0.5
    out = torch.randn(hidden, hidden, dtype=torch.float64) / hidden**0.5
    stem = "language_model.model.layers.0.attention"
    state = convert_state_dict({f"{stem}.wqkv.weight": fused, f"{stem}.wo.weight": out}, config)
    x = torch.randn(7, hidden, dtype=torch.float64)

    def native(state: dict[str, Tensor]) -> Tensor:
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

        config.text_config._attn_implementation = "sdpa"
        attention = LlamaAttention(config.text_config, 0).double()
        prefix = "model.language_model.layers.0.self_attn."
        attention.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        rotation = LlamaRotaryEmbedding(config.text_config)(x[None], torch.arange(7)[None])
        return attention(x[None], position_embeddings=rotation, attention_mask=None)[0][0]

    expected = internlm2_attention(x, fused, out, heads, kv_heads, 1e6)
    with torch.no_grad():
        assert torch.allclose(native(state), expected, atol=1e-6)
        naive = dict(zip("qkv", fused.split([heads * 16, kv_heads * 16, kv_heads * 16]), strict=True))
        wrong = {name: naive[name[-13]] if "_proj" in name and "o_proj" not in name else state[name] for name in state}
        assert (native(wrong) - expected).abs().max() > 0.1


# What is refused


def test_a_tensor_without_a_place_is_an_error(tmp_path: Path) -> None:
    model = tiny.internvl("llama")
    state = write(model, "llama", tmp_path)
    save_file(state | {"vision_model.encoder.layers.9.ls1": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.9\.ls1 has no place"):
        load_internvl2(tmp_path)
    save_file(state | {"mlp2.0.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"mlp2\.0\.weight belongs to no part"):
        load_internvl2(tmp_path)


def test_a_missing_or_misshapen_tensor_is_an_error(tmp_path: Path) -> None:
    model = tiny.internvl("phi3")
    state = write(model, "phi3", tmp_path)
    lacking = {name: tensor for name, tensor in state.items() if name != "mlp1.3.bias"}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 .*multi_modal_projector\.linear_2\.bias"):
        load_internvl2(tmp_path)
    save_file(state | {"mlp1.3.bias": torch.ones(7)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"mlp1\.3\.bias is \(7,\)"):
        load_internvl2(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_internvl2(tmp_path)
    model = tiny.internvl("qwen2")
    write(model, "qwen2", tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        load_internvl2(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_internvl2(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "pixel shuffle 'v1'"),
        ({"llm_config": {"architectures": ["MambaForCausalLM"]}}, "MambaForCausalLM as language model"),
        ({"vision_config": {}}, "lacks 'hidden_size'"),
    ],
)
def test_what_has_no_native_counterpart_is_refused(change: dict[str, Any], message: str) -> None:
    remote = remote_config(tiny.internvl("qwen2"), "qwen2") | change
    with pytest.raises(UserError, match=message):
        config_from_remote(remote)


def test_published_vocabularies_give_the_published_ids() -> None:
    """Vocabulary sizes, <IMG_CONTEXT> and end-of-turn ids as the checkpoints have them."""
    from pruneval.harness.internvl2_config import stop_id

    remote = remote_config(tiny.internvl("llama"), "llama")
    for name, vocabulary, context, stop in [
        ("Qwen2ForCausalLM", 151655, 151648, 151645),
        ("InternLM2ForCausalLM", 92553, 92546, 92542),
        ("Phi3ForCausalLM", 32020, 32013, 32007),
        ("Qwen2ForCausalLM", 151674, 151667, 151645),
    ]:
        remote["llm_config"] |= {"architectures": [name], "vocab_size": vocabulary, "rope_scaling": None}
        assert config_from_remote(remote).image_token_id == context
        assert stop_id(remote, {}) == stop


def test_dtype_and_generation_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    write(tiny.internvl("llama"), "llama", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 251, "<|im_end|>": 199}))
    model = load_internvl2(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.image_token_id == 251
    assert model.generation_config.eos_token_id == 199
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
