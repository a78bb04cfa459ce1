"""What each edition of images asks, drawn for training: a prompt in lmms-eval's words and the answer it scores.

A form is made from a scene of the "train" split (``PLAIN``: name, share and maker) or brings pictures of its own
(``ALBUMS``). A maker returns None where the scene does not allow its question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pruneval.tasks.pocket import benches_choice, benches_judged, benches_open, image_prompts, prompts
from pruneval.tasks.pocket.charts import draw_chart, render_chart
from pruneval.tasks.pocket.questions import HINTS, PAIR_CATEGORIES, Question, ask, choose, pair
from pruneval.tasks.pocket.world import SIZE, Scene, draw, render

Asked = tuple[str, str]
"""A prompt and its answer."""
Maker = Callable[[Scene, np.random.Generator], Asked | None]

SHORT_MIX = {"shape": 1.0, "colour": 1.0, "existence": 3.0, "position": 1.5, "count": 3.0, "digit": 1.0}
"""Skills of open questions; the forms that share MME's request."""


def _skill(rng: np.random.Generator, skills: tuple[str, ...]) -> str:
    return skills[int(rng.integers(len(skills)))]


def _open(scene: Scene, rng: np.random.Generator, skills: tuple[str, ...]) -> Question | None:
    return ask(scene, rng, _skill(rng, skills))


def _four(scene: Scene, rng: np.random.Generator, skills: tuple[str, ...] = benches_choice.FOUR) -> Question | None:
    question = _open(scene, rng, skills)
    return choose(question, rng, 4) if question else None


def short(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """GQA, POPE, TextVQA, DocVQA and VQAv2."""
    shares = np.asarray(list(SHORT_MIX.values()))
    question = ask(scene, rng, str(rng.choice(list(SHORT_MIX), p=shares / shares.sum())))
    return (prompts.gqa(question), question.answer) if question else None


def mme(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """One question of a pair."""
    made = pair(scene, rng, _skill(rng, PAIR_CATEGORIES))
    if made is None:
        return None
    question = made[int(rng.integers(2))]
    return prompts.mme(question), question.answer


def scienceqa(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Two to four choices, perhaps with a hint."""
    question = _open(scene, rng, benches_choice.FOUR)
    if question is None:
        return None
    question = choose(question, rng)
    return prompts.scienceqa(question), question.answer


def textvqa_ocr(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """A number to be read, given all numbers of the picture."""
    question = ask(scene, rng, "digit")
    read = [thing.kind for thing in scene.things if thing.is_digit]
    return (image_prompts.textvqa_ocr(question, read), question.answer) if question else None


def mmbench_en(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Three or four choices, in any rotation, a third with a hint."""
    question = _four(scene, rng)
    if question is None:
        return None
    question = _fewer(question, rng)
    return image_prompts.mmbench_en(question, HINTS[2] if rng.random() < 1 / 3 else ""), question.answer


def mmbench_cn(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """The same in Chinese."""
    question = benches_choice.chinese(scene, rng)
    if question is None:
        return None
    question = _fewer(question, rng)
    return image_prompts.mmbench_cn(question), question.answer


def _fewer(question: Question, rng: np.random.Generator) -> Question:
    choices = benches_choice.shortened(question, int(rng.integers(2)))
    right = question.choices[question.letter_index]
    return replace(question, choices=choices, answer=image_prompts.LETTERS[choices.index(right)])


def choice(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """AI2D and SEED-Bench."""
    question = _four(scene, rng)
    return (image_prompts.choice(question), question.answer) if question else None


def mmmu(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Choices, and one in five open."""
    question = _open(scene, rng, ("digit", "count", "colour")) if rng.random() < 0.2 else _four(scene, rng)
    return (image_prompts.mmmu(question), question.answer) if question else None


def mmstar(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Options in one line."""
    question = _four(scene, rng)
    return (image_prompts.mmstar(question), question.answer) if question else None


def realworldqa(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Choices, and one in three open."""
    free = rng.random() < 1 / 3
    question = _open(scene, rng, ("count", "existence", "digit")) if free else _four(scene, rng)
    return (image_prompts.realworldqa(question), question.answer) if question else None


def hallusionbench(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Whether a thing has a colour, its own or another."""
    made = benches_judged.recoloured(scene, rng)
    if made is None:
        return None
    truth = int(rng.integers(2))
    return made[1][1 - truth][0], "yes" if truth else "no"


def vizwiz(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Colours, shapes and counts; one in three questions is about nothing in the picture."""
    free = rng.random() < 1 / 3
    question = benches_open.absent(scene, rng) if free else _open(scene, rng, ("colour", "shape", "count"))
    return (image_prompts.vizwiz(question), question.answer) if question else None


def mathvista(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """All of MathVista's forms; a letter or a value is the whole answer. A list's brackets are no words."""
    form = _skill(rng, benches_judged.FORMS)
    question: Question | None
    if form == "integer":
        question = ask(scene, rng, "count")
    elif form == "choice":
        question = _four(scene, rng, ("shape", "colour", "position"))
    else:
        question = benches_judged.calculation(scene, form)
    return (image_prompts.mathvista(question, form), question.answer) if question else None


def mmvet(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """A place, or a colour and a place."""
    made = benches_judged.vet(int(rng.integers(2)))(scene, rng)
    if made is None:
        return None
    return image_prompts.mmvet(made[0]), made[1].split("<OR>")[0].replace("<AND>", ", ")


def llava_bench(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """Whole sentences."""
    question = ask(scene, rng, "colour")
    category = _skill(rng, benches_judged.CATEGORIES)
    return benches_judged.conversation(scene, question, category) if question else None


PLAIN: dict[str, tuple[float, Maker]] = {
    "short": (3.0, short), "mme": (2.5, mme), "scienceqa": (2.0, scienceqa), "textvqa_ocr": (1.0, textvqa_ocr),
    "mmbench_en": (1.5, mmbench_en), "mmbench_cn": (1.5, mmbench_cn), "choice": (1.5, choice), "mmmu": (1.0, mmmu),
    "mmstar": (1.5, mmstar), "realworldqa": (1.5, realworldqa), "hallusionbench": (1.0, hallusionbench),
    "vizwiz": (1.2, vizwiz), "mathvista": (0.5, mathvista), "mmvet": (0.2, mmvet), "llava_bench": (0.1, llava_bench),
}  # fmt: skip
"""What is asked about a scene, with its share of the questions."""


def some(scene: Scene, rng: np.random.Generator, number: int, other: Mapping[str, float] = {}) -> list[Asked]:
    """Questions about a scene, the forms by their shares, or the ``other`` shares."""
    names = list(PLAIN)
    shares = np.asarray([other.get(name, PLAIN[name][0]) for name in names])
    found: list[Asked] = []
    while len(found) < number:
        made = PLAIN[names[int(rng.choice(len(names), p=shares / shares.sum()))]][1](scene, rng)
        if made:
            found.append(made)
    return found


@dataclass(frozen=True)
class Album:
    """Pictures (n, 96, 96, 3) that belong together, as the tower sees them, and what can be asked about them."""

    images: np.ndarray
    ask: Callable[[np.random.Generator], Asked]


def chart(rng: np.random.Generator) -> Album:
    """ChartQA. Words are whole numbers below 100: shares and means are rounded, and 99 stands for 100."""
    drawn = draw_chart(rng)

    def asked(rng: np.random.Generator) -> Asked:
        text, answer = benches_open.about_bars(drawn, rng, int(rng.integers(4)))
        if answer[0].isdigit():
            value = min(99, round(float(answer.rstrip("%"))))
            answer = f"{value}%" if answer.endswith("%") else str(value)
        return image_prompts.chartqa(text), answer

    return Album(render_chart(drawn)[None], asked)


def halves(rng: np.random.Generator) -> Album:
    """InfoVQA. The processor keeps the middle of the tall picture, so much of the evidence is not to be seen."""
    upper, lower = draw(rng), draw(rng)

    def asked(rng: np.random.Generator) -> Asked:
        text, answer = benches_open.about_halves(upper, lower, int(rng.integers(3)))
        return f"{text}{prompts.SHORT}", answer

    middle = benches_open.stacked(upper, lower)[SIZE // 2 : SIZE // 2 + SIZE]
    return Album(middle[None], asked)


def frames(rng: np.random.Generator) -> Album:
    """SEED-Bench's frames, in which things appear one after another; the choices in any order."""
    scenes, question = benches_choice.appearing(rng, "train")
    right = question.choices[question.letter_index]

    def asked(rng: np.random.Generator) -> Asked:
        choices = tuple(question.choices[i] for i in rng.permutation(len(question.choices)))
        return image_prompts.choice(replace(question, choices=choices)), image_prompts.LETTERS[choices.index(right)]

    return Album(np.stack([render(scene) for scene in scenes]), asked)


def two(rng: np.random.Generator) -> Album:
    """MMMU's questions about two images."""
    one, other = draw(rng), draw(rng)
    question = benches_choice.fuller(one, other)
    asked = image_prompts.mmmu(question), question.answer
    return Album(np.stack([render(one), render(other)]), lambda rng: asked)


ALBUMS: dict[str, Callable[[np.random.Generator], Album]] = {
    "chart": chart, "halves": halves, "frames": frames, "two": two,
}  # fmt: skip
