"""A user's own model as a subject of the conformance checks: prompts made by its processor from drawn pictures."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pruneval.harness.cases import Subject
from pruneval.harness.chat import chat


def subject_of(name: str, helper: str | None = None) -> Subject:
    """The model of that name or folder, in float32 on the CPU (or its GPU), with four prompts.

    Args:
        name: of the model, or its folder.
        helper: likewise, of a helper model.

    Raises:
        UserError: when the model can't be found or loaded.
    """
    from PIL import Image

    from pruneval.harness import models
    from pruneval.harness.adapters import adapter_for

    located = models.locate(name)

    @functools.cache
    def load(kernel: str) -> Any:
        return models.load(located, None, "float32", kernel)

    loaded = load("sdpa")
    beside = models.load(helper, None, "float32", "sdpa") if helper else None
    random = np.random.default_rng(0)
    sizes = ((96, 96), (96, 160), (200, 96))
    pictures = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]

    def prompt(question: str, images: list[Any]) -> dict[str, Any]:
        text = chat(loaded.processor, question, len(images))
        made = loaded.processor(text=[text], images=images or None, return_tensors="pt")
        return dict(made.to(loaded.device, loaded.model.dtype))

    from pruneval.harness.subjects import batch

    pad = loaded.processor.tokenizer.pad_token_id
    return Subject(
        name=located.entry.name,
        model=lambda kernel: load(kernel).model,
        samples=(
            prompt("What is in the image?", [pictures[0]]),
            prompt("What colour is it, and where is it in the image?", [pictures[1]]),
            prompt("Is there a difference?", pictures[1:]),
        ),
        batch=functools.partial(batch, pad=pad if pad is not None else 0),
        text=prompt("Say yes or no.", []),
        tolerance=1e-3,
        adapter=lambda model: adapter_for(model, loaded.processor, loaded.adapter.clip, beside),
    )
