"""The config of an InternVL2 checkpoint, which the hub holds for code of its own, as transformers' `InternVLConfig`.

Field names follow OpenGVLab/InternVL at 2410d1d.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, LlamaConfig, Phi3Config, Qwen2Config

from pruneval.harness.errors import UserError

REMOTE_TYPE = "internvl_chat"  # `model_type` in the config.json of these checkpoints

TEXT_CONFIGS = {"Qwen2ForCausalLM": Qwen2Config, "InternLM2ForCausalLM": LlamaConfig, "Phi3ForCausalLM": Phi3Config}
STOPS = {  # the token that closes a turn, and its id
    "Qwen2ForCausalLM": ("<|im_end|>", 151645),
    "InternLM2ForCausalLM": ("<|im_end|>", 92542),
    "Phi3ForCausalLM": ("<|end|>", 32007),
}
CONTEXT_FROM_END = 7  # <IMG_CONTEXT> is the third of the nine tokens that InternVL adds at the end of a vocabulary

_TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_TEXT_OPTIONS = ("hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
_VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "norm_type",
)


def config_from_remote(remote: Mapping[str, Any], image_token_id: int | None = None) -> InternVLConfig:
    """The native config of a checkpoint.

    Args:
        remote: its config.json.
        image_token_id: id of `<IMG_CONTEXT>`, which config.json does not hold; by default where InternVL's nine tokens
            put it.

    Raises:
        UserError: when a field is missing or asks for something the native model can't do.
    """
    kind, text, vision = _text_kind(remote), _field(remote, "llm_config"), _field(remote, "vision_config")
    _refuse(remote, vision)
    text_config = TEXT_CONFIGS[kind](
        **{name: _field(text, name) for name in _TEXT_SIZES},
        **{name: text[name] for name in _TEXT_OPTIONS if name in text},
        **_text_extras(kind, text),
        rope_parameters=_rope(text),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    vision_config = {name: _field(vision, name) for name in _VISION_SIZES} | {
        "model_type": "internvl_vision",
        "attention_bias": _field(vision, "qkv_bias"),
        "use_qk_norm": _field(vision, "qk_normalization"),
        "hidden_act": vision.get("hidden_act", "gelu"),
        "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
        "num_channels": vision.get("num_channels", 3),
        "use_mean_pooling": True,  # that is: no norm after the last layer
    }
    ratio = remote.get("downsample_ratio", 0.5)
    side = vision_config["image_size"] // vision_config["patch_size"]
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=text_config.vocab_size - CONTEXT_FROM_END if image_token_id is None else image_token_id,
        image_seq_length=int(side * ratio) ** 2,
        downsample_ratio=ratio,
        vision_feature_layer=remote.get("select_layer", -1),
        vision_feature_select_strategy="default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def stop_id(remote: Mapping[str, Any], specials: Mapping[str, int]) -> int:
    """Id of the token at which generation ends; it is not the language model's own end of sequence.

    Args:
        remote: the checkpoint's config.json.
        specials: what `special_ids` returned.
    """
    token, index = STOPS[_text_kind(remote)]
    return specials.get(token, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises: UserError when it is missing."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}")
    return json.loads(path.read_text(encoding="utf-8"))


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens that were added to the vocabulary, from whichever of the tokenizer's files are there."""
    ids: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        ids |= {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens", ())}
    if (folder / "tokenizer_config.json").is_file():
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        ids |= {token["content"]: int(index) for index, token in added.items()}
    if (folder / "added_tokens.json").is_file():
        ids |= read_json(folder / "added_tokens.json")
    return ids


def _field(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise UserError(f"config.json of this {REMOTE_TYPE} checkpoint lacks {name!r}")
    return config[name]


def _text_kind(remote: Mapping[str, Any]) -> str:
    kind = (_field(remote, "llm_config").get("architectures") or ["nothing"])[0]
    if kind not in TEXT_CONFIGS:
        raise UserError(f"InternVL2 with {kind} as language model is not supported; known: {', '.join(TEXT_CONFIGS)}")
    return kind


def _refuse(remote: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """What the native classes have no setting for."""
    if remote.get("ps_version", "v2") != "v2":
        raise UserError(f"pixel shuffle {remote['ps_version']!r} has no native counterpart; only 'v2' has")
    if vision.get("qk_normalization") and vision.get("layer_norm_eps", 1e-6) != 1e-6:
        raise UserError("normalised queries and keys with an epsilon other than 1e-6 have no native counterpart")


def _text_extras(kind: str, text: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "InternLM2ForCausalLM":
        return {"attention_bias": text.get("bias", False)}
    if kind == "Phi3ForCausalLM":  # a window longer than the context would only change the kind of cache
        window, length = text.get("sliding_window"), text["max_position_embeddings"]
        return {
            "sliding_window": window if window is not None and window < length else None,
            "original_max_position_embeddings": text.get("original_max_position_embeddings", length),
        }
    return {"use_sliding_window": False}


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    theta = text.get("rope_theta", 1e4)
    scaling = dict(text.get("rope_scaling") or {})
    rule = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if rule in ("su", "longrope"):  # Phi-3's first name for it, and today's
        rule, scaling["original_max_position_embeddings"] = "longrope", _field(text, "original_max_position_embeddings")
    return {"rope_type": rule, "rope_theta": float(theta), **scaling}
