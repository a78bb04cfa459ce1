"""Benchmarks with short free answers on the drawn world: people's votes, edit distance, relaxed numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pruneval.tasks.pocket.charts import Chart, draw_chart, render_chart
from pruneval.tasks.pocket.items import Row, Tables, asked_about, people, stream, until
from pruneval.tasks.pocket.questions import Question, name
from pruneval.tasks.pocket.world import COLOURS, SHAPES, Scene, draw, render

VQA_SKILLS = ("existence", "count", "colour", "shape")
ANSWER_TYPES = {"existence": "yes/no", "count": "number"}
UNANSWERABLE = 3
"""Every third of VizWiz's questions asks about something that is not in the picture."""
DISSENT = 8
"""At most so many of ten people give another answer: below four who agree, the right answer is worth less than 1."""
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OTHER_WORDS = {"top": "upper", "bottom": "lower"}


def vqav2(seed: int, number: int) -> Tables:
    """Ten people's answers as records."""
    rows = []
    for index in range(number):
        rng = stream(seed, "vqav2", index)
        skill = VQA_SKILLS[index % len(VQA_SKILLS)]
        scene, question = asked_about(rng, index, skill)
        given = people(rng, question, int(rng.integers(DISSENT + 1)) if index % 3 == 0 else 0)
        rows.append(
            {
                "question_type": " ".join(question.text.lower().split()[:2]),
                "multiple_choice_answer": Counter(given).most_common(1)[0][0],
                "answers": [
                    {"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(given)
                ],
                "image_id": index,
                "answer_type": ANSWER_TYPES.get(skill, "other"),
                "question_id": 10 * index,
                "question": question.text,
                "image": render(scene),
            }
        )
    return {"validation": rows}


def vizwiz(seed: int, number: int) -> Tables:
    """Every third question cannot be answered from its picture, and most people say so."""
    rows = []
    for index in range(number):
        rng = stream(seed, "vizwiz", index)
        if index % UNANSWERABLE == UNANSWERABLE - 1:
            scene, question = until(rng, index, absent)
            category = "unanswerable"
        else:
            skill = ("colour", "shape", "count")[index % 3]
            scene, question = asked_about(rng, index, skill)
            category = ANSWER_TYPES.get(skill, "other")
        rows.append(
            {
                "question_id": f"VizWiz_val_{index:08d}.jpg",
                "image": render(scene),
                "question": question.text,
                "answers": people(rng, question, int(rng.integers(DISSENT + 1)) if index % 4 == 0 else 0),
                "category": category,
            }
        )
    return {"val": rows}


def docvqa(seed: int, number: int) -> Tables:
    """Places, which two phrases may name, and numbers to be read."""
    rows = []
    for index in range(number):
        skill = ("position", "digit", "colour")[index % 3]
        scene, question = asked_about(stream(seed, "docvqa", index), index, skill)
        rows.append(
            {
                "questionId": str(1000 + index),
                "question": question.text,
                "question_types": ["layout" if skill == "position" else "free_text"],
                "image": render(scene),
                "docId": index,
                "ucsf_document_id": f"pocket{index:04d}",
                "ucsf_document_page_no": "1",
                "answers": _golds(question),
                "data_split": "val",
            }
        )
    return {"validation": rows}


def infovqa(seed: int, number: int) -> Tables:
    """Tall pictures of two scenes, one above the other; some answers need both."""
    rows = []
    for index in range(number):
        rng = stream(seed, "infovqa", index)
        upper, lower = draw(rng, "test"), draw(rng, "heldout")
        text, answer = about_halves(upper, lower, index % 3)
        golds = [answer, NUMBER_WORDS[int(answer)]] if answer.isdigit() else [answer]
        rows.append(
            {
                "questionId": str(5000 + index),
                "question": text,
                "answers": golds,
                "answer_type": ["non-extractive"],
                "image": stacked(upper, lower),
                "image_url": "",
                "operation/reasoning": ["counting"],
                "ocr": "",
                "data_split": "val",
            }
        )
    return {"validation": rows}


def chartqa(seed: int, number: int) -> Tables:
    """Values, shares, means and colours of bars; the first half as people ask, the second as templates do."""
    rows: list[Row] = []
    for index in range(number):
        chart = draw_chart(rng := stream(seed, "chartqa", index))
        text, answer = about_bars(chart, rng, index % 4)
        kind = "human_test" if index < number // 2 else "augmented_test"
        rows.append({"type": kind, "question": text, "answer": answer, "image": render_chart(chart)})
    return {"test": rows}


def absent(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The colour of a shape that is not there."""
    missing = [shape for shape in SHAPES if all(thing.kind != shape for thing in scene.things)]
    if not missing:
        return None
    shape = missing[int(rng.integers(len(missing)))]
    text = f"What color is the {name(shape)}?"
    return Question("colour", text, "unanswerable", (), ("unanswerable", "unsuitable", *COLOURS))


def _golds(question: Question) -> list[str]:
    first, _, rest = question.answer.partition(" ")
    return [question.answer, f"{OTHER_WORDS[first]} {rest}"] if first in OTHER_WORDS else [question.answer]


def stacked(upper: Scene, lower: Scene) -> np.ndarray:
    """A tall picture: uint8 array (192, 96, 3)."""
    return np.concatenate([render(upper), render(lower)])


def about_halves(upper: Scene, lower: Scene, form: int) -> tuple[str, str]:
    """How many things there are in all, how many in the top half, or which half has more."""
    return (
        ("How many objects are in the image?", str(len(upper.things) + len(lower.things))),
        ("How many objects are in the top half of the image?", str(len(upper.things))),
        ("Which half of the image shows more objects?", _more(upper, lower)),
    )[form]


def _more(upper: Scene, lower: Scene) -> str:
    difference = len(upper.things) - len(lower.things)
    return "top" if difference > 0 else "bottom" if difference < 0 else "neither"


def about_bars(chart: Chart, rng: np.random.Generator, form: int) -> tuple[str, str]:
    """A whole number, a colour, a share in per cent, or a mean with decimals."""
    i = int(rng.integers(len(chart.values)))
    value, colour = chart.values[i], chart.colours[i]
    if form == 0:
        return f"What is the value of the {colour} bar?", str(value)
    if form == 1:
        return "Which color has the highest bar?", chart.colours[int(np.argmax(chart.values))]
    if form == 2:
        return f"What is the share of the {colour} bar?", f"{100 * value / sum(chart.values):.1f}%"
    return "What is the mean of all bars?", f"{sum(chart.values) / len(chart.values):.2f}"
