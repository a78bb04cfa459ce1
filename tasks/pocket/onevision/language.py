"""Third stage: teach pocket-llava's decoder crops, clips and pairs of images.

The tower is frozen here, so its features are computed once, for a pool of images and one of clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, SiglipVisionModel

from pruneval.tasks.pocket import clips, optim, world
from pruneval.tasks.pocket.clips import Clip
from pruneval.tasks.pocket.onevision import build, packing
from pruneval.tasks.pocket.onevision.packing import NEWLINE, VIEW, Pack, Writer
from pruneval.tasks.pocket.onevision.vision import channels_first
from pruneval.tasks.pocket.packing import ask_some
from pruneval.tasks.pocket.questions import SKILLS, ask
from pruneval.tasks.pocket.world import Scene

NEAR = 32
"""Tokens that are kept where only the view of the whole is shown."""

Log = Callable[[dict[str, Any]], None]
Model: TypeAlias = LlavaOnevisionForConditionalGeneration


@dataclass
class Pool:
    """Images or clips with the frozen features of their cells, kept as float16 (n, 320 or 512, 128)."""

    things: list[Any]
    """Scenes or clips."""
    features: Tensor


@torch.no_grad()
def pool(
    tower: SiglipVisionModel, kind: str, size: int, seed: int, split: str = "train", path: Path | None = None
) -> Pool:
    """Draw scenes ("image") or clips ("clip") and look at them; features are kept in the file ``path`` if given."""
    things: list[Any] = []
    found = []
    saved = torch.load(path, weights_only=True) if path and path.exists() else None
    for first in range(0, size, 32):
        rng = np.random.default_rng([seed, 2, first])
        drawn: list[Any] = [
            (world if kind == "image" else clips).draw(rng, split) for _ in range(min(32, size - first))
        ]
        things += drawn
        if saved is None:
            found.append(look(tower, drawn).half())
    features = torch.cat(found) if saved is None else saved["features"]
    if path and saved is None:
        optim.save(path, features=features)
    return Pool(things, features)


@torch.no_grad()
def look(tower: SiglipVisionModel, things: Sequence[Scene] | Sequence[Clip]) -> Tensor:
    """Features (n, 320 or 512, 128) of the cells of scenes or clips."""
    views = shown(things)
    states = tower(views.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
    return states.unflatten(0, views.shape[:2]).flatten(1, 2)


def shown(things: Sequence[Scene] | Sequence[Clip]) -> Tensor:
    """What the tower is shown of scenes or clips: (n, 5 or 8, 3, 64, 64)."""
    if isinstance(things[0], Scene):
        return build.views(channels_first(np.stack([world.render(s) for s in things])))  # type: ignore[arg-type]
    shots = np.concatenate([clips.render_clip(c) for c in things])  # type: ignore[arg-type]
    return build.frames(channels_first(shots)).unflatten(0, (len(things), -1))


def hidden(model: Model, pack: Pack, features: Tensor) -> Tensor:
    """Decoder states (n, length, width) of a pack over features of cells (n, cells, 128)."""
    k, pooled = pack.cells.shape[1:]
    newline = pack.cells[..., 0] == NEWLINE
    at = pack.cells.clamp(min=0).flatten(1)[..., None].expand(-1, -1, features.shape[-1])
    seen = model.model.multi_modal_projector(features.gather(1, at)).unflatten(1, (k, pooled)).mean(2)
    seen = torch.where(newline[..., None], model.model.image_newline, seen)
    decoder = model.model.language_model
    visual = (pack.ids == model.config.image_token_id) | (pack.ids == model.config.video_token_id)
    embeds = decoder.embed_tokens(pack.ids).masked_scatter(visual[..., None], seen)
    out = decoder(
        inputs_embeds=embeds, attention_mask={"full_attention": pack.mask}, position_ids=pack.positions, use_cache=False
    )
    return out.last_hidden_state


def answered(model: Model, pack: Pack, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of what the loss counts, what is right there, and (row, block) of each."""
    row, col = pack.counted.nonzero(as_tuple=True)
    logits = model.lm_head(hidden(model, pack, features)[row, col - 1])
    return logits, pack.ids[row, col], torch.stack([row, pack.block[row, col]], 1)


@torch.no_grad()
def answers_right(model: Model, writer: Writer, images: Pool, films: Pool, seed: int) -> dict[str, float]:
    """Accuracy per skill over all tokens: every answer token, and the end, must be the likeliest."""
    model.eval()
    right: dict[str, list[float]] = {}
    for kind, data in (("image", images), ("clip", films)):
        for first in range(0, len(data.things), 32):
            rng = np.random.default_rng([seed, 4, first])
            part = data.things[first : first + 32]
            maker, skills = (ask, SKILLS) if kind == "image" else (clips.ask, clips.SKILLS)
            asked = [[q for skill in skills if (q := maker(thing, rng, skill))] for thing in part]
            rows = [[writer.question(q) for q in row] for row in asked]
            every = np.tile(np.arange(len(writer.cells[kind])), (len(part), 1))
            pack = writer.sequences(kind, rows, every, None)
            logits, ids, where = answered(model, pack, data.features[first : first + 32].float())
            good = logits.argmax(-1) == ids
            for r, questions in enumerate(asked):
                for b, question in enumerate(questions, 1):
                    name = question.skill if kind == "image" or question.skill != "count" else "video count"
                    fit = (where == torch.tensor([r, b])).all(-1)
                    right.setdefault(name, []).append(float(good[fit].all()))
    model.train()
    return {skill: float(np.mean(x)) for skill, x in right.items()}


@dataclass(frozen=True)
class Course:
    """How a part of the decoder's training asks, and how much of the images it shows."""

    name: str
    steps: int
    images: int
    films: int
    """Per step; none: no pairs of images either."""
    pairs: int
    muon: float
    adam: float
    cooldown: float
    weights: dict[str, float]
    whole: float = 0.15
    """Share of the steps that show all tokens of the images; of the others, one half keeps 128 and one half 64."""
    bare: float = 0.3
    """Share of the steps with 64 tokens in which even the background among them is hidden; for clips, of all steps."""
    partial: float = 0.3
    """Share of the thinned steps that keep some tokens of a thing instead of all."""
    ending: float = 0.92
    """Part of the steps after which all images are whole."""
    near: float = 0.0
    """Share of the thinned steps that keep ``NEAR`` tokens of the view of the whole and no crops."""
    films_whole: float = 0.6
    """Share of the steps that show all tokens of the clips."""
    projector: bool = True
    """Whether the projector learns, too."""
    film_mix: dict[str, float] = field(default_factory=lambda: dict.fromkeys(clips.SKILLS, 1.0))
    """Proportions of the questions about clips; "where" is asked in training only."""


Batch = list[tuple[Pack, Tensor, float]]
"""Packs with their features and their weight in the loss."""


def batch(writer: Writer, images: Pool, films: Pool, step: int, course: Course, seed: int) -> Batch:
    """One step's rows: images, clips and pairs of images."""
    rng = np.random.default_rng([seed, 5, step])
    part = step / course.steps
    caption = int(part < 0.5 or rng.random() < 0.3)
    made: Batch = []

    def add(
        kind: str, chosen: np.ndarray, rows: list, held: list, size: int, partial: bool, bare: bool, w: float,
        total: int | None = None,
    ) -> None:  # fmt: skip
        total = total or len(writer.cells[kind])
        data = films if kind == "clip" else images
        kept = np.stack(
            [np.arange(total) if size >= total else packing.thin(h, total, rng, size, partial) for h in held]
        )
        unseen = np.stack([~np.isin(k, np.concatenate(h)) for k, h in zip(kept, held, strict=True)]) if bare else None
        features = data.features[chosen.ravel()].float()
        if kind == "two":
            features = features[:, :VIEW].unflatten(0, (-1, 2)).flatten(1, 2)
        made.append((writer.sequences(kind, rows, kept, unseen), features, w))

    whole = part > course.ending or rng.random() < course.whole
    near = course.near > 0 and not whole and rng.random() < course.near
    size = 336 if whole else NEAR if near else (128, 64)[int(rng.integers(2))]
    chosen = rng.integers(len(images.things), size=course.images)
    scenes = [images.things[i] for i in chosen]
    rows = [
        [writer.caption(s, rng) for _ in range(caption)]
        + [writer.question(q) for q in ask_some(s, rng, 10 - caption, course.weights)]
        for s in scenes
    ]
    held = [packing.image_tokens(s) for s in scenes]
    if near:
        held = [[one[one < VIEW] for one in each] for each in held]
    bare = size == 64 and rng.random() < course.bare
    partial = not bare and rng.random() < course.partial
    add("image", chosen, rows, held, size, partial, bare, 0.4, VIEW if near else None)

    if not course.films:
        return made
    chosen = rng.integers(len(films.things), size=course.films)
    shown = [films.things[i] for i in chosen]
    rows = [
        [packing.clip_caption(writer, c) for _ in range(caption)]
        + packing.clip_blocks(writer, c, rng, 9 - caption, course.film_mix)
        for c in shown
    ]
    size = 129 if part > course.ending or rng.random() < course.films_whole else 64
    bare = part <= course.ending and rng.random() < course.bare
    held = [packing.clip_tokens(c) for c in shown]
    add("clip", chosen, rows, held, size, size < 129 and not bare and rng.random() < course.partial, bare, 0.52)

    chosen = rng.integers(len(images.things), size=(course.pairs, 2))
    rows, held = [], []
    for one, two in chosen.tolist():
        scenes = [images.things[one], images.things[two]]
        asked = [q for _ in range(9) if (q := packing.ask_two((scenes[0], scenes[1]), rng))]
        rows.append([writer.question(q) for q in asked])
        held.append(packing.two_tokens(scenes[0], scenes[1]))
    add("two", chosen, rows, held, 130, False, False, 0.08)
    return made


def teach(
    model: Model, writer: Writer, pools: tuple[Pool, Pool], tests: tuple[Pool, Pool], work: Path, course: Course,
    seed: int, log: Log,
) -> None:  # fmt: skip
    """Train projector and decoder, or go on from the course's checkpoint in ``work``."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(course.projector)
    optimisers = optim.Optimisers(
        model, "language_model.layers", course.steps, muon=course.muon, adam=course.adam, cooldown=course.cooldown
    )
    path, first = work / f"{course.name}.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimisers.load(saved["optimisers"])
        first = saved["step"]
    model.train()
    start, recent = time.time(), []
    steps = optim.ahead(lambda s: batch(writer, *pools, s, course, seed), first, course.steps)
    for step, packs in enumerate(steps, first):
        losses = []
        for pack, features, weight in packs:
            logits, ids, _ = answered(model, pack, features)
            loss = F.cross_entropy(logits, ids)
            (weight * loss).backward()
            losses.append(loss.item())
        optimisers.step(step)
        recent.append(losses)
        last = step + 1 == course.steps
        if step == 0 or (step + 1) % 50 == 0 or last:
            means = np.mean(recent[-50:], axis=0).tolist()
            parts = dict(zip(("loss", "video loss", "pair loss")[: len(means)], means, strict=True))
            seen = answers_right(model, writer, *tests, seed)
            log({"stage": course.name, "step": step + 1, "seconds": round(time.time() - start), **parts, **seen})
        if (step + 1) % 25 == 0 or last:
            optim.save(path, model=model.state_dict(), optimisers=optimisers.state(), step=step + 1)
