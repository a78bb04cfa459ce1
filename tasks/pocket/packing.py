r"""Many questions about one image in one sequence.

A row is ``<s> USER : <image>...<image> \\n`` followed by blocks, each a question with its answer. A block attends to
the image part and to itself only, and its positions start right after the image: for every block this is exactly the
single-turn prompt that evaluation makes, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pruneval.tasks.pocket import build, prompts, questions
from pruneval.tasks.pocket.questions import Question
from pruneval.tasks.pocket.vision import TOKENS
from pruneval.tasks.pocket.world import Scene, patches

BEFORE = 3
"""Tokens before the image: ``<s> USER :``."""

Block = tuple[list[int], list[bool]]
"""Token ids of a prompt and its answer, and which of them the loss counts."""


@dataclass(frozen=True)
class Pack:
    """A batch of rows; ``kept`` (n, k) are the patches kept, ``ids``, ``positions`` (n, length) include them."""

    ids: Tensor
    kept: Tensor
    positions: Tensor
    mask: Tensor
    """Which key each query sees: (n, 1, length, length), true where it does."""
    counted: Tensor
    """Which tokens the loss counts: (n, length)."""
    block: Tensor
    """Number of the block, 0 for the image part and -1 for padding: (n, length)."""


class Writer:
    """Writes questions and captions as blocks of token ids."""

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=200_000)(
            lambda text: tokens.encode(text, add_special_tokens=False)
        )
        self.image = int(tokens.convert_tokens_to_ids("<image>"))
        self.pad, self.end, self.start = tokens.pad_token_id, tokens.eos_token_id, tokens.bos_token_id

    def question(self, question: Question) -> Block:
        prompt = prompts.scienceqa(question) if question.choices else prompts.gqa(question)
        return self.block(prompt, question.answer)

    def block(self, prompt: str, answer: str) -> Block:
        """Any prompt and its answer, which the loss counts."""
        asked, answered = self.encode(f"{prompt} ASSISTANT:"), [*self.encode(answer), self.end]
        return asked + answered, [False] * len(asked) + [True] * len(answered)

    def caption(self, scene: Scene, rng: np.random.Generator) -> Block:
        """All things in random order; the first attribute names a thing, the loss counts the others."""
        first = ("kind", "colour", "place")[int(rng.integers(3))]
        ids = list(self.encode(f"{build.CAPTIONS[first]} ASSISTANT:"))
        counted = [False] * len(ids)
        looks = [{"kind": t.kind, "colour": t.colour, "place": t.quadrant} for t in scene.things]
        for i in rng.permutation(len(looks)).tolist():
            if looks[i][first] is None or sum(x[first] == looks[i][first] for x in looks) > 1:
                continue
            for name in (first, *(n for n in ("colour", "kind", "place") if n != first)):
                if looks[i][name] is not None:
                    piece = self.encode(str(looks[i][name]))
                    ids, counted = ids + piece, counted + [name != first] * len(piece)
        return [*ids, self.end], [*counted, False]

    def pack(
        self, rows: Sequence[Sequence[Block]], kept: np.ndarray, original: bool = True,
        hidden: np.ndarray | None = None, images: int = 1,
    ) -> Pack:  # fmt: skip
        """Join the blocks of each row behind its image.

        ``kept`` (n, k) are the patches kept and ``original`` lets them keep their positions; of them, those marked in
        ``hidden`` (n, k) are there but seen by no other token. With several ``images`` a row, ``kept`` numbers their
        patches on and on, as many of each.
        """
        n, k = kept.shape
        each = k // images
        head = [self.start, *self.encode("USER:"), *([self.image] * each + self.encode("\n")) * images]
        stride = (TOKENS if original else each) + 1
        after = BEFORE + images * stride
        slots = BEFORE + np.arange(k) + np.arange(k) // each
        length = len(head) + max(sum(len(b[0]) for b in row) for row in rows)
        ids, block = np.full((n, length), self.pad), np.full((n, length), -1)
        positions, counted = np.zeros((n, length), np.int64), np.zeros((n, length), bool)
        for r, row in enumerate(rows):
            at = len(head)
            ids[r, :at], block[r, :at] = head, 0
            if hidden is not None:
                block[r, slots[hidden[r]]] = -1
            positions[r, :BEFORE] = range(BEFORE)
            positions[r, slots] = BEFORE + kept[r] + kept[r] // TOKENS if original else slots
            positions[r, BEFORE + each : at : each + 1] = BEFORE + stride * np.arange(1, images + 1) - 1
            for number, (piece, counts) in enumerate(row, 1):
                part = slice(at, at + len(piece))
                ids[r, part], counted[r, part], block[r, part] = piece, counts, number
                positions[r, part] = np.arange(after, after + len(piece))
                at += len(piece)
        place = torch.from_numpy(block)
        same = (place[:, :, None] == place[:, None, :]) | (place[:, None, :] == 0)
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        return Pack(
            torch.from_numpy(ids), torch.from_numpy(kept), torch.from_numpy(positions), mask,
            torch.from_numpy(counted), place,
        )  # fmt: skip


def ask_some(scene: Scene, rng: np.random.Generator, number: int, mix: dict[str, float]) -> list[Question]:
    """Questions about a scene, skills in the proportions of ``mix`` ("pair": an MME category, "choice": letters)."""
    names = list(mix)
    weights = np.asarray(list(mix.values()))
    found: list[Question] = []
    while len(found) < number:
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        question: Question | None
        if kind == "pair":
            made = questions.pair(scene, rng, str(rng.choice(questions.PAIR_CATEGORIES)))
            question = made[int(rng.integers(2))] if made else None
        elif kind == "choice":
            skill = ("shape", "colour", "position", "count", "digit")[int(rng.integers(5))]
            question = questions.ask(scene, rng, skill)
            question = questions.choose(question, rng) if question else None
        else:
            question = questions.ask(scene, rng, kind)
        if question:
            found.append(question)
    return found


def held(scene: Scene, things: Sequence[int] | None = None) -> list[int]:
    """Patches that hold the given things (all by default), in order."""
    chosen = range(len(scene.things)) if things is None else things
    return sorted({p for i in chosen for p in patches(scene.things[i])})


def thin(scene: Scene, rng: np.random.Generator, size: int, partial: bool) -> np.ndarray:
    """Keep ``size`` patches: those that hold things (``partial``: a few of each thing's only) and random others."""
    keep: set[int] = set()
    for thing in scene.things:
        own = rng.permutation(np.asarray(patches(thing)))
        keep.update(own[: int(rng.integers(1, 5)) if partial else 4].tolist())
    blocked = set(held(scene))
    free = rng.permutation([p for p in range(TOKENS) if p not in blocked])
    keep.update(free[: size - len(keep)].tolist())
    return np.asarray(sorted(keep))
