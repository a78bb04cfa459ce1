"""What the makers of pocket editions share: streams of randomness, scenes that allow a question, people who answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pruneval.tasks.pocket.questions import SKILLS, Question, ask, choose
from pruneval.tasks.pocket.world import Scene, draw

Row = dict[str, Any]
Tables = dict[str, list[Row]]
LETTERS = "ABCDE"


def stream(seed: int, edition: str, index: int) -> np.random.Generator:
    """A stream of its own for every item, so that an item does not change when the number of items does."""
    return np.random.default_rng([seed, *edition.encode(), index])


def until(rng: np.random.Generator, index: int, question: Callable[[Scene, np.random.Generator], Any]) -> tuple:
    """Draw scenes, of the test and held-out splits in turn, until one allows the question."""
    while True:
        scene = draw(rng, ("test", "heldout")[index % 2])
        asked = question(scene, rng)
        if asked is not None:
            return scene, asked


def asked_about(rng: np.random.Generator, index: int, skill: str) -> tuple[Scene, Question]:
    """A scene and a question of the skill about it."""
    return until(rng, index, lambda scene, stream: ask(scene, stream, skill))


def choice(rng: np.random.Generator, index: int, skills: tuple[str, ...] = SKILLS) -> tuple[Scene, Question]:
    """A scene and a question with four choices, the skills in turn; a skill needs four possible answers."""
    scene, question = asked_about(rng, index, skills[index % len(skills)])
    return scene, choose(question, rng, 4)


def people(rng: np.random.Generator, question: Question, dissent: int) -> list[str]:
    """Ten people's answers, in any order; `dissent` of them give another answer that the question can have."""
    wrong = [option for option in question.options if option != question.answer]
    given = [question.answer] * (10 - dissent) + [str(rng.choice(wrong)) for _ in range(dissent)]
    return [given[i] for i in rng.permutation(10)]
