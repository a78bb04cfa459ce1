r"""Many questions about one image, one clip or two images in one sequence, and which visual tokens hold what.

A row begins like the prompt of evaluation: ``<s> USER : <image>...<image> \\n``. Blocks follow, each a question with
its answer, which attend to that beginning and to themselves only; their positions start right after the beginning.
Visual tokens can be left out; those that stay keep their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pruneval.tasks.pocket import clips, packing, prompts, video_prompts
from pruneval.tasks.pocket.clips import FRAMES, Clip
from pruneval.tasks.pocket.onevision.build import CELLS, POOLED
from pruneval.tasks.pocket.onevision.vision import HOLDS, boxes, coverage, frame_boxes
from pruneval.tasks.pocket.packing import Block
from pruneval.tasks.pocket.questions import QUADRANTS, Question, ask, choose, phrase
from pruneval.tasks.pocket.world import SIZE, Scene

VIEW = CELLS**2
NEWLINE = -1


def _image_cells() -> np.ndarray:
    rows = np.arange(2 * CELLS)
    row, col = np.meshgrid(rows, rows, indexing="ij")
    cells = VIEW * (1 + row // CELLS * 2 + col // CELLS) + row % CELLS * CELLS + col % CELLS
    return np.concatenate([np.arange(VIEW), np.pad(cells, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()])


def _clip_cells() -> np.ndarray:
    frame, row, col = np.meshgrid(np.arange(FRAMES), np.arange(POOLED), np.arange(POOLED), indexing="ij")
    first = (frame * VIEW + 2 * row * CELLS + 2 * col).ravel()
    cells = first[:, None] + [0, 1, CELLS, CELLS + 1]
    return np.concatenate([cells, np.full((1, 4), NEWLINE)])


IMAGE = _image_cells()[:, None]
"""Of each token of an image, its cell among 5 x 64: (336, 1)."""
CLIP = _clip_cells()
"""Of each token of a clip, the cells among 8 x 64 whose mean it is: (129, 4)."""
TWO = np.concatenate([np.arange(VIEW), [NEWLINE], np.arange(VIEW, 2 * VIEW), [NEWLINE]])[:, None]
"""Of each token of two images, its cell among 2 x 64: (130, 1)."""


def image_tokens(scene: Scene) -> list[np.ndarray]:
    """The tokens that hold each thing of a scene, in the whole view and in the crops."""
    cover = np.concatenate([coverage(boxes(scene), view).reshape(-1, VIEW) for view in range(5)], axis=1)
    return _held(np.where(IMAGE[:, 0] == NEWLINE, 0, cover[:, IMAGE[:, 0]]))


def clip_tokens(clip: Clip) -> list[np.ndarray]:
    """The tokens that hold each actor of a clip, in all frames."""
    cover = np.concatenate(
        [coverage(frame_boxes(clip, frame), 0).reshape(-1, VIEW) for frame in range(clip.frames)], axis=1
    )
    return _held(np.where(CLIP[:, 0] == NEWLINE, 0, cover[:, CLIP].sum(-1)))


def two_tokens(one: Scene, two: Scene) -> list[np.ndarray]:
    """The tokens that hold each thing of two images."""
    found = []
    for start, scene in ((0, one), (VIEW + 1, two)):
        found += [start + tokens for tokens in _held(coverage(boxes(scene), 0).reshape(-1, VIEW))]
    return found


def _held(cover: np.ndarray) -> list[np.ndarray]:
    return [np.nonzero(row >= HOLDS)[0] for row in cover]


def thin(held: Sequence[np.ndarray], total: int, rng: np.random.Generator, size: int, partial: bool) -> np.ndarray:
    """Keep ``size`` of ``total`` tokens: those that hold things (``partial``: some of each thing's) and others."""
    every = np.unique(np.concatenate(held))
    if partial:
        parts = [rng.permutation(x)[: int(rng.integers(1, len(x) + 1))] for x in held if len(x)]
        kept = np.unique(np.concatenate(parts))
    else:
        kept = every
    kept = rng.permutation(kept)[:size]
    others = np.setdiff1d(np.arange(total), every)
    return np.sort(np.concatenate([kept, rng.permutation(others)[: size - len(kept)]]))


@dataclass(frozen=True)
class Pack:
    """A batch of rows of n samples; see ``packing.Pack``."""

    ids: Tensor
    cells: Tensor
    """The cells behind each kept visual token: (n, k, 1 or 4), -1 for newlines."""
    positions: Tensor
    mask: Tensor
    counted: Tensor
    block: Tensor


class Writer(packing.Writer):
    """Writes the rows of images, of clips and of pairs of images."""

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        super().__init__(tokens)
        self.video = int(tokens.convert_tokens_to_ids("<video>"))
        start, end = [self.start, *self.encode("USER:")], self.encode("\n")
        self.heads = {
            "image": np.asarray([*start, *[self.image] * len(IMAGE), *end]),
            "clip": np.asarray([*start, *[self.video] * len(CLIP), *end]),
            "two": np.asarray([*start, *[self.image] * (VIEW + 1), *end, *[self.image] * (VIEW + 1), *end]),
        }
        self.cells = {"image": IMAGE, "clip": CLIP, "two": TWO}

    def sequences(
        self, kind: str, rows: Sequence[Sequence[Block]], kept: np.ndarray, hidden: np.ndarray | None
    ) -> Pack:
        """Join the blocks of each row behind its visual part, of which it keeps some.

        Args:
            kind: "image", "clip" or "two".
            rows: n times blocks.
            kept: (n, k) visual tokens that are there, in order.
            hidden: (n, k) which of them no other token sees; None for none.
        """
        head = self.heads[kind]
        visual = np.nonzero((head == self.image) | (head == self.video))[0]
        n, before, after = len(rows), len(head) - len(visual) + kept.shape[1], len(head)
        length = before + max(sum(len(b[0]) for b in row) for row in rows)
        ids, block = np.full((n, length), self.pad), np.full((n, length), -1)
        positions, counted = np.zeros((n, length), np.int64), np.zeros((n, length), bool)
        for r, row in enumerate(rows):
            there = np.ones(len(head), bool)
            there[visual] = False
            there[visual[kept[r]]] = True
            ids[r, :before], positions[r, :before], block[r, :before] = head[there], np.nonzero(there)[0], 0
            if hidden is not None:
                block[r, np.nonzero(np.isin(positions[r, :before], visual[kept[r][hidden[r]]]))[0]] = -1
            at = before
            for number, (piece, counts) in enumerate(row, 1):
                part = slice(at, at + len(piece))
                ids[r, part], counted[r, part], block[r, part] = piece, counts, number
                positions[r, part] = np.arange(after, after + len(piece))
                at += len(piece)
        place = torch.from_numpy(block)
        same = (place[:, :, None] == place[:, None, :]) | (place[:, None, :] == 0)
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        return Pack(
            torch.from_numpy(ids), torch.from_numpy(self.cells[kind][kept]), torch.from_numpy(positions), mask,
            torch.from_numpy(counted), place,
        )  # fmt: skip


def clip_blocks(
    writer: Writer, clip: Clip, rng: np.random.Generator, number: int, mix: dict[str, float]
) -> list[Block]:
    """Questions about a clip, skills in the proportions of ``mix`` ("where": a place at the start or the end)."""
    names, weights = list(mix), np.asarray(list(mix.values()))
    found: list[Block] = []
    while len(found) < number:
        skill = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        question = where(clip, rng) if skill == "where" else clips.ask(clip, rng, skill)
        if question is None:
            continue
        if rng.random() < (0.8 if question.answer in ("yes", "no") else 0.65):
            found.append(writer.block(prompts.gqa(question), question.answer))
            continue
        prompt = (video_prompts.mvbench, video_prompts.videomme)[int(rng.integers(2))]
        number = 4 if prompt is video_prompts.videomme else int(rng.integers(2, 5))
        question = choose(question, rng, number)
        found.append(writer.block(prompt(question), question.answer))
    return found


def where(clip: Clip, rng: np.random.Generator) -> Question | None:
    """In which quarter a thing is at the start or the end of a clip: asked in training only, for directions' sake."""
    i = int(rng.integers(len(clip.actors)))
    actor, frame = clip.actors[i], (0, -1)[int(rng.integers(2))]
    spot = actor.path[frame]
    if spot is None:
        return None
    off = [at + side / 2 - SIZE / 2 for at, side in zip(spot, (actor.size, actor.width), strict=True)]
    if min(abs(x) for x in off) < actor.size / 2:
        return None
    words = phrase(actor.kind, actor.colour if rng.random() < 0.5 else None)
    text = f"Where is the {words} at the {'start' if frame == 0 else 'end'} of the video?"
    answer = f"{'top' if off[0] < 0 else 'bottom'} {'left' if off[1] < 0 else 'right'}"
    return Question("where", text, answer, (i,), QUADRANTS)


def clip_caption(writer: Writer, clip: Clip) -> Block:
    """What happens, in order: all actors, each with its colour, and where the moving one goes."""
    ids = list(writer.encode("Describe the video. ASSISTANT:"))
    counted = [False] * len(ids)
    for actor in sorted(clip.actors, key=lambda a: (a.start, a.direction is None)):
        piece = writer.encode(" ".join([actor.kind, actor.colour, *([actor.direction] if actor.direction else [])]))
        ids, counted = ids + piece, counted + [clip.event == "appear" or actor.direction is not None] * len(piece)
    return [*ids, writer.end], [*counted, clip.event == "appear"]


def ask_two(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Question | None:
    """A question about two images: which of them shows something, or what the first or second one shows."""
    turn = int(rng.integers(2))
    scene, other = scenes[turn], scenes[1 - turn]
    if rng.random() < 0.5:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        if any((t.kind, t.colour) == (thing.kind, thing.colour) for t in other.things):
            return None
        text = f"Which image shows a {phrase(thing.kind, thing.colour)}?"
        return Question("which", text, ("first", "second")[turn], (), ("first", "second"))
    question = ask(scene, rng, ("colour", "count", "existence")[int(rng.integers(3))])
    if question is None:
        return None
    words = question.text.removesuffix("?").removesuffix(" in the image")
    return replace(question, skill="which", text=f"{words} in the {('first', 'second')[turn]} image?")
