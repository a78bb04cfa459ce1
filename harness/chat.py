"""The text of a question in a model's chat template."""

from __future__ import annotations

from typing import Any


def chat(processor: Any, question: str, images: int = 1) -> str:
    """What the model reads when a user shows images and asks about them, up to where its answer begins."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    turn = {"role": "user", "content": content}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
