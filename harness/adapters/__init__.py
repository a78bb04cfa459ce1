"""Model families. A new one is one file and one line in ADAPTERS."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from pruneval.harness.adapters.base import Adapter, Encoding
from pruneval.harness.errors import unknown

__all__ = ["ADAPTERS", "Adapter", "Encoding", "adapter_for"]

ADAPTERS = {  # config.model_type: module and class
    "llava": ("llava", "Llava"),
    "llava_next": ("llava_next", "LlavaNext"),
    "llava_next_video": ("llava_next_video", "LlavaNextVideo"),
    "llava_onevision": ("llava_onevision", "LlavaOnevision"),
    "internvl": ("internvl", "InternVL"),
    "qwen2_5_vl": ("qwen_vl", "QwenVL"),
    "qwen3_vl": ("qwen_vl", "QwenVL"),
    "video_llava": ("video_llava", "VideoLlava"),
}


def adapter_for(model: nn.Module, processor: Any = None) -> Adapter:
    """The adapter of a stock transformers model, by its config's `model_type`.

    Raises: UserError when the family is unknown.
    """
    kind = model.config.model_type
    if kind not in ADAPTERS:
        raise unknown("model family", kind, ADAPTERS)
    module, name = ADAPTERS[kind]
    return getattr(importlib.import_module(f"pruneval.harness.adapters.{module}"), name)(model, processor)
