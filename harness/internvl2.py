"""InternVL2 checkpoints, which the hub holds for code of their own, as `InternVLForConditionalGeneration`.

The vision encoder is InternViT-300M (LayerNorm, biases on queries, keys and values) or InternViT-6B (RMSNorm,
normalised queries and keys); the language model is Qwen2, InternLM2 (Llama with one fused projection) or Phi-3. Nothing
of the checkpoint's code is run: names and rows are rearranged, and every tensor must find its place. Names follow
OpenGVLab/InternVL at 2410d1d.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.initialization import no_init_weights

from pruneval.harness.errors import UserError
from pruneval.harness.internvl2_config import REMOTE_TYPE, config_from_remote, read_json, special_ids, stop_id

__all__ = ["REMOTE_TYPE", "config_from_remote", "convert_state_dict", "load_internvl2"]

_BUFFERS = re.compile(r"\.(inv_freq|cos_cached|sin_cached)$")
_VISION = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)
_INTERNLM2 = (
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention\.", ".self_attn."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
)
_PROJECTOR = {"mlp1.0": "layer_norm", "mlp1.1": "linear_1", "mlp1.3": "linear_2"}


def convert_state_dict(state: Mapping[str, Tensor], config: InternVLConfig) -> dict[str, Tensor]:
    """Tensors of a checkpoint, or of one of its shards, under the native names; rotary buffers are left out.

    Args:
        state: tensors by their names in the checkpoint.
        config: what `config_from_remote` returned.

    Raises:
        UserError: on a name that belongs to no part of the model.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _BUFFERS.search(name):
            out.update(_converted(name, tensor, config))
    return out


def load_internvl2(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", kernel: str | None = None
) -> InternVLForConditionalGeneration:
    """The model of a checkpoint folder (config.json and safetensors), in evaluation mode.

    Args:
        folder: a snapshot of the checkpoint.
        dtype: of the weights; by default what config.json says.
        device: where the weights go.
        kernel: attention implementation, transformers' choice by default.

    Raises:
        UserError: when a file is missing, or tensors and model do not match one to one.
    """
    folder = Path(folder)
    remote = read_json(folder / "config.json")
    specials = special_ids(folder)
    config = config_from_remote(remote, specials.get("<IMG_CONTEXT>"))
    if kernel is not None:
        config._attn_implementation = kernel
    dtype = dtype or getattr(torch, str(remote.get("torch_dtype") or remote.get("dtype") or "bfloat16"))
    with torch.device(device), no_init_weights():
        model = InternVLForConditionalGeneration._from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        model.tie_weights()
    _fill(model, folder, config)
    model.generation_config.eos_token_id = stop = stop_id(remote, specials)
    pad = config.text_config.pad_token_id
    model.generation_config.pad_token_id = stop if pad is None else pad
    return model.eval()


# The tensors


def _converted(name: str, tensor: Tensor, config: InternVLConfig) -> dict[str, Tensor]:
    part, _, rest = name.partition(".")
    if part == "vision_model":
        return _split(_renamed(rest, _VISION), "model.vision_tower.", tensor, config)
    if part == "mlp1":
        layer, _, leaf = rest.partition(".")
        if f"mlp1.{layer}" in _PROJECTOR:
            return {f"model.multi_modal_projector.{_PROJECTOR[f'mlp1.{layer}']}.{leaf}": tensor}
    if part == "language_model":
        if rest in ("lm_head.weight", "output.weight"):
            return {"lm_head.weight": tensor}
        if rest.startswith("model."):
            inner = rest.removeprefix("model.")
            inner = _renamed(inner, _INTERNLM2) if config.text_config.model_type == "llama" else inner
            return _split(inner, "model.language_model.", tensor, config)
    raise UserError(f"the checkpoint's tensor {name} belongs to no part of InternVL")


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _split(name: str, prefix: str, tensor: Tensor, config: InternVLConfig) -> dict[str, Tensor]:
    """Fused queries, keys and values as three tensors, everything else as it is."""
    if ".attention.qkv." in name:
        parts, fused = tensor.chunk(3), "qkv"
    elif ".self_attn.wqkv." in name:
        parts, fused = _ungroup(tensor, config.text_config), "wqkv"
    else:
        return {prefix + name: tensor}
    return {
        prefix + name.replace(f".{fused}.", f".{letter}_proj."): part for letter, part in zip("qkv", parts, strict=True)
    }


def _ungroup(rows: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
    """InternLM2's fused rows stand group by group: the group's query heads, then its key head, then its value head."""
    kv_heads = text.num_key_value_heads
    head_dim = text.hidden_size // text.num_attention_heads
    groups = rows.unflatten(0, (kv_heads, -1, head_dim))
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


# Reading


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / file for file in read_json(index)["weight_map"].values()})
        lacking = [path.name for path in files if not path.is_file()]
        if lacking:
            raise UserError(f"{folder} lacks {', '.join(lacking)}, which its index names")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise UserError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")


@torch.no_grad()
def _fill(model: nn.Module, folder: Path, config: InternVLConfig) -> None:
    """Copies every tensor of the folder into the model, each exactly once."""
    targets, filled = model.state_dict(keep_vars=True), set()
    for path in _shards(folder):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                for native, tensor in convert_state_dict({name: shard.get_tensor(name)}, config).items():
                    _copy(targets, native, tensor, name)
                    filled.add(native)
    tied = {"lm_head.weight", "model.language_model.embed_tokens.weight"} if config.tie_word_embeddings else set()
    missing = set(targets) - filled - (tied if filled & tied else set())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of the model's tensors, for example {min(missing)}")


def _copy(targets: Mapping[str, Tensor], native: str, tensor: Tensor, name: str) -> None:
    if native not in targets:
        raise UserError(f"the checkpoint's tensor {name} has no place in the model (it would be {native})")
    if targets[native].shape != tensor.shape:
        raise UserError(
            f"the checkpoint's tensor {name} is {tuple(tensor.shape)}, the model's is {tuple(targets[native].shape)}"
        )
    targets[native].copy_(tensor)
