"""Questions about a scene, with their answers and the things that are the evidence.

``ask(scene, rng, skill)`` returns a ``Question``, or None where the scene does not allow one without ambiguity; draw
another scene then. ``pair(scene, rng, category)`` makes MME's pairs: one question to affirm, one to deny, of the same
image. ``choose(question, rng, number)`` turns an open question into a multiple-choice one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from pruneval.tasks.pocket.world import COLOURS, DIGITS, HELDOUT_PAIRS, SHAPES, Scene, Thing

SKILLS = ("shape", "colour", "existence", "position", "count", "digit")
PAIR_CATEGORIES = ("existence", "count", "position", "color", "numerical_calculation", "commonsense_reasoning")
"""Names of MME's categories that the world can ask about; the last two belong to MME's cognition part."""

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = tuple("12345")
HINTS = ("", "", "The picture shows some colored objects.", "Look at the picture.")


@dataclass(frozen=True)
class Question:
    """One question; ``evidence`` holds the indices (in ``scene.things``) of what one must see to answer it."""

    skill: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    options: tuple[str, ...] = ()
    """All answers that a question of this form can have."""
    choices: tuple[str, ...] = ()
    """For a multiple-choice question: the choices in order; the answer is then a letter."""
    hint: str = ""

    @property
    def letter_index(self) -> int:
        """Index of the right choice of a multiple-choice question."""
        return "ABCDE".index(self.answer)


def ask(scene: Scene, rng: np.random.Generator, skill: str) -> Question | None:
    """Ask a question of the skill, or return None if the scene allows none."""
    makers = {
        "shape": _shape, "colour": _colour, "existence": _existence, "position": _position, "count": _count,
        "digit": _digit,
    }  # fmt: skip
    if skill not in makers:
        raise ValueError(f"unknown skill {skill!r}; expected one of {SKILLS}")
    return makers[skill](scene, rng)


def choose(question: Question, rng: np.random.Generator, number: int | None = None) -> Question:
    """Make an open question multiple-choice, with two to four choices and perhaps a hint; the answer is a letter."""
    number = number or int(rng.integers(2, 5))
    wrong = [o for o in question.options if o != question.answer]
    picked = [wrong[i] for i in rng.permutation(len(wrong))[: number - 1]]
    place = int(rng.integers(len(picked) + 1))
    choices = (*picked[:place], question.answer, *picked[place:])
    return replace(question, answer="ABCDE"[place], choices=choices, hint=str(rng.choice(HINTS)))


def name(kind: str) -> str:
    """How questions call a kind: "circle", or "number 7"."""
    return f"number {kind}" if kind in DIGITS else kind


def phrase(kind: str, colour: str | None = None) -> str:
    """How a thing is called in a question: with its colour, if given."""
    return f"{colour} {name(kind)}" if colour else name(kind)


def _unique(scene: Scene, rng: np.random.Generator) -> tuple[int, str] | None:
    """A thing and a phrase that means no other: by kind alone if that is enough, else by colour and kind."""
    kinds = Counter(t.kind for t in scene.things)
    looks = Counter((t.kind, t.colour) for t in scene.things)
    for i in rng.permutation(len(scene.things)).tolist():
        thing = scene.things[i]
        if looks[thing.kind, thing.colour] > 1:
            continue
        by_kind = kinds[thing.kind] == 1 and rng.random() < 0.5
        return i, phrase(thing.kind, None if by_kind else thing.colour)
    return None


def _only(scene: Scene, rng: np.random.Generator, good: list[int]) -> int | None:
    return good[int(rng.integers(len(good)))] if good else None


def _everything(scene: Scene) -> tuple[int, ...]:
    return tuple(range(len(scene.things)))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = [i for i, t in enumerate(scene.things) if not t.is_digit]
    colours = Counter(scene.things[i].colour for i in shapes)
    if len(shapes) == 1 and rng.random() < 0.3:
        thing = scene.things[shapes[0]]
        return Question("shape", "What shape is shown in the image?", thing.kind, (shapes[0],), SHAPES)
    i = _only(scene, rng, [i for i in shapes if colours[scene.things[i].colour] == 1])
    if i is None:
        return None
    thing = scene.things[i]
    lone = all(t.colour != thing.colour or t is thing for t in scene.things)
    text = f"What is the shape of the {thing.colour} object?" if lone else f"Which shape is {thing.colour}?"
    return Question("shape", text, thing.kind, (i,), SHAPES)


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    kinds = Counter(t.kind for t in scene.things)
    i = _only(scene, rng, [i for i, t in enumerate(scene.things) if kinds[t.kind] == 1])
    if i is None:
        return None
    text = ("What color is the {}?", "Which color is the {} in the image?")[int(rng.integers(2))]
    return Question("colour", text.format(name(scene.things[i].kind)), scene.things[i].colour, (i,), COLOURS)


def _existence(scene: Scene, rng: np.random.Generator, answer: str | None = None) -> Question:
    """Most absent things share the kind or the colour of one that is there, as POPE's hardest do.

    A scene without a held-out pair is never asked about one, lest training teach that such pairs do not exist.
    """
    yes = rng.random() < 0.5 if answer is None else answer == "yes"
    by_kind = rng.random() < 0.35
    there = {(t.kind, t.colour) for t in scene.things}
    allowed = bool(there & HELDOUT_PAIRS)
    while True:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        kind, colour = thing.kind, thing.colour
        if not yes:
            hard = rng.random()
            kind = str(rng.choice(SHAPES if rng.random() < 0.6 else DIGITS)) if by_kind or hard < 0.7 else kind
            colour = str(rng.choice(COLOURS)) if hard >= 0.35 else colour
        present = any(k == kind for k, _ in there) if by_kind else (kind, colour) in there
        if present == yes and (by_kind or allowed or (kind, colour) not in HELDOUT_PAIRS):
            break
    seen = tuple(i for i, t in enumerate(scene.things) if t.kind == kind and (by_kind or t.colour == colour))
    text = f"Is there a {phrase(kind, None if by_kind else colour)} in the image?"
    return Question("existence", text, "yes" if yes else "no", seen if yes else _everything(scene), ("yes", "no"))


def _placed(scene: Scene, rng: np.random.Generator) -> tuple[int, str, Thing] | None:
    found = _unique(scene, rng)
    if found is None or scene.things[found[0]].quadrant is None:
        return None
    return *found, scene.things[found[0]]


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    found = _placed(scene, rng)
    if found is None:
        return None
    i, words, thing = found
    return Question("position", f"Where is the {words} in the image?", str(thing.quadrant), (i,), QUADRANTS)


def _groups(scene: Scene) -> list[tuple[str, int]]:
    """What can be counted, in the plural, and how many there are."""
    kinds = Counter(t.kind for t in scene.things)
    colours = Counter(t.colour for t in scene.things)
    digits = sum(t.is_digit for t in scene.things)
    groups = [("objects", len(scene.things))] * 2 + [(f"{s}{'es' if s == 'cross' else 's'}", kinds[s]) for s in SHAPES]
    groups += [(f"{c} objects", colours[c]) for c in COLOURS] + [("numbers", digits)]
    return [(words, number) for words, number in groups if number]


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    groups = _groups(scene)
    wanted = int(rng.integers(1, 6))
    fit = [g for g in groups if g[1] == wanted] or groups[:1]
    words, number = fit[int(rng.integers(len(fit)))]
    return Question("count", f"How many {words} are in the image?", str(number), _everything(scene), NUMBERS)


def _digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    digits = [i for i, t in enumerate(scene.things) if t.is_digit]
    colours = Counter(scene.things[i].colour for i in digits)
    i = _only(scene, rng, [i for i in digits if colours[scene.things[i].colour] == 1])
    if i is None:
        return None
    thing = scene.things[i]
    if len(digits) == 1 and rng.random() < 0.4:
        text = ("What number is shown in the image?", "What is the number in the image?")[int(rng.integers(2))]
    else:
        text = (f"What is the {thing.colour} number?", f"Which number is {thing.colour}?")[int(rng.integers(2))]
    return Question("digit", text, thing.kind, (i,), DIGITS)


def pair(scene: Scene, rng: np.random.Generator, category: str) -> tuple[Question, Question] | None:
    """Two questions of an MME category about one image: the first to affirm, the second to deny; or None."""
    if category == "existence":
        return _existence(scene, rng, "yes"), _existence(scene, rng, "no")
    makers = {
        "count": _pair_count, "position": _pair_position, "color": _pair_colour,
        "numerical_calculation": _pair_calculation, "commonsense_reasoning": _pair_more,
    }  # fmt: skip
    if category not in makers:
        raise ValueError(f"unknown category {category!r}; expected one of {PAIR_CATEGORIES}")
    made = makers[category](scene, rng)
    if made is None:
        return None
    yes, no, evidence = made
    return (
        Question(category, yes, "yes", evidence, ("yes", "no")),
        Question(category, no, "no", evidence, ("yes", "no")),
    )


Pair = tuple[str, str, tuple[int, ...]]


def _other(rng: np.random.Generator, options: tuple[str, ...], right: str) -> str:
    return str(rng.choice([o for o in options if o != right]))


def _pair_count(scene: Scene, rng: np.random.Generator) -> Pair | None:
    question = _count(scene, rng)
    if question is None:
        return None
    words = question.text.removeprefix("How many ").removesuffix(" are in the image?")

    one = words.removesuffix("es" if words == "crosses" else "s")

    def text(number: str) -> str:
        return f"Is there 1 {one} in the image?" if number == "1" else f"Are there {number} {words} in the image?"

    near = [n for n in NUMBERS if abs(int(n) - int(question.answer)) in (1, 2)]
    return text(question.answer), text(str(rng.choice(near))), question.evidence


def _pair_position(scene: Scene, rng: np.random.Generator) -> Pair | None:
    found = _placed(scene, rng)
    if found is None:
        return None
    i, words, thing = found
    options: tuple[str, ...] = QUADRANTS
    form, right = f"Is the {words} in the {{}} of the image?", str(thing.quadrant)
    if rng.random() < 0.5:
        form, right, options = (
            f"Is the {words} on the {{}} side of the image?",
            str(thing.horizontal),
            ("left", "right"),
        )
    return form.format(right), form.format(_other(rng, options, right)), (i,)


def _pair_colour(scene: Scene, rng: np.random.Generator) -> Pair | None:
    question = _colour(scene, rng)
    if question is None:
        return None
    words = name(scene.things[question.evidence[0]].kind)
    return (
        f"Is the {words} {question.answer}?", f"Is the {words} {_other(rng, COLOURS, question.answer)}?",
        question.evidence,
    )  # fmt: skip


def _pair_calculation(scene: Scene, rng: np.random.Generator) -> Pair | None:
    question = _digit(scene, rng)
    if question is None or not 0 < int(question.answer) < 9:
        return None
    value, i = int(question.answer), question.evidence[0]
    named = scene.things[i].colour in question.text
    subject = f"the {scene.things[i].colour} number" if named else "the number in the image"
    low, high = int(rng.integers(0, value)), int(rng.integers(value + 1, 10))
    if rng.random() < 0.5:
        return f"Is {subject} greater than {low}?", f"Is {subject} greater than {high}?", (i,)
    return f"Is {subject} less than {high}?", f"Is {subject} less than {low}?", (i,)


def _pair_more(scene: Scene, rng: np.random.Generator) -> Pair | None:
    colours = Counter(t.colour for t in scene.things)
    more, fewer = (str(c) for c in rng.choice(COLOURS, 2, replace=False))
    if colours[more] == colours[fewer]:
        return None
    if colours[more] < colours[fewer]:
        more, fewer = fewer, more
    form = "Are there more {} objects than {} objects in the image?"
    return form.format(more, fewer), form.format(fewer, more), _everything(scene)
