"""How well pocket-onevision answers, and what dropping visual tokens does to it.

An answer counts as right when each of its tokens, and the end, is the likeliest after the ones before it: that is when
greedy generation gives it, word for word. Dropped tokens are left out before the decoder; the others keep their
positions. All questions about an image or a clip are asked of the same tokens, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from pruneval.tasks.pocket import clips, prompts, video_prompts, world
from pruneval.tasks.pocket.onevision import language, packing
from pruneval.tasks.pocket.onevision.packing import NEWLINE, VIEW, Writer
from pruneval.tasks.pocket.questions import PAIR_CATEGORIES, SKILLS, Question, ask, choose, pair

SEED = 77
OTHER = (*(c for c in PAIR_CATEGORIES if c != "existence"), "choice")
"""What else the image benchmarks ask: MME's yes/no categories and multiple choice."""
CHOICES = {"mvbench": video_prompts.mvbench, "videomme": video_prompts.videomme}
"""The video benchmarks' forms, with four choices or, of yes and no, two."""


@dataclass(frozen=True)
class Item:
    """A scene, a clip or two scenes, with questions by skill and the prompts that ask them."""

    thing: Any
    held: list[np.ndarray]
    """The tokens that hold each thing."""
    asked: dict[str, tuple[Question, str]]


@dataclass(frozen=True)
class Sight:
    """What the tower makes of the items."""

    features: Tensor
    """Features of cells (n, cells, 128)."""
    received: Tensor
    """Attention that each token's cells receive in the last layer, mean of heads and rows (n, tokens)."""


Keep = Callable[[Item, tuple[int, ...], Tensor, np.random.Generator], np.ndarray]
"""Chooses the tokens to keep from an item, the question's evidence, the attention and chance."""


def everything(item: Item, evidence: tuple[int, ...], received: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Keeps every token."""
    return np.arange(len(received))


def only_evidence(item: Item, evidence: tuple[int, ...], received: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Keeps the tokens that hold what the question is about."""
    return np.unique(np.concatenate([item.held[i] for i in evidence]))


def top(share: float) -> Keep:
    """Keeps the share of tokens whose cells receive most attention in the tower."""
    return lambda item, evidence, received, rng: np.sort(
        received.topk(round(share * len(received))).indices.numpy()
    )  # fmt: skip


def chance(share: float) -> Keep:
    """Keeps a share of the tokens, drawn at random."""
    return lambda item, evidence, received, rng: np.sort(
        rng.permutation(len(received))[: round(share * len(received))]
    )  # fmt: skip


CONDITIONS: dict[str, Keep] = {
    "all tokens": everything,
    "evidence only": only_evidence,
    "received attention top 25 %": top(0.25),
    "random 25 %": chance(0.25),
    "received attention top 11 %": top(0.11),
    "random 11 %": chance(0.11),
}


def load(folder: Path) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """The model in float32, its tower with eager attention (which gives attention maps), and its processor."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    return model.eval(), LlavaOnevisionProcessor.from_pretrained(folder)


def items(kind: str, number: int, split: str = "test", seed: int = SEED) -> list[Item]:
    """``number`` images ("image"), clips ("clip") or pairs of images ("two"), each with one question per skill."""
    rng = np.random.default_rng([seed, sum(map(ord, kind + split))])
    return [{"image": _image, "clip": _clip, "two": _two}[kind](rng, split, turn) for turn in range(number)]


def _image(rng: np.random.Generator, split: str, turn: int) -> Item:
    scene = world.draw(rng, split)
    asked = {skill: q for skill in SKILLS if (q := ask(scene, rng, skill))}
    for category in OTHER[:-1]:
        made = pair(scene, rng, category)
        if made:
            asked[f"MME {category}"] = made[int(rng.integers(2))]
    wanted = ("shape", "colour", "position", "count", "digit")[turn % 5]
    if wanted in asked:
        asked["choice"] = choose(asked[wanted], rng)
    form = {name: prompts.scienceqa(q) if q.choices else prompts.gqa(q) for name, q in asked.items()}
    return Item(scene, packing.image_tokens(scene), {name: (q, form[name]) for name, q in asked.items()})


def _clip(rng: np.random.Generator, split: str, turn: int) -> Item:
    clip = clips.draw(rng, split, clips.EVENTS[turn % 2])
    asked: dict[str, tuple[Question, str]] = {}
    for skill in clips.SKILLS:
        question = clips.ask(clip, rng, skill)
        if question:
            asked[f"video {skill}"] = question, prompts.gqa(question)
    for name, prompt in CHOICES.items():
        wanted = list(asked)[int(rng.integers(len([a for a in asked if a.startswith("video")])))]
        question = replace(choose(asked[wanted][0], rng, 4), hint="")
        asked[name] = question, prompt(question)
    return Item(clip, packing.clip_tokens(clip), asked)


def _two(rng: np.random.Generator, split: str, turn: int) -> Item:
    while True:
        one, two = world.draw(rng, split), world.draw(rng, split)
        question = packing.ask_two((one, two), rng)
        if question:
            return Item((one, two), packing.two_tokens(one, two), {"two images": (question, prompts.gqa(question))})


@torch.no_grad()
def look(model: LlavaOnevisionForConditionalGeneration, kind: str, asked: Sequence[Item]) -> Sight:
    """Runs the tower once over what the items show; needs eager attention in the tower."""
    cells = torch.from_numpy({"image": packing.IMAGE, "clip": packing.CLIP, "two": packing.TWO}[kind])
    features, received = [], []
    for first in range(0, len(asked), 16):
        things = [item.thing for item in asked[first : first + 16]]
        if kind == "two":
            things = [scene for two in things for scene in two]
        views = language.shown(things)
        out = model.model.vision_tower(views.flatten(0, 1), output_attentions=True, output_hidden_states=True)
        own = (len(things), -1)
        seen = out.hidden_states[-1].unflatten(0, own).flatten(1, 2)
        maps = out.attentions[-1].mean((1, 2)).unflatten(0, own).flatten(1, 2)
        if kind == "two":
            seen, maps = (x[:, :VIEW].unflatten(0, (-1, 2)).flatten(1, 2) for x in (seen, maps))
        maps = maps[:, cells.clamp(min=0)].mean(-1)
        features.append(seen)
        received.append(maps.masked_fill(cells[:, 0] == NEWLINE, -1.0))
    return Sight(torch.cat(features), torch.cat(received))


@torch.no_grad()
def right(
    model: LlavaOnevisionForConditionalGeneration, writer: Writer, kind: str, asked: Sequence[Item], sight: Sight,
    keep: Keep, skills: Sequence[str] | None = None, size: int = 16,
) -> dict[str, float]:  # fmt: skip
    """Share of right answers per skill when only the tokens that ``keep`` chooses reach the decoder."""
    rng = np.random.default_rng(SEED)
    jobs = []
    for i, item in enumerate(asked):
        names = [name for name in item.asked if skills is None or name in skills]
        if keep is only_evidence:
            jobs += [(i, [name], keep(item, item.asked[name][0].evidence, sight.received[i], rng)) for name in names]
        elif names:
            jobs.append((i, names, keep(item, (), sight.received[i], rng)))
    good: dict[str, list[float]] = {}
    for first in range(0, len(jobs), size):
        part = jobs[first : first + size]
        rows = [[writer.block(p, q.answer) for q, p in (asked[i].asked[n] for n in names)] for i, names, _ in part]
        kept, hidden = _rectangle([tokens for _, _, tokens in part], sight.received.shape[1])
        pack = writer.sequences(kind, rows, kept, hidden)
        logits, ids, where = language.answered(model, pack, sight.features[[i for i, _, _ in part]])
        hit = logits.argmax(-1) == ids
        for r, (_, names, _) in enumerate(part):
            for b, name in enumerate(names, 1):
                good.setdefault(name, []).append(float(hit[(where == torch.tensor([r, b])).all(-1)].all()))
    return {name: float(np.mean(x)) for name, x in good.items()}


def _rectangle(kept: list[np.ndarray], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, filled up with tokens that no other token sees: (tokens, hidden)."""
    longest = max(map(len, kept))
    full = [np.sort(np.concatenate([k, np.setdiff1d(np.arange(total), k)[: longest - len(k)]])) for k in kept]
    return np.stack(full), np.stack([~np.isin(f, k) for f, k in zip(full, kept, strict=True)])


Figures = dict[str, dict[str, dict[str, float]]]


def figures(
    model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, number: int
) -> Figures:  # fmt: skip
    """Accuracy per condition and skill over ``number`` images and clips; "held-out" is a condition of its own."""
    writer = Writer(processor.tokenizer)
    found: Figures = {}
    for kind in ("image", "clip", "two"):
        asked = items(kind, number)
        sight = look(model, kind, asked)
        main = SKILLS if kind == "image" else [f"video {s}" for s in clips.SKILLS]
        found[kind] = {"all tokens": right(model, writer, kind, asked, sight, everything)}
        if kind != "two":
            for name, keep in list(CONDITIONS.items())[1:]:
                found[kind][name] = right(model, writer, kind, asked, sight, keep, main)
        asked = items(kind, number, "heldout")
        found[kind]["held-out"] = right(model, writer, kind, asked, look(model, kind, asked), everything)
    return found
