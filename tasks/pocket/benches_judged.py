"""Benchmarks scored by a language model (HallusionBench by rules too) on the drawn world, in the originals' columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pruneval.tasks.pocket.items import Row, Tables, asked_about, choice, stream, until
from pruneval.tasks.pocket.questions import Question, phrase
from pruneval.tasks.pocket.world import COLOURS, HELDOUT_PAIRS, Scene, Thing, render

SUBSETS = {"VD": ("illusion", "figure"), "VS": ("chart", "map")}
"""Sub-categories of HallusionBench's two halves, visually dependent and visual supplement."""
FORMS = ("integer", "half", "share", "choice", "list")
CATEGORIES = ("conv", "detail", "complex")


def hallusionbench(seed: int, number: int) -> Tables:
    """Sets of four: two questions about a picture, and about the same picture with one thing in another colour."""
    rows: list[Row] = []
    for index in range(number // 4):
        half = ("VD", "VS")[index % 2]
        scene, (changed, questions) = until(stream(seed, "hallusionbench", index), index, recoloured)
        for figure, picture in enumerate((scene, changed)):
            for asked, (text, sentence) in enumerate(questions):
                truth = figure == asked
                rows.append(
                    {
                        "category": half,
                        "subcategory": SUBSETS[half][index // 2 % 2],
                        "visual_input": "1" if figure == 0 else "2",
                        "set_id": str(index),
                        # Figure 0 of the visual supplement is the question without a picture: not in this split.
                        "figure_id": str(figure + (half == "VS")),
                        "sample_note": "pocket",
                        "question_id": str(asked),
                        "question": text,
                        "gt_answer_details": sentence.format("" if truth else "not "),
                        "gt_answer": str(int(truth)),
                        "filename": f"./pocket/{index}_{figure}.png",
                        "image": render(picture),
                    }
                )
    return {"image": rows}


def mathvista(seed: int, number: int) -> Tables:
    """Whole numbers, numbers with one and with two decimals, choices and lists in turn."""
    rows = []
    for index in range(number):
        rng, form = stream(seed, "mathvista", index), FORMS[index % len(FORMS)]
        scene, question = _calculated(rng, index, form)
        kind = {"integer": "integer", "half": "float", "share": "float", "choice": "text", "list": "list"}[form]
        options = list(question.choices) or None
        rows.append(
            {
                "pid": str(index + 1),
                "question": question.text,
                "image": f"images/{index + 1}.jpg",
                "decoded_image": render(scene),
                "choices": options,
                "unit": None,
                "precision": {"half": 1.0, "share": 2.0}.get(form, 1.0 if form == "integer" else None),
                "answer": question.choices[question.letter_index] if options else question.answer,
                "question_type": "multi_choice" if options else "free_form",
                "answer_type": kind,
                "metadata": {
                    "category": "general-vqa",
                    "context": "synthetic scene",
                    "grade": "elementary school",
                    "img_height": 96,
                    "img_width": 96,
                    "language": "english",
                    "skills": ["arithmetic reasoning"],
                    "source": "pocket",
                    "split": "testmini",
                    "task": "visual question answering",
                },
                "query": f"Question: {question.text}",
            }
        )
    return {"testmini": rows}


def mmvet(seed: int, number: int) -> Tables:
    """Answers of two parts, both wanted, and answers that two phrases may give."""
    rows = []
    for index in range(number):
        scene, (text, answer, capability) = until(stream(seed, "mmvet", index), index, vet(index))
        rows.append(
            {
                "question_id": f"v1_{index}",
                "image": render(scene),
                "question": text,
                "answer": answer,
                "image_source": "pocket",
                "capability": capability,
            }
        )
    return {"test": rows}


def llava_bench(seed: int, number: int) -> Tables:
    """Conversation, description and reasoning in turn; the reference answer is written from the scene."""
    rows = []
    for index in range(number):
        scene, question = asked_about(stream(seed, "llava_bench", index), index, "colour")
        category = CATEGORIES[index % len(CATEGORIES)]
        text, answer = conversation(scene, question, category)
        rows.append(
            {
                "question_id": index,
                "image": render(scene),
                "question": text,
                "caption": caption(scene),
                "image_id": f"{index:03d}.jpg",
                "gpt_answer": answer,
                "category": category,
            }
        )
    return {"train": rows}


def conversation(scene: Scene, question: Question, category: str) -> tuple[str, str]:
    """What a category of LLaVA-Bench asks of a scene and the reference answer; ``question`` is for "conv"."""
    colour = Counter(thing.colour for thing in scene.things).most_common(1)[0][0]
    return {
        "conv": (question.text, f"It is {question.answer}."),
        "detail": ("Describe the image in detail.", caption(scene)),
        "complex": ("Which color stands out in the image, and why?", f"{colour.capitalize()}: {caption(scene)}"),
    }[category]


def recoloured(scene: Scene, rng: np.random.Generator) -> tuple[Scene, list[tuple[str, str]]] | None:
    """The scene with one thing in another colour, and for each of the two colours a question and its answer."""
    single = [i for i, t in enumerate(scene.things) if sum(o.kind == t.kind for o in scene.things) == 1]
    if not single:
        return None
    i = single[int(rng.integers(len(single)))]
    thing = scene.things[i]
    free = [c for c in COLOURS if c != thing.colour and (thing.kind, c) not in HELDOUT_PAIRS]
    other = str(rng.choice(free))
    changed = Scene((*scene.things[:i], replace(thing, colour=other), *scene.things[i + 1 :]), scene.seed)
    words = phrase(thing.kind)
    questions = [
        (f"Is the {words} in the image {c}?", f"The {words} in the image is {{}}{c}.") for c in (thing.colour, other)
    ]
    return changed, questions


def _calculated(rng: np.random.Generator, index: int, form: str) -> tuple[Scene, Question]:
    if form == "integer":
        return asked_about(rng, index, "count")
    if form == "choice":
        return choice(rng, index, ("shape", "colour", "position"))
    return until(rng, index, lambda scene, _: calculation(scene, form))


def calculation(scene: Scene, form: str) -> Question | None:
    """Half of the only number ("half"), all numbers ("list"), or the part of a colour ("share")."""
    digits = [int(thing.kind) for thing in scene.things if thing.is_digit]
    if form == "half" and len(digits) == 1:
        return Question("half", "What is half of the number in the image?", str(digits[0] / 2), ())
    if form == "list" and len(digits) > 1:
        return Question("list", "Which numbers are in the image, from top to bottom?", str(digits), ())
    share = sum(thing.colour == scene.things[0].colour for thing in scene.things) / len(scene.things)
    if form == "share" and share < 1:
        text = f"What fraction of the objects in the image is {scene.things[0].colour}?"
        return Question("share", text, str(round(share, 2)), ())
    return None


def vet(index: int) -> Callable[[Scene, np.random.Generator], tuple[str, str, str] | None]:
    """MM-Vet's question about a scene: text, answer and capabilities; odd ones ask for a place, even for two things."""

    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str] | None:
        placed = [t for t in scene.things if t.quadrant and sum(o.kind == t.kind for o in scene.things) == 1]
        if not placed:
            return None
        thing = placed[int(rng.integers(len(placed)))]
        words = phrase(thing.kind)
        if index % 2:
            spoken = str(thing.quadrant).replace("top", "upper").replace("bottom", "lower")
            return f"Where is the {words} in the image?", f"{thing.quadrant}<OR>{spoken}", "rec,spat"
        text = f"What color is the {words} in the image, and where is it?"
        return text, f"{thing.colour}<AND>{thing.quadrant}", "ocr,rec,spat" if thing.is_digit else "rec,spat"

    return ask


def caption(scene: Scene) -> str:
    """All things of a scene in a sentence."""

    def one(thing: Thing) -> str:
        where = f" in the {thing.quadrant}" if thing.quadrant else ""
        return f"a {phrase(thing.kind, thing.colour)}{where}"

    return f"A dark picture with {', '.join(one(thing) for thing in scene.things)}."
