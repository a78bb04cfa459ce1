"""Second and third stage: align the projector with the words, then teach the decoder to answer.

The vision tower is frozen here, so its features are computed once for a pool of images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from pruneval.tasks.pocket import optim, vision
from pruneval.tasks.pocket.packing import Pack, Writer, ask_some, held, thin
from pruneval.tasks.pocket.questions import SKILLS, ask
from pruneval.tasks.pocket.vision import TOKENS
from pruneval.tasks.pocket.world import COLOURS, KINDS, Scene, draw, patches, render

Log = Callable[[dict[str, Any]], None]


class Pool:
    """Scenes with the frozen features of their patches, kept as float16 (n, 144, 128)."""

    def __init__(self, model: LlavaForConditionalGeneration, size: int, seed: int, split: str = "train") -> None:
        self.scenes: list[Scene] = []
        found = []
        for first in range(0, size, 64):
            rng = np.random.default_rng([seed, 2, first])
            scenes = [draw(rng, split) for _ in range(min(64, size - first))]
            with torch.no_grad():
                images = vision.pixels(np.stack([render(s) for s in scenes]))
                out = model.model.vision_tower(images, output_hidden_states=True)
            found.append(out.hidden_states[vision.FEATURE][:, 1:].half())
            self.scenes += scenes
        self.features = torch.cat(found)


def align(
    model: LlavaForConditionalGeneration, tokens: PreTrainedTokenizerFast, pool: Pool, steps: int, seed: int, log: Log
) -> None:
    """Make each projected patch point at the words for its kind, its colour and its place (and "nothing" at none)."""
    table = model.model.language_model.embed_tokens.weight
    projector = model.model.multi_modal_projector
    names = {
        "kind": [*KINDS, "nothing"], "colour": list(COLOURS), "row": ["top", "middle", "bottom"],
        "col": ["left", "center", "right"],
    }  # fmt: skip
    ids = {key: torch.tensor(tokens.convert_tokens_to_ids(x)) for key, x in names.items()}
    optimiser = torch.optim.AdamW([*projector.parameters(), table], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rng = np.random.default_rng([seed, 3, step])
        rows, at, goals = [], [], []
        for i in rng.integers(len(pool.scenes), size=64).tolist():
            for thing in pool.scenes[i].things:
                line = 1 if thing.vertical is None else (0 if thing.vertical == "top" else 2)
                side = 1 if thing.horizontal is None else (0 if thing.horizontal == "left" else 2)
                for p in patches(thing):
                    rows.append(i)
                    at.append(p)
                    goals.append([KINDS.index(thing.kind), COLOURS.index(thing.colour), line, side])
            empty = set(range(TOKENS)) - set(held(pool.scenes[i]))
            for p in rng.choice(sorted(empty), 3, replace=False).tolist():
                rows.append(i)
                at.append(p)
                goals.append([len(KINDS), -1, -1, -1])
        out = projector(pool.features[rows, at].float())
        goal = torch.tensor(goals)
        unit = F.normalize(out, dim=-1)
        losses = {
            key: F.cross_entropy(unit @ F.normalize(table[ids[key]], dim=-1).T / 0.07, goal[:, j], ignore_index=-1)
            for j, key in enumerate(names)
        }
        size = table.detach().norm(dim=-1).mean()
        loss = sum(losses.values()) + 0.1 * (out.norm(dim=-1) / size - 1).pow(2).mean()
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 0.02 + (steps - step) / (0.5 * steps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*projector.parameters(), table], 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log({"stage": "align", "step": step + 1, **{k: v.item() for k, v in losses.items()}})


def hidden(model: LlavaForConditionalGeneration, pack: Pack, features: Tensor) -> Tensor:
    """Decoder states (n, length, width) of a pack over patch features (n, 144, 128), of which it keeps some."""
    decoder = model.model.language_model
    chosen = features.gather(1, pack.kept[..., None].expand(-1, -1, features.shape[-1]))
    embeds = decoder.embed_tokens(pack.ids)
    image = pack.ids == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], model.model.multi_modal_projector(chosen))
    out = decoder(inputs_embeds=embeds, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False)
    return out.last_hidden_state


def answers_right(
    model: LlavaForConditionalGeneration, writer: Writer, pool: Pool, number: int, seed: int
) -> dict[str, float]:
    """Accuracy per skill over all patches: every answer token, and the end, must be the likeliest."""
    model.eval()
    right: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    for first in range(0, number, 32):
        rng = np.random.default_rng([seed, 4, first])
        rows = range(first, min(first + 32, number))
        asked = [[q for skill in SKILLS if (q := ask(pool.scenes[i], rng, skill))] for i in rows]
        kept = np.tile(np.arange(TOKENS), (len(asked), 1))
        pack = writer.pack([[writer.question(q) for q in row] for row in asked], kept)
        with torch.no_grad():
            states = hidden(model, pack, pool.features[list(rows)].float())
            row, col = pack.counted.nonzero(as_tuple=True)
            said = model.lm_head(states[row, col - 1]).argmax(-1)
        good = said == pack.ids[row, col]
        block = pack.block[row, col]
        for r, questions in enumerate(asked):
            for b, question in enumerate(questions, 1):
                right[question.skill].append(float(good[(row == r) & (block == b)].all()))
    model.train()
    return {skill: float(np.mean(x)) for skill, x in right.items()}


@dataclass(frozen=True)
class Course:
    """How a part of the decoder's training asks, and how much of the images it shows."""

    name: str
    steps: int
    size: int
    """Images per step; each gets eleven questions and captions."""
    muon: float
    adam: float
    cooldown: float
    weights: dict[str, float]
    captions: tuple[int, int]
    """Captions per image, in the first 35 % of the steps and after."""
    whole: float
    """Share of the steps that show whole images, before the ``ending``."""
    thin: float
    """Share of the steps, ``whole`` included, that keep 48 patches or more; the others keep 24."""
    partial: float
    """Share of the thinned steps that keep some patches of a thing instead of all."""
    original: float
    """Share of the thinned steps in which every token keeps its position."""
    bare: float = 0.0
    """Share of the steps with 24 patches in which even the background among them is hidden."""
    ending: float = 0.88
    """Part of the steps after which all images are whole."""


def batch(writer: Writer, pool: Pool, step: int, course: Course, seed: int) -> tuple[Pack, Tensor]:
    """One step's rows: many thinned images first, whole images only in the last part."""
    rng = np.random.default_rng([seed, 5, step])
    chosen = rng.integers(len(pool.scenes), size=course.size)
    part, lot = step / course.steps, rng.random()
    keep = TOKENS if part > course.ending or lot < course.whole else (48 if lot < course.thin else 24)
    partial = keep < TOKENS and rng.random() < course.partial
    original = keep == TOKENS or rng.random() < course.original
    bare = keep == 24 and course.bare > 0 and rng.random() < course.bare
    captions = course.captions[0] if part < 0.35 else course.captions[1]
    rows, kept = [], []
    for i in chosen.tolist():
        scene = pool.scenes[i]
        blocks = [writer.caption(scene, rng) for _ in range(captions)]
        asked = ask_some(scene, rng, 11 - captions, course.weights)
        rows.append(blocks + [writer.question(q) for q in asked])
        kept.append(thin(scene, rng, keep, partial) if keep < TOKENS else np.arange(TOKENS))
    hidden = None
    if bare:
        hidden = np.stack([~np.isin(k, held(pool.scenes[i])) for i, k in zip(chosen.tolist(), kept, strict=True)])
    return writer.pack(rows, np.stack(kept), original, hidden), pool.features[chosen].float()


def teach(
    model: LlavaForConditionalGeneration, tokens: PreTrainedTokenizerFast, pool: Pool, test: Pool, work: Path,
    course: Course, seed: int, log: Log,
) -> None:  # fmt: skip
    """Train projector and decoder, or go on from the course's checkpoint in ``work``."""
    writer, steps = Writer(tokens), course.steps
    model.model.vision_tower.requires_grad_(False)
    optimisers = optim.Optimisers(
        model, "language_model.layers", steps, muon=course.muon, adam=course.adam, cooldown=course.cooldown
    )
    path, first = work / f"{course.name}.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimisers.load(saved["optimisers"])
        first = saved["step"]
    model.train()
    start, recent = time.time(), []
    for step, (pack, features) in enumerate(
        optim.ahead(lambda s: batch(writer, pool, s, course, seed), first, steps), first
    ):
        row, col = pack.counted.nonzero(as_tuple=True)
        logits = model.lm_head(hidden(model, pack, features)[row, col - 1])
        loss = F.cross_entropy(logits, pack.ids[row, col])
        loss.backward()
        optimisers.step(step)
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seen = answers_right(model, writer, test, 192, seed)
            mean = float(np.mean(recent[-50:]))
            log({"stage": course.name, "step": step + 1, "seconds": round(time.time() - start), "loss": mean, **seen})
        if (step + 1) % 100 == 0 or step + 1 == steps:
            optim.save(path, model=model.state_dict(), optimisers=optimisers.state(), step=step + 1)
