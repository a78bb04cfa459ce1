"""How well pocket-llava answers, and what dropping visual tokens does to it.

Answers come from the stock path: the processor's prompt, ``generate`` with the image features passed as
``mm_encoder_outputs``, greedy, in float32. To keep a subset of the patches, their features and placeholders are kept
and every token keeps its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pruneval.tasks.pocket import prompts
from pruneval.tasks.pocket.packing import held
from pruneval.tasks.pocket.questions import PAIR_CATEGORIES, SKILLS, Question, ask, choose, pair
from pruneval.tasks.pocket.vision import FEATURE, TOKENS
from pruneval.tasks.pocket.world import Scene, draw, render

QUARTER, NINTH = 36, 16
"""25 % and 11 % of the 144 patches."""

SEED = 77


@dataclass(frozen=True)
class Item:
    """A question about a scene."""

    scene: Scene
    question: Question


@dataclass(frozen=True)
class Sight:
    """What the tower makes of the images of some items."""

    features: Tensor
    """Projected patches (n, 144, width)."""
    attention: Tensor
    """Attention of the CLS row to the patches at the layer that feeds the projector, head mean (n, 144)."""


Keep = Callable[[Item, Tensor, np.random.Generator], np.ndarray]
"""Chooses the patches to keep, in order, from an item and the CLS attention (144,)."""


def everything(item: Item, attention: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Keeps every patch."""
    return np.arange(TOKENS)


def evidence(item: Item, attention: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Keeps the patches that hold what the question is about."""
    return np.asarray(held(item.scene, item.question.evidence))


def top(size: int) -> Keep:
    """Keeps the `size` patches the CLS token attends to most."""
    return lambda item, attention, rng: np.sort(attention.topk(size).indices.numpy())


def chance(size: int) -> Keep:
    """Keeps `size` patches drawn at random."""
    return lambda item, attention, rng: np.sort(rng.permutation(TOKENS)[:size])


CONDITIONS: dict[str, Keep] = {
    "all patches": everything,
    "evidence only": evidence,
    "CLS top 25 %": top(QUARTER),
    "random 25 %": chance(QUARTER),
    "CLS top 11 %": top(NINTH),
    "random 11 %": chance(NINTH),
}


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32, its tower with eager attention (which gives attention maps), and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def items(skill: str, number: int, split: str = "test", seed: int = SEED) -> list[Item]:
    """Questions of one skill (or an MME category, or "choice"), each about a scene of its own."""
    rng = np.random.default_rng([seed, sum(map(ord, skill + split))])
    found: list[Item] = []
    while len(found) < number:
        scene = draw(rng, split)
        question: Question | None
        if skill in SKILLS:
            question = ask(scene, rng, skill)
        elif skill == "choice":
            question = ask(scene, rng, ("shape", "colour", "position", "count", "digit")[len(found) % 5])
            question = choose(question, rng) if question else None
        else:
            made = pair(scene, rng, skill)
            question = made[len(found) % 2] if made else None
        if question:
            found.append(Item(scene, question))
    return found


@torch.no_grad()
def look(model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[Item]) -> Sight:
    """Runs the vision tower once over the images of the questions."""
    features, attention = [], []
    for first in range(0, len(asked), 32):
        images = [render(item.scene) for item in asked[first : first + 32]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        features.append(model.model.multi_modal_projector(out.hidden_states[FEATURE][:, 1:]))
        attention.append(out.attentions[FEATURE][:, :, 0, 1:].mean(1))
    return Sight(torch.cat(features), torch.cat(attention))


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[Item], sight: Sight, keep: Keep,
    seed: int = SEED, size: int = 32,
) -> list[str]:  # fmt: skip
    """Greedy answers to the items when only the patches that ``keep`` chooses reach the decoder."""
    tokens, image = processor.tokenizer, model.config.image_token_id
    rng = np.random.default_rng(seed)
    said: list[str] = []
    for first in range(0, len(asked), size):
        rows, features = [], []
        for i in range(first, min(first + size, len(asked))):
            question = asked[i].question
            text = prompts.chat(prompts.scienceqa(question) if question.choices else prompts.gqa(question))
            ids = torch.tensor(tokens(text.replace("<image>", "<image>" * TOKENS)).input_ids)
            kept = torch.from_numpy(keep(asked[i], sight.attention[i], rng))
            chosen = ids != image
            chosen[(ids == image).nonzero()[kept, 0]] = True
            rows.append((ids[chosen], chosen.nonzero()[:, 0]))
            features.append(sight.features[i, kept])
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest), tokens.pad_token_id)
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for r, (row, place) in enumerate(rows):
            ids[r, longest - len(row) :], positions[r, longest - len(row) :] = row, place
            mask[r, longest - len(row) :] = 1
        out = model.generate(
            input_ids=ids, attention_mask=mask, position_ids=positions, max_new_tokens=4, do_sample=False,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
        )  # fmt: skip
        said += tokens.batch_decode(out[:, longest:], skip_special_tokens=True)
    return said


def accuracy(asked: Sequence[Item], said: Sequence[str]) -> float:
    """Share of answers that are exactly right."""
    return float(np.mean([a == item.question.answer for item, a in zip(asked, said, strict=True)]))


def measure(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, number: int, skills: Sequence[str] = SKILLS,
    conditions: Sequence[str] = tuple(CONDITIONS), split: str = "test",
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy per condition and skill over ``number`` questions per skill, with their mean under "mean"."""
    table: dict[str, dict[str, float]] = {name: {} for name in conditions}
    for skill in skills:
        asked = items(skill, number, split)
        sight = look(model, processor, asked)
        for name in conditions:
            table[name][skill] = accuracy(asked, answers(model, processor, asked, sight, CONDITIONS[name]))
    for row in table.values():
        row["mean"] = float(np.mean(list(row.values())))
    return table


OTHER_SKILLS = (*(c for c in PAIR_CATEGORIES if c != "existence"), "choice")
"""What else the benchmarks ask: MME's yes/no categories and multiple choice."""
