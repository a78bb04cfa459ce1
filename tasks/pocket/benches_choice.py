"""Multiple-choice benchmarks on the drawn world, in the columns of the originals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pruneval.tasks.pocket import image_prompts
from pruneval.tasks.pocket.items import LETTERS, Row, Tables, asked_about, choice, stream, until
from pruneval.tasks.pocket.questions import QUADRANTS, Question, name
from pruneval.tasks.pocket.world import COLOURS, SHAPES, Scene, draw, render

FOUR = ("shape", "colour", "position", "count", "digit")
"""Skills with at least four possible answers."""
ROTATION = 1_000_000
"""MMBench's step between the indices of a question's rotations."""
LEVELS = {"shape": "object localization", "colour": "attribute recognition", "position": "spatial relationship",
          "count": "object counting", "digit": "ocr"}  # fmt: skip
COLOURS_CN = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "白色"), strict=True))
SHAPES_CN = dict(zip(SHAPES, ("圆形", "正方形", "三角形", "十字", "圆环"), strict=True))
QUADRANTS_CN = dict(zip(QUADRANTS, ("左上角", "右上角", "左下角", "右下角"), strict=True))
STAR = (
    ("coarse perception", "image scene and topic", "count"),
    ("fine-grained perception", "recognition", "shape"),
    ("fine-grained perception", "localization", "position"),
    ("instance reasoning", "single-instance reasoning", "colour"),
    ("logical reasoning", "diagram reasoning", "digit"),
    ("science & technology", "biology & chemistry & physics", "colour"),
    ("math", "numeric commonsense and calculation", "count"),
)
"""MMStar's category and sub-category, and the skill that stands in for it."""
SUBJECTS = ("Art", "Accounting", "Biology", "Pharmacy", "History", "Materials")
"""One of MMMU's subjects from each of its six domains."""
FRAMES = 4


def mmbench_en(seed: int, number: int) -> Tables:
    """Questions with three or four choices, each once per rotation of them."""
    rows: list[Row] = []
    for index in range(number):
        rng = stream(seed, "mmbench_en", index)
        scene, question = choice(rng, index, FOUR)
        choices = shortened(question, index)
        hint = "The picture shows some colored objects." if index % 3 == 0 else "nan"
        rows.extend(_rotations(index + 1, question, choices, hint, scene))
    return {"dev": rows}


def mmbench_cn(seed: int, number: int) -> Tables:
    """The same in Chinese, about colours, shapes and places."""
    rows: list[Row] = []
    for index in range(number):
        scene, question = until(stream(seed, "mmbench_cn", index), index, chinese)
        rows.extend(_rotations(index + 1, question, shortened(question, index), None, scene))
    return {"dev": rows}


def ai2d(seed: int, number: int) -> Tables:
    """Four choices; the answer is the index of the right one, as digits."""
    rows = []
    for index in range(number):
        scene, question = choice(stream(seed, "ai2d", index), index, FOUR)
        rows.append(
            {
                "question": question.text,
                "options": list(question.choices),
                "answer": str(question.letter_index),
                "image": render(scene),
            }
        )
    return {"test": rows}


def seedbench(seed: int, number: int) -> Tables:
    """Three of four questions about one image; every fourth about frames in which things appear one after another."""
    rows = []
    for index in range(number):
        rng = stream(seed, "seedbench", index)
        video = index % 4 == 3
        if video:
            scenes, question = appearing(rng, ("test", "heldout")[index % 2])
            frames = [render(scene) for scene in scenes]
        else:
            scene, question = choice(rng, index, FOUR)
            frames = [render(scene)]
        rows.append(
            {
                "answer": question.answer,
                **{f"choice_{letter.lower()}": text for letter, text in zip(LETTERS, question.choices, strict=False)},
                "data_id": f"pocket_{index:04d}",
                "data_type": "video" if video else "image",
                "question": question.text,
                "question_id": str(index),
                "question_type_id": 10 if video else 1 + FOUR.index(question.skill),
                "image": frames,
                "segment": [0.0, float(FRAMES)] if video else [],
            }
        )
    return {"test": rows}


def mmstar(seed: int, number: int) -> Tables:
    """Options inside the question, categories and sub-categories in turn."""
    rows = []
    for index in range(number):
        category, sub_category, skill = STAR[index % len(STAR)]
        scene, question = choice(stream(seed, "mmstar", index), index, (skill,))
        options = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
        rows.append(
            {
                "index": index,
                "question": f"{question.text}\nOptions: {options}",
                "image": render(scene),
                "answer": question.answer,
                "category": category,
                "l2_category": sub_category,
                "meta_info": {"source": "pocket", "split": "val", "image_path": f"images/{index}.png"},
            }
        )
    return {"val": rows}


def mmmu(seed: int, number: int) -> Tables:
    """Subjects in turn; every third question is open, and every sixth asks to compare two images."""
    rows = []
    for index in range(number):
        rng = stream(seed, "mmmu", index)
        kind = ("choice", "two", "open")[index % 3] if index % 2 else "choice"
        images, text, options, answer = _mmmu(rng, index, kind)
        rows.append(
            {
                "id": f"validation_{SUBJECTS[index % len(SUBJECTS)]}_{index // len(SUBJECTS) + 1}",
                "question": text,
                "options": repr(options),
                "explanation": "",
                **{f"image_{i + 1}": images[i] if i < len(images) else None for i in range(7)},
                "img_type": "['Pocket world']",
                "answer": answer,
                "topic_difficulty": "Easy",
                "question_type": "multiple-choice" if options else "open",
                "subfield": "Pocket world",
            }
        )
    return {"validation": rows}


def realworldqa(seed: int, number: int) -> Tables:
    """Two of three questions with choices, the others answered with a word or number."""
    rows = []
    for index in range(number):
        rng = stream(seed, "realworldqa", index)
        if index % 3 == 2:
            scene, question = asked_about(rng, index, ("count", "existence", "digit")[index // 3 % 3])
        else:
            scene, question = choice(rng, index, FOUR)
        text, answer = image_prompts.realworldqa(question), question.answer.capitalize()
        rows.append({"image": render(scene), "question": text, "answer": answer})
    return {"test": rows}


def shortened(question: Question, index: int) -> tuple[str, ...]:
    """Four choices, or in every second question three, the right one among them."""
    if index % 2 == 0:
        return question.choices
    right = question.letter_index
    return tuple(text for i, text in enumerate(question.choices) if i != (right + 1) % len(question.choices))


def _rotations(base: int, question: Question, choices: Sequence[str], hint: str | None, scene: Scene) -> list[Row]:
    """One row per rotation: options and the letter of the right one move on together."""
    right, picture = question.choices[question.letter_index], render(scene)
    rows = []
    for turn in range(len(choices)):
        turned = [*choices[turn:], *choices[:turn]]
        rows.append(
            {
                "index": base + turn * ROTATION,
                "question": question.text,
                "hint": hint,
                "answer": LETTERS[turned.index(right)],
                **{letter: turned[i] if i < len(turned) else "nan" for i, letter in enumerate("ABCD")},
                "category": LEVELS[question.skill],
                "image": picture,
                "source": "pocket",
                "L2-category": "finegrained_perception (instance-level)",
                "comment": "nan",
                "split": "dev",
            }
        )
    return rows


def chinese(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question with four choices in Chinese; None where the scene allows none."""
    shapes = [thing for thing in scene.things if not thing.is_digit]
    if not shapes:
        return None
    thing = shapes[int(rng.integers(len(shapes)))]
    form = ("colour", "shape", "position")[int(rng.integers(3))]
    key = "kind" if form in ("colour", "position") else "colour"
    if sum(getattr(other, key) == getattr(thing, key) for other in scene.things) > 1:
        return None
    if form == "position" and thing.quadrant is None:
        return None
    text, words, right = {
        "colour": (f"图中的{SHAPES_CN[thing.kind]}是什么颜色?", COLOURS_CN, thing.colour),
        "shape": (f"图中{COLOURS_CN[thing.colour]}的物体是什么形状?", SHAPES_CN, thing.kind),
        "position": (f"{SHAPES_CN[thing.kind]}在图中的什么位置?", QUADRANTS_CN, str(thing.quadrant)),
    }[form]
    wrong = [words[one] for one in words if one != right]
    picked = [wrong[i] for i in rng.permutation(len(wrong))[:3]]
    place = int(rng.integers(4))
    choices = (*picked[:place], words[right], *picked[place:])
    return Question(form, text, LETTERS[place], (), tuple(words.values()), choices)


def appearing(rng: np.random.Generator, split: str) -> tuple[list[Scene], Question]:
    """Frames that show one thing more each, and the question which shape comes last (or first)."""
    while True:
        scene = draw(rng, split, FRAMES)
        kinds = [thing.kind for thing in scene.things]
        if len(set(kinds)) == FRAMES:
            break
    turn = ("first", "last")[int(rng.integers(2))]
    order = rng.permutation(FRAMES)
    frames = [Scene(tuple(scene.things[i] for i in sorted(order[: shown + 1])), scene.seed) for shown in range(FRAMES)]
    right = kinds[int(order[0] if turn == "first" else order[-1])]
    choices = tuple(name(kinds[i]) for i in rng.permutation(FRAMES))
    answer = LETTERS[choices.index(name(right))]
    return frames, Question("order", f"Which object appears {turn}?", answer, (), tuple(kinds), choices)


def _mmmu(rng: np.random.Generator, index: int, kind: str) -> tuple[list[np.ndarray], str, list[str], str]:
    """Pictures, the question with its image tags, options (none for an open one) and the answer."""
    if kind == "choice":
        scene, question = choice(rng, index, FOUR)
        return [render(scene)], f"<image 1> {question.text}", list(question.choices), question.answer
    if kind == "open":
        scene, question = asked_about(rng, index, ("digit", "count", "colour")[index % 3])
        return [render(scene)], f"<image 1> {question.text}", [], question.answer
    one, other = draw(rng, "test"), draw(rng, "heldout")
    question = fuller(one, other)
    return [render(one), render(other)], f"<image 1> <image 2> {question.text}", list(question.choices), question.answer


def fuller(one: Scene, other: Scene) -> Question:
    """Which of two images shows more."""
    difference = len(one.things) - len(other.things)
    answer = "A" if difference > 0 else "B" if difference < 0 else "C"
    choices = ("the first", "the second", "they show the same number")
    return Question("fuller", "Which image shows more objects?", answer, (), (), choices)
