"""Evaluations with answers given by a script instead of a model, so that a score can be worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from pruneval import tasks
from pruneval.harness import lmms_model, preparing
from pruneval.harness.evaluate import evaluate
from pruneval.harness.outcome import Outcome
from pruneval.tasks.pocket import editions

drawn = functools.cache(editions.rows)


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are not prepared for a model: there is none."""
    monkeypatch.setattr(preparing.Preparing, "ready", lambda self, window: None)
    monkeypatch.setattr(preparing.Preparing, "measure", lambda self, request: (1, len(request.context)))


def run(monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[dict, int], str], **options: Any) -> Outcome:
    """Evaluate a pocket benchmark; `answer` is called with a row as drawn and its index."""
    row = tasks.benchmark(name)
    rows = drawn(row.dataset)[row.split]

    def generate(self: Any, batch: list[Any], session: Any) -> list[dict[str, Any]]:
        return [
            {
                "key": request.key,
                "doc_id": request.doc_id,
                "request": request.digest,
                "prompt": request.context,
                "prompt_hash": "",
                "answer": answer(rows[request.doc_id], request.doc_id),
                **dict.fromkeys(("visual_tokens", "avg_in", "kept_after", "final", "keep")),
            }
            for request in batch
        ]

    unseen(monkeypatch)
    monkeypatch.setattr(lmms_model.PrunevalModel, "_generate", generate)
    return evaluate(None, None, row, **options)
