"""The rows of MME, POPE, GQA, ScienceQA and TextVQA on the drawn world: what each asks, in its own columns.

Every maker takes (seed, number of questions) and returns its tables as lists of rows; images are uint8 arrays of shape
(96, 96, 3).
"""

from __future__ import annotations

import functools

import numpy as np

from pruneval.tasks.pocket import prompts
from pruneval.tasks.pocket.items import Row, Tables, stream, until
from pruneval.tasks.pocket.questions import PAIR_CATEGORIES, Question, ask, choose, pair
from pruneval.tasks.pocket.world import SHAPES, SIZE, Scene, render

MME_ORDER = (0, 4, 1, 5, 2, 3)
"""Categories in turn, perception and cognition mixed, so that four questions suffice for both of MME's scores."""
POPE_CATEGORIES = ("adversarial", "popular", "random")
GQA_SKILLS = ("shape", "colour", "existence", "position")
SCIENCE_SKILLS = ("shape", "colour", "position", "count", "digit")
TEXT_DISSENT = 3
"""At most so many of TextVQA's ten people give another answer; four who agree are enough for a full score."""


def mme(seed: int, number: int) -> Tables:
    """Pairs of one question to affirm and one to deny, the categories in turn, so that a first part has all of them."""
    rows = []
    for index in range(number // 2):
        category = PAIR_CATEGORIES[MME_ORDER[index % len(MME_ORDER)]]
        # Splits alternate by round of categories, so that every category has both.
        turn = index // len(MME_ORDER)
        scene, questions = until(stream(seed, "mme", index), turn, functools.partial(pair, category=category))
        for question in questions:
            rows.append(
                {
                    "question_id": f"{category}/{index:04d}.png",
                    "image": render(scene),
                    "question": prompts.mme_field(question),
                    "answer": question.answer.capitalize(),
                    "category": category,
                }
            )
    return {"test": rows}


def pope(seed: int, number: int) -> Tables:
    """Per scene one thing that is there and one that is not, the three ways of choosing the absent one in turn."""
    rows: list[Row] = []
    for index in range(number // 2):
        category = POPE_CATEGORIES[index % len(POPE_CATEGORIES)]

        def both(scene: Scene, rng: np.random.Generator, category: str = category) -> list[Question] | None:
            asked = [ask(scene, rng, "existence") for _ in range(24)]
            yes = [q for q in asked if q is not None and q.answer == "yes"]
            no = [q for q in asked if q is not None and q.answer == "no" and _samples(category, q, scene)]
            return [yes[0], no[0]] if yes and no else None

        scene, questions = until(stream(seed, "pope", index), index, both)
        for question in questions:
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(len(rows) + 1),
                    "question": question.text,
                    "answer": question.answer,
                    "image_source": f"pocket_{index:06d}",
                    "image": render(scene),
                    "category": category,
                }
            )
    return {"test": rows}


def gqa(seed: int, number: int) -> Tables:
    """An image table, and for each image one question of every skill."""
    images: list[Row] = []
    rows: list[Row] = []
    for index in range(-(-number // len(GQA_SKILLS))):

        def all_skills(scene: Scene, rng: np.random.Generator) -> list[Question] | None:
            asked = [found for skill in GQA_SKILLS if (found := ask(scene, rng, skill)) is not None]
            return asked if len(asked) == len(GQA_SKILLS) else None

        scene, questions = until(stream(seed, "gqa", index), index, all_skills)
        image = f"n{index:06d}"
        images.append({"id": image, "image": render(scene)})
        rows.extend(_gqa_row(question, image, f"{index:06d}{turn}") for turn, question in enumerate(questions))
    return {"testdev": rows[:number], "images": images}


def scienceqa(seed: int, number: int) -> Tables:
    """Multiple-choice questions of five skills in turn."""
    rows = []
    for index in range(number):
        skill = SCIENCE_SKILLS[index % len(SCIENCE_SKILLS)]
        rng = stream(seed, "scienceqa", index)
        scene, question = until(rng, index, functools.partial(ask, skill=skill))
        question = choose(question, rng)
        right = question.choices[question.letter_index]
        rows.append(
            {
                "image": render(scene),
                "question": question.text,
                "choices": list(question.choices),
                "answer": question.letter_index,
                "hint": question.hint,
                "task": "closed choice",
                "grade": "grade1",
                "subject": "natural science",
                "topic": "pocket world",
                "category": skill,
                "skill": f"Tell the {skill} of things in a picture",
                "lecture": "",
                "solution": f"The picture shows that the answer is {right}.",
            }
        )
    return {"test": rows}


def textvqa(seed: int, number: int) -> Tables:
    """Numbers to be read, with the answers of ten people of whom at most three misread."""
    rows = []
    for index in range(number):
        rng = stream(seed, "textvqa", index)
        scene, question = until(rng, index, lambda s, r: ask(s, r, "digit"))
        wrong = [option for option in question.options if option != question.answer]
        dissent = int(rng.integers(TEXT_DISSENT + 1))
        people = [question.answer] * (10 - dissent) + [str(rng.choice(wrong)) for _ in range(dissent)]
        rows.append(
            {
                "image_id": f"pocket{index:012d}",
                "question_id": index,
                "question": question.text,
                "question_tokens": question.text.lower().rstrip("?").split(),
                "image": render(scene),
                "image_width": SIZE,
                "image_height": SIZE,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": [people[i] for i in rng.permutation(10)],
                "image_classes": sorted({"Number" if thing.is_digit else "Shape" for thing in scene.things}),
                "set_name": "val",
                "ocr_tokens": [thing.kind for thing in scene.things if thing.is_digit],
            }
        )
    return {"validation": rows}


def _samples(category: str, question: Question, scene: Scene) -> bool:
    """Whether POPE's way of choosing absent things would choose the one this question asks about.

    adversarial: its kind and its colour are both in the image, but on different things. popular: a shape, as most
    things are. random: anything.
    """
    words = question.text.removeprefix("Is there a ").removesuffix(" in the image?").split()
    kind = words[-1]
    if category == "adversarial":
        colours = {thing.colour for thing in scene.things}
        return len(words) > 1 and words[0] in colours and any(thing.kind == kind for thing in scene.things)
    return category == "random" or kind in SHAPES


def _gqa_row(question: Question, image: str, identity: str) -> Row:
    structural = "verify" if question.skill == "existence" else "query"
    semantic = {"shape": "cat", "colour": "attr", "existence": "obj", "position": "rel"}[question.skill]
    argument = question.text.rstrip("?")
    return {
        "id": identity,
        "imageId": image,
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": question.answer.capitalize() + ".",
        "isBalanced": True,
        "groups": {"global": question.skill, "local": f"{question.skill}-{image}"},
        "entailed": "",
        "equivalent": identity,
        "types": {"structural": structural, "semantic": semantic, "detailed": question.skill},
        "annotations": {"question": [], "answer": [], "fullAnswer": []},
        "semantic": [{"operation": structural, "argument": argument, "dependencies": []}],
        "semanticStr": f"{structural}: {argument}",
    }
