"""Last course of the decoder: the prompts of every edition of images, mixed with those it knows.

Each step joins two batches: questions about single scenes, and an album of one kind (charts, halves, frames, two
images), the kinds in turn. The tower stays frozen: charts are read through features that were made for shapes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from pruneval.tasks.pocket import forms, optim, vision
from pruneval.tasks.pocket.forms import ALBUMS, PLAIN, Album
from pruneval.tasks.pocket.language import Log, Pool, hidden
from pruneval.tasks.pocket.packing import Pack, Writer, held, thin
from pruneval.tasks.pocket.vision import TOKENS

TURN = ("chart", "frames", "chart", "two", "chart", "halves")
"""Which albums the steps show, in turn."""


@dataclass(frozen=True)
class Course:
    """How long, how fast and on what."""

    name: str
    steps: int
    scenes: int
    """Scenes in the pool."""
    albums: dict[str, int]
    """Albums in the pool, by kind."""
    size: int = 16
    """Scenes per step, each with ``asked`` questions."""
    asked: int = 11
    beside: int = 6
    """Albums per step, each with ``asked_beside`` questions."""
    asked_beside: int = 8
    muon: float = 1.5e-3
    adam: float = 1e-3
    cooldown: float = 0.7
    whole: float = 0.45
    """Share of the steps that show whole images; of the others, half keep 48 patches and half 24."""
    shares: dict[str, float] = field(default_factory=dict)
    """Where the forms' shares differ from their own."""
    tests: int = 128
    """Scenes that figures while training are measured on."""
    bare: float = 0.4
    """Share of the steps with 24 patches in which the background among them is hidden."""


COURSES = (
    Course("prompts", steps=450, scenes=6144, albums={"chart": 2048, "frames": 256, "two": 512, "halves": 512}),
    Course(
        "letters", steps=100, scenes=3072, albums={"chart": 768, "frames": 96, "two": 256, "halves": 256}, beside=3,
        muon=8e-4, adam=5e-4, cooldown=1.0, shares={"short": 5.0, "mmbench_en": 3.0, "choice": 3.0, "mmmu": 1.5},
    ),
)  # fmt: skip
"""The second, on fresh images, is for letters and for the short answers that the first made a little worse."""


class Albums:
    """Albums of one kind with the features of their patches, float16 (n, images * 144, 128)."""

    def __init__(self, model: LlavaForConditionalGeneration, kind: str, number: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 6, *kind.encode()])
        self.all: list[Album] = [ALBUMS[kind](rng) for _ in range(number)]
        self.images = len(self.all[0].images)
        found = []
        for first in range(0, number, 16):
            pictures = np.concatenate([album.images for album in self.all[first : first + 16]])
            with torch.no_grad():
                out = model.model.vision_tower(vision.pixels(pictures), output_hidden_states=True)
            features = out.hidden_states[vision.FEATURE][:, 1:].half()
            found.append(features.reshape(-1, self.images * TOKENS, features.shape[-1]))
        self.features = torch.cat(found)


def step_scenes(writer: Writer, pool: Pool, rng: np.random.Generator, course: Course) -> tuple[Pack, Tensor]:
    """Questions about scenes, of all forms; all images of a step keep as many patches."""
    chosen = rng.integers(len(pool.scenes), size=course.size)
    lot = rng.random()
    keep = TOKENS if lot < course.whole else 48 if lot < (1 + course.whole) / 2 else 24
    bare = keep == 24 and rng.random() < course.bare
    rows, kept = [], []
    for i in chosen.tolist():
        rows.append([writer.block(*asked) for asked in forms.some(pool.scenes[i], rng, course.asked, course.shares)])
        kept.append(thin(pool.scenes[i], rng, keep, False) if keep < TOKENS else np.arange(TOKENS))
    unseen = None
    if bare:
        unseen = np.stack([~np.isin(k, held(pool.scenes[i])) for i, k in zip(chosen.tolist(), kept, strict=True)])
    return writer.pack(rows, np.stack(kept), hidden=unseen), pool.features[chosen].float()


def step_albums(writer: Writer, albums: Albums, rng: np.random.Generator, course: Course) -> tuple[Pack, Tensor]:
    """Questions about albums of one kind, whole."""
    chosen = rng.integers(len(albums.all), size=course.beside)
    rows = [
        [writer.block(*albums.all[i].ask(rng)) for _ in range(1 if albums.images == 2 else course.asked_beside)]
        for i in chosen.tolist()
    ]
    kept = np.tile(np.arange(albums.images * TOKENS), (course.beside, 1))
    return writer.pack(rows, kept, images=albums.images), albums.features[chosen].float()


def losses(model: LlavaForConditionalGeneration, pack: Pack, features: Tensor) -> Tensor:
    """Cross-entropy of every counted token."""
    row, col = pack.counted.nonzero(as_tuple=True)
    return F.cross_entropy(
        model.lm_head(hidden(model, pack, features)[row, col - 1]), pack.ids[row, col], reduction="none"
    )


@torch.no_grad()
def right(model: LlavaForConditionalGeneration, pack: Pack, features: Tensor) -> np.ndarray:
    """Which blocks are answered exactly, in order of rows and blocks: every answer token, and the end, likeliest."""
    row, col = pack.counted.nonzero(as_tuple=True)
    said = model.lm_head(hidden(model, pack, features)[row, col - 1]).argmax(-1)
    wrong = said != pack.ids[row, col]
    key = row * 1000 + pack.block[row, col]
    return np.asarray([not bool(wrong[key == k].any()) for k in key.unique()])


def accuracy(
    model: LlavaForConditionalGeneration, writer: Writer, pool: Pool, albums: dict[str, Albums], seed: int
) -> dict[str, float]:
    """Share of right answers per form, over whole images; sentences (llava_bench) are left out."""
    model.eval()
    rng = np.random.default_rng([seed, 8])
    found: dict[str, list[float]] = {name: [] for name in PLAIN}
    for first in range(0, len(pool.scenes), 16):
        names, rows = [], []
        for i in range(first, min(first + 16, len(pool.scenes))):
            made = {name: maker(pool.scenes[i], rng) for name, (_, maker) in PLAIN.items() if name != "llava_bench"}
            names += [name for name, asked in made.items() if asked]
            rows.append([writer.block(*asked) for asked in made.values() if asked])
        kept = np.tile(np.arange(TOKENS), (len(rows), 1))
        good = right(model, writer.pack(rows, kept), pool.features[first : first + len(rows)].float())
        for name, one in zip(names, good, strict=True):
            found[name].append(one)
    del found["llava_bench"]
    for kind, shown in albums.items():
        found[kind] = []
        for first in range(0, len(shown.all), 8):
            part = shown.all[first : first + 8]
            rows = [[writer.block(*album.ask(rng)) for _ in range(2)] for album in part]
            kept = np.tile(np.arange(shown.images * TOKENS), (len(rows), 1))
            pack = writer.pack(rows, kept, images=shown.images)
            found[kind] += right(model, pack, shown.features[first : first + 8].float()).tolist()
    model.train()
    return {name: float(np.mean(values)) for name, values in found.items()}


def teach(
    model: LlavaForConditionalGeneration,
    tokens: PreTrainedTokenizerFast,
    work: Path,
    course: Course,
    seed: int,
    log: Log,
) -> None:
    """Train projector and decoder, or go on from the checkpoint in ``work``."""
    model.model.vision_tower.requires_grad_(False)
    writer, path = Writer(tokens), work / f"{course.name}.pt"
    optimisers = optim.Optimisers(
        model, "language_model.layers", course.steps, muon=course.muon, adam=course.adam, cooldown=course.cooldown
    )
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimisers.load(saved["optimisers"])
        first = saved["step"]
        if first == course.steps:
            return
    pool = Pool(model, course.scenes, seed)
    albums = {kind: Albums(model, kind, number, seed) for kind, number in course.albums.items()}
    test = Pool(model, course.tests, seed + 99, "test")
    shown = {kind: Albums(model, kind, max(1, course.tests // 5), seed + 99) for kind in course.albums}

    def batch(step: int) -> list[tuple[Pack, Tensor]]:
        rng = np.random.default_rng([seed, 7, step])
        beside = albums[TURN[step % len(TURN)]]
        return [step_scenes(writer, pool, rng, course), step_albums(writer, beside, rng, course)]

    model.train()
    start, recent = time.time(), []
    for step, parts in enumerate(optim.ahead(batch, first, course.steps), first):
        total = sum(int(pack.counted.sum()) for pack, _ in parts)
        seen = []
        for pack, features in parts:
            lost = losses(model, pack, features)
            (lost.sum() / total).backward()
            seen.append(lost.mean().item())
        optimisers.step(step)
        recent.append(seen)
        if (step + 1) % 50 == 0 or step + 1 == course.steps:
            mean, beside = np.mean(recent[-50:], axis=0).tolist()
            entry = {"stage": course.name, "step": step + 1, "seconds": round(time.time() - start)}
            log({**entry, "loss": mean, "album loss": beside, **accuracy(model, writer, test, shown, seed)})
            optim.save(path, model=model.state_dict(), optimisers=optimisers.state(), step=step + 1)
