"""Videos as random tokens, prompts around them, and tiny models that see videos."""

from __future__ import annotations

import torch
from steps import step

from pruneval.harness.session import pruned

MOVING = {"llava_next_video": 2, "llava_onevision": 2, "video_llava": 1, "qwen2_5_vl": 2}
"""Which prompt of a family's subject shows a video."""


def film(frames: int, places: int, seed: int = 0, size: int = 8) -> torch.Tensor:
    """(F * P, d) random tokens of a video."""
    return torch.randn(frames * places, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene(tokens: torch.Tensor, frames: int, before: int = 2, after: int = 3, **seen):
    """A prompt of text, a video of `tokens` and text."""
    text = film(before + after, 1, 99, tokens.shape[1])
    hidden = torch.cat([text[:before], tokens, text[before:]])
    clips = (torch.arange(before, before + len(tokens)).unflatten(0, (frames, -1)),)
    fields = {"hidden": hidden, "embeddings": hidden, "clips": clips} | seen
    return step(before, len(tokens), after, **fields)


def run(model, inputs, method, new: int = 3):
    """Logits of a greedy generation, and its session."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with pruned(model, method) as session:
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, 1), session, out.past_key_values
