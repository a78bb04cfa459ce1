"""Model families. A new one is one file and one line in ADAPTERS."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from pruneval.harness.adapters.base import Adapter, Encoding
from pruneval.harness.clip import TextTower
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


def adapter_for(
    model: nn.Module,
    processor: Any = None,
    text_tower: TextTower | str | Path | None = None,
    helper: Any = None,
) -> Adapter:
    """The adapter of a stock transformers model, by its config's `model_type`.

    Args:
        model: the model.
        processor: its processor; methods that read the question's text need it.
        text_tower: the CLIP model that its vision tower comes from, for methods that compare patches with the question:
            a folder, a name on the hub (`id` or `id@revision`), or what was loaded; loaded when it is first needed.
        helper: for methods with a helper model, that model, or it and its processor: a pair or a `LoadedModel`.

    Raises: UserError when the family is unknown.
    """
    kind = model.config.model_type
    if kind not in ADAPTERS:
        raise unknown("model family", kind, ADAPTERS)
    module, name = ADAPTERS[kind]
    family = getattr(importlib.import_module(f"pruneval.harness.adapters.{module}"), name)
    found: Adapter = family(model, processor, text_tower)
    return found if helper is None else found.helped(_adapter_of(helper))


def _adapter_of(helper: Any) -> Adapter:
    if isinstance(helper, nn.Module | Adapter):
        return helper if isinstance(helper, Adapter) else adapter_for(helper)
    pair = helper if isinstance(helper, tuple) else (helper.model, helper.processor)
    return adapter_for(*pair)
