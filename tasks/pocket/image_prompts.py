"""The prompts that lmms-eval builds for the editions of images beside those in `prompts`, from question and choices.

Training uses these strings inside the chat template, so the model is evaluated on the form it was taught.
"""

from __future__ import annotations

from collections.abc import Sequence

from pruneval.tasks.pocket.prompts import LETTER, SHORT
from pruneval.tasks.pocket.questions import Question

LETTERS = "ABCDE"
WHERE = "Please answer directly with only the letter of the correct option and nothing else."
WORD = "Please answer directly with a single word or number."
CHINESE = "请直接使用所提供的选项字母作为答案回答。"
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
MATHVISTA = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "half": "requiring a floating-point number with one decimal place and provide the final value, "
    "e.g., 1.2, 1.3, 1.4, at the end.",
    "share": "requiring a floating-point number with two decimal places and provide the final value, "
    "e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
    "choice": "and provide the correct option letter, e.g., A, B, C, D, at the end.",
}


def lines(choices: Sequence[str], mark: str = "{}. {}") -> str:
    """One line per choice, behind its letter."""
    return "\n".join(mark.format(letter, text) for letter, text in zip(LETTERS, choices, strict=False))


def textvqa_ocr(question: Question, read: Sequence[str]) -> str:
    """TextVQA's question with what an OCR system read."""
    return f"{question.text.capitalize()}\nReference OCR token: {', '.join(read)}{SHORT}"


def mmbench_en(question: Question, hint: str = "") -> str:
    """MMBench: the hint, if any, before the question."""
    return f"{hint} {question.text} There are several options:\n{lines(question.choices)}\n{LETTER}".lstrip()


def mmbench_cn(question: Question) -> str:
    """MMBench in Chinese, but for the words before the options."""
    return f"{question.text} There are several options:\n{lines(question.choices)}\n\n{CHINESE}"


def choice(question: Question) -> str:
    """AI2D and SEED-Bench."""
    return f"{question.text}\n{lines(question.choices)}{LETTER}"


def mmmu(question: Question) -> str:
    """MMMU, with choices or open; images stand before the text."""
    return f"{question.text}\n{lines(question.choices)}\n{LETTER}" if question.choices else f"{question.text}\n{SHORT}"


def mmstar(question: Question) -> str:
    """MMStar: options inside the question; its request ends without a full stop."""
    options = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
    return f"{question.text}\nOptions: {options}{LETTER.removesuffix('.')}"


def realworldqa(question: Question) -> str:
    """RealWorldQA: the request is part of the question."""
    return f"{question.text}\n{lines(question.choices)}\n{WHERE}" if question.choices else f"{question.text}\n{WORD}"


def vizwiz(question: Question) -> str:
    """VizWiz allows to decline."""
    return f"{question.text}{INSUFFICIENT}{SHORT}"


def chartqa(text: str) -> str:
    """ChartQA."""
    return f"{text}\nAnswer the question with a single word."


def mathvista(question: Question, form: str) -> str:
    """MathVista: what it wants, and what it wants at the end."""
    choices = f"\nChoices:\n{lines(question.choices, '({}) {}')}" if question.choices else ""
    return f"Question: {question.text}{choices}\nHint: Please answer the question {MATHVISTA[form]}"


def mmvet(text: str) -> str:
    """MM-Vet asks for reasoning."""
    return (
        "First please perform reasoning, and think step by step to provide best answer to the following question: "
        f"\n\n{text}"
    )
