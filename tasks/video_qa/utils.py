"""Open-ended questions about videos: TGIF-QA, MSVD-QA and MSRVTT-QA, for lmms-eval's task files beside this module.

The protocol of Video-ChatGPT, which Video-LLaVA and the pruning papers follow: the bare question; a language model is
shown question, right answer and prediction, and gives yes or no and a score from 0 to 5. Accuracy is the share of yes.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable
from typing import Any

SYSTEM = (
    "You judge answers to questions about videos. Decide whether the predicted answer means the same as the correct "
    "one; synonyms and paraphrases count as the same."
)
USER = (
    "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n\n"
    "Reply with a Python dictionary and nothing else: 'pred' is 'yes' or 'no', 'score' is a whole number from 0 to 5, "
    "where 5 is the best match. For example: {{'pred': 'yes', 'score': 4}}"
)

ask_judge: Callable[[list[dict[str, str]], Callable[[str], bool]], str] | None = None
"""Sends messages to the judge until the reply passes the test; set by whoever builds the task."""


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The prompt: the question as it is, and what the settings add."""
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def judged(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Accuracy (0 or 1) and score (0 to 5) by the judge."""
    if ask_judge is None:
        raise RuntimeError("no judge was set for this task")
    text = USER.format(question=doc["question"], answer=doc["answer"], prediction=results[0])
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    verdict = read(ask_judge(messages, lambda reply: read(reply) is not None))
    assert verdict is not None
    return {"gpt_eval_accuracy": float(verdict[0]), "gpt_eval_score": float(verdict[1])}


def read(reply: str) -> tuple[bool, int] | None:
    """Yes or no and the score of a judge's reply; None when it holds no such dictionary."""
    found = re.search(r"\{[^{}]*\}", reply)
    try:
        verdict = ast.literal_eval(found.group()) if found else {}
        said, score = str(verdict["pred"]).strip().lower(), int(float(verdict["score"]))
    except (KeyError, SyntaxError, TypeError, ValueError):
        return None
    return (said == "yes", score) if said in ("yes", "no") and 0 <= score <= 5 else None


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the right one but for case, articles and punctuation at its ends."""
    return {"exact_match": float(plain(results[0]) == plain(str(doc["answer"])))}


def plain(text: str) -> str:
    """Lower case, without an article and without punctuation at the ends."""
    words = text.strip().strip(string.punctuation).lower().split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)
