"""The exact prompts that lmms-eval builds for its two video benchmarks (default prompt key)."""

from __future__ import annotations

from pruneval.tasks.pocket.prompts import LETTER
from pruneval.tasks.pocket.questions import Question

SELECT = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
BEST = "Only give the best option.\n"


def videomme(question: Question) -> str:
    """Video-MME's prompt; its options are stored with their letters."""
    lines = "\n".join(f"{'ABCDE'[i]}. {choice}" for i, choice in enumerate(question.choices))
    return f"{SELECT}\n{question.text}\n{lines}\n{LETTER}"


def mvbench(question: Question) -> str:
    """MVBench's prompt."""
    lines = "".join(f"({'ABCDE'[i]}) {choice}\n" for i, choice in enumerate(question.choices))
    return f"Question:{question.text}\nOption:\n{lines}{BEST}"
