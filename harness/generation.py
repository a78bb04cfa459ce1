"""What answering a request takes beside the model: arguments of `generate`, budgets, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pruneval.harness.errors import UserError

MAX_NEW_TOKENS = 1024
"""Where a task sets no limit; the same figure as lmms-eval's own wrappers use."""


def generation_arguments(options: Mapping[str, Any], max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of `generate`: greedy unless the task asks for a temperature.

    Only what `generate` knows is passed on. `until` is not applied, as in lmms-eval's own chat wrapper.
    """
    temperature = options.get("temperature") or 0
    sampling = {"temperature": temperature, "top_p": options.get("top_p")} if temperature > 0 else {}
    return {
        "do_sample": temperature > 0,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        **sampling,
        "num_beams": options.get("num_beams") or 1,
        "max_new_tokens": options.get("max_new_tokens") or max_new_tokens,
    }


def budget_of(session: Any, sample: int) -> dict[str, float | None]:
    """The observed budget of a sample of the last prompt; None throughout without a session."""
    if session is None:
        return dict.fromkeys(("visual_tokens", "avg_in", "kept_after", "final", "keep"))
    budget = session.trace.budget(sample)
    return {
        "visual_tokens": int(budget.visual),
        "avg_in": float(budget.avg_in),
        "kept_after": float(budget.kept_after),
        "final": float(budget.final),
        "keep": float(budget.keep),
    }


def settled(session: Any, answers: list[str], budgets: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The answers, where the method has settled for its helper's with that, and a note which these are."""
    if session is None or session.helping is None:
        return answers, budgets
    processor = session.adapter.helper.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    taken = {each: tokenizer.decode(ids, skip_special_tokens=True) for each, ids in session.early.items()}
    noted = [budget | {"early": float(each in taken)} for each, budget in enumerate(budgets)]
    return [taken.get(each, answer) for each, answer in enumerate(answers)], noted


def positive(number: int | str, what: str) -> int:
    """A whole number of at least 1. Raises: UserError."""
    try:
        size = int(number)
    except ValueError:
        raise UserError(f"{what} must be a whole number, not {number!r}") from None
    if size < 1:
        raise UserError(f"{what} must be at least 1, not {size}")
    return size


def digest(text: str) -> str:
    """Sixteen hexadecimal digits of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def picture_digest(images: list[Any]) -> str | None:
    """The same text for questions about the same pixels, whose answers are not independent; None without an image."""
    if not images:
        return None
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.mode}{image.size}".encode())
        found.update(image.tobytes())
    return found.hexdigest()[:16]


def one_line(error: BaseException) -> str:
    """An error's kind and message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
