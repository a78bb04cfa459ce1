"""Training questions of the pocket editions: what searches calibrate on. Drawn from "train" scenes, never evaluated on.

Prompts are those lmms-eval builds for the edition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pruneval.tasks.pocket import prompts
from pruneval.tasks.pocket.benches import GQA_SKILLS, SCIENCE_SKILLS
from pruneval.tasks.pocket.questions import Question, ask, choose
from pruneval.tasks.pocket.world import draw, render

EDITIONS: dict[str, tuple[tuple[str, ...], Callable[[Question], str]]] = {
    "mme": (("existence",), prompts.mme),
    "gqa": (GQA_SKILLS, prompts.gqa),
    "pope": (("existence",), prompts.pope),
    "scienceqa": (SCIENCE_SKILLS, prompts.scienceqa),
    "textvqa": (("digit",), prompts.textvqa),
}
"""Skills asked in turn, and the prompt, by edition."""


@dataclass(frozen=True)
class Item:
    """One question: uint8 image (height, width, 3), the prompt's text, the short answer."""

    image: np.ndarray
    prompt: str
    answer: str


def items(edition: str, number: int, seed: int = 0, split: str = "train") -> list[Item]:
    """`number` questions of an edition, or of all in turn for "all"; the same for the same arguments.

    Raises:
        KeyError: no such edition.
    """
    chosen = list(EDITIONS) if edition == "all" else [edition]
    return [_item(chosen[index % len(chosen)], index // len(chosen), seed, split) for index in range(number)]


def _item(edition: str, index: int, seed: int, split: str) -> Item:
    skills, prompt = EDITIONS[edition]
    rng = np.random.default_rng([seed, *b"calibration", *edition.encode(), *split.encode(), index])
    while True:
        scene = draw(rng, split)
        question = ask(scene, rng, skills[index % len(skills)])
        if question is not None:
            break
    if edition == "scienceqa":
        question = choose(question, rng)
    return Item(render(scene), prompt(question), question.answer)
