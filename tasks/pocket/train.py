"""Train pocket-llava from nothing: ``python -m pruneval.tasks.pocket.train --out DIR``.

The stages of the real models: the vision tower, the alignment of the projector with the words, and the decoder in
four courses, the last two of which (`prompted`) bring the prompts of every edition of images. Scenes and questions come
from the project's own generator and every random choice is seeded. A run that was interrupted goes on from its last
checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pruneval.tasks.pocket import build, card, evaluate, language, prompted, scores, vision

MODEL = Path(__file__).parent / "models" / "pocket-llava"
SEED = 0
VISION_STEPS, VISION_BATCH = 1000, 64
POOL, ALIGN_STEPS = 16384, 400
LANGUAGE = language.Course(
    "language", steps=900, size=24, muon=3e-3, adam=2e-3, cooldown=0.6, captions=(3, 1), whole=0.15, thin=0.75,
    partial=0.3, original=0.75,
    weights={
        "shape": 1.0, "colour": 1.0, "existence": 2.0, "position": 1.2, "count": 2.0, "digit": 1.2, "choice": 2.0,
        "pair": 2.4,
    },
)  # fmt: skip
POLISH_POOL = 4096
POLISH = language.Course(
    "polish", steps=200, size=24, muon=1e-3, adam=6e-4, cooldown=1.0, captions=(0, 0), whole=0.35, thin=0.5,
    partial=0.0, original=1.0, bare=0.8, ending=1.0,
    weights={
        "shape": 0.5, "colour": 0.5, "existence": 1.5, "position": 1.5, "count": 4.0, "digit": 0.5, "choice": 2.5,
        "pair": 3.0,
    },
)  # fmt: skip
"""A last course with fresh images, on what is learned last (counting) and without any background in many steps."""


BLEND = (0.25, 0.375, 0.375)
"""Shares of the weights before `prompted.COURSES` and after each of them, in the mean that is the model."""


class Journal:
    """Prints figures and keeps them, one JSON object a line, for the training curve."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, entry: dict[str, Any]) -> None:
        entry = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(" ".join(f"{k} {v}" for k, v in entry.items()), flush=True)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def snapshot(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def blend(states: list[dict[str, torch.Tensor]], shares: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Weighted mean of weights."""
    return {name: sum(share * state[name] for share, state in zip(shares, states, strict=True)) for name in states[0]}


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write weights (float16) and processor; the model itself stays in float32."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() for k, v in model.state_dict().items()}
    copy = build.model(processor.tokenizer).half()
    copy.load_state_dict(weights)
    copy.save_pretrained(out)
    processor.save_pretrained(out)


def train(out: Path, work: Path) -> None:
    """All stages, then the figures and the model card."""
    journal = Journal(work / "curve.jsonl")
    tower = vision.train(work, VISION_STEPS, VISION_BATCH, SEED, journal)

    start = time.time()
    torch.manual_seed(SEED + 1)
    tokens = build.tokenizer()
    model = build.model(tokens)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    test = language.Pool(model, 192, SEED + 99, "test")
    for course, size, seed in ((LANGUAGE, POOL, SEED), (POLISH, POLISH_POOL, SEED + 7)):
        path = work / f"{course.name}.pt"
        saved = torch.load(path, weights_only=True) if path.exists() else {"step": 0}
        if saved["step"] == course.steps:
            model.load_state_dict(saved["model"])
            continue
        pool = language.Pool(model, size, seed)
        if course is LANGUAGE and saved["step"] == 0:
            language.align(model, tokens, pool, ALIGN_STEPS, SEED, journal)
            journal({"stage": "align", "step": ALIGN_STEPS, "seconds": round(time.time() - start)})
        language.teach(model, tokens, pool, test, work, course, seed, journal)
    torch.manual_seed(SEED + 2)
    processor = build.processor()
    model = build.widened(model)
    states = [snapshot(model)]
    if not (work / "prompts.pt").exists():
        save(model, processor, work / "polished")
        journal({"stage": "editions", "when": "before", "scores": scores.measure(work / "polished", work / "before")})
    for last, seed in zip(prompted.COURSES, (SEED + 11, SEED + 13), strict=True):
        prompted.teach(model, processor.tokenizer, work, last, seed, journal)
        states.append(snapshot(model))
    model.load_state_dict(blend(states, BLEND))
    save(model, processor, out)
    journal({"stage": "editions", "when": "after", "scores": scores.measure(out, work / "after")})
    finish(out, journal)


def finish(out: Path, journal: Journal) -> None:
    """Measure the saved model and write its card."""
    model, processor = evaluate.load(out)
    figures = {
        "test": evaluate.measure(model, processor, card.NUMBER),
        "heldout": evaluate.measure(model, processor, card.NUMBER, conditions=["all patches"], split="heldout"),
        "other": evaluate.measure(model, processor, card.NUMBER, evaluate.OTHER_SKILLS, ["all patches"]),
    }
    config = model.config
    facts = {
        "parameters": model.num_parameters() / 1e6, "vision_layers": config.vision_config.num_hidden_layers,
        "vision_width": config.vision_config.hidden_size, "text_layers": config.text_config.num_hidden_layers,
        "text_width": config.text_config.hidden_size, "vocabulary": len(processor.tokenizer), "seed": SEED,
        "vision_steps": VISION_STEPS, "vision_batch": VISION_BATCH, "align_steps": ALIGN_STEPS, "pool": POOL,
        "language_steps": LANGUAGE.steps, "language_batch": LANGUAGE.size, "polish_steps": POLISH.steps,
        "prompts_steps": prompted.COURSES[0].steps, "prompts_scenes": prompted.COURSES[0].size,
        "prompts_albums": prompted.COURSES[0].beside, "letters_steps": prompted.COURSES[1].steps,
        "new_words": len(build.GLOSSES),
        "blend": ", ".join(str(share) for share in BLEND),
    }  # fmt: skip
    card.write(out, figures, journal.read(), facts)


def main() -> None:
    """Train, evaluate and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL, help="folder for the weights and the model card")
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints (default: OUT/../.OUT-work)")
    parser.add_argument("--card-only", action="store_true", help="measure the weights in OUT and write the card again")
    args = parser.parse_args()
    work = args.work or args.out.parent / f".{args.out.name}-work"
    if args.card_only:
        finish(args.out, Journal(work / "curve.jsonl"))
    else:
        train(args.out, work)


if __name__ == "__main__":
    main()
