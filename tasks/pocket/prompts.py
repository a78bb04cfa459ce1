"""The exact prompts that lmms-eval builds from a question, benchmark by benchmark (default prompt key).

Training uses these strings inside the chat template, so the model is evaluated on the form it was taught. The
functions ending in ``_field`` give what a data set's question column must hold for lmms-eval to arrive at them.
"""

from __future__ import annotations

from pruneval.tasks.pocket.questions import Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_NO = " Please answer yes or no."


def mme_field(question: Question) -> str:
    """MME's question column ends with a request that lmms-eval takes off again."""
    return question.text + YES_NO


def mme(question: Question) -> str:
    """MME's prompt."""
    return question.text + SHORT


def pope(question: Question) -> str:
    """POPE's prompt."""
    return question.text + SHORT


def gqa(question: Question) -> str:
    """GQA's prompt."""
    return question.text + SHORT


def textvqa(question: Question) -> str:
    """The question passes through ``str.capitalize``; no OCR tokens are given by default."""
    return question.text.capitalize() + SHORT


def scienceqa(question: Question) -> str:
    """Context line if there is a hint, the question, one line per choice."""
    context = f"Context: {question.hint}\n" if question.hint else ""
    lines = "\n".join(f"{'ABCDE'[i]}. {choice}" for i, choice in enumerate(question.choices))
    return f"{context}{question.text}\n{lines}{LETTER}"


def chat(prompt: str) -> str:
    """One image and one user turn in the chat template (the image placeholder not yet repeated)."""
    return f"USER: <image>\n{prompt} ASSISTANT:"
