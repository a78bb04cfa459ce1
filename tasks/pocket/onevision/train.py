"""Train pocket-onevision from pocket-llava: ``python -m pruneval.tasks.pocket.onevision.train --out DIR``.

Three stages: the vision tower, the alignment of the projector with pocket-llava's, the decoder. Scenes, clips and
questions come from the project's own generators and every random choice is seeded. A run that was interrupted goes on
from its last checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from pruneval.tasks.pocket import train as pocket_llava
from pruneval.tasks.pocket.onevision import build, card, evaluate, language, packing, projector, vision
from pruneval.tasks.pocket.train import Journal

MODEL = pocket_llava.MODEL.parent / "pocket-onevision"
SEED = 0
VISION_STEPS, VISION_IMAGES, VISION_SHOTS = 600, 16, 32
IMAGES, FILMS, ALIGN_STEPS, TESTS = 4096, 2560, 400, 40
LANGUAGE = language.Course(
    "language", steps=370, images=8, films=5, pairs=1, muon=1.5e-3, adam=1e-3, cooldown=0.6,
    weights={
        "shape": 1.0, "colour": 1.0, "existence": 2.0, "position": 3.0, "count": 3.0, "digit": 1.0, "choice": 3.0,
        "pair": 2.4,
    },
)  # fmt: skip

MORE_IMAGES, MORE_FILMS, MORE_SEED, PLACE_STEPS = 8192, 6144, SEED + 7, 400
PLACES = language.Course(
    "places", steps=160, images=16, films=0, pairs=0, muon=2e-3, adam=1e-3, cooldown=0.3, near=1.0, whole=0.0,
    ending=1.0, projector=False,
    weights={"shape": 0.5, "colour": 0.5, "existence": 1.0, "position": 5.0, "count": 1.0, "choice": 1.0, "pair": 2.0},
)  # fmt: skip
"""A thing's place is read off the view of the whole, but most of its tokens belong to crops; here there are none."""
MORE = language.Course(
    "more", steps=1650, images=5, films=11, pairs=1, muon=2e-3, adam=1e-3, cooldown=0.4, near=0.4, films_whole=0.4,
    projector=False, film_mix={"moved": 1.5, "direction": 2.0, "order": 1.5, "count": 0.7, "where": 1.2},
    weights={
        "shape": 1.0, "colour": 1.0, "existence": 2.0, "position": 3.0, "count": 3.0, "digit": 0.7, "choice": 3.0,
        "pair": 3.0,
    },
)  # fmt: skip

HISTORY = """**These weights took detours that the code does not.** The tower's first 500 steps ran under a
learning-rate schedule for 700, and the decoder's first 50 under one for 150 with 3 clips a step, the next 50 under one
for 260 with 4. Earlier attempts at stage 3 were thrown away, because where things are was not learned after a stage 2
without the words for places. Between stages 3 and 4 lie two attempts at stage 5, of 500 and 325 steps, in which
counting and films improved and places did not: the projector had lost them. The first 575 steps of stage 5 had 8
images and 8 clips, all skills of clips alike, no questions about places in clips, and ran under a schedule for 2000.
The settings were chosen by the small test set of the curve. The curve of stages 1 to 3 is taken over from the card of
the weights before."""


def save(model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor, out: Path) -> None:
    """Write weights (float16) and processor; the model itself stays in float32."""
    out.mkdir(parents=True, exist_ok=True)
    copy = build.model(processor.tokenizer).half()
    copy.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
    copy.save_pretrained(out)
    processor.save_pretrained(out)


def train(out: Path, work: Path, start: Path) -> None:
    """All stages, then the figures and the model card."""
    journal = Journal(work / "curve.jsonl")
    llava = build.pocket_llava(start)
    tower = vision.train(llava, work, VISION_STEPS, VISION_IMAGES, VISION_SHOTS, SEED, journal)

    begin = time.time()
    torch.manual_seed(SEED + 1)
    processor = build.processor()
    model = build.model(processor.tokenizer)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.eval()
    build.adopt_language(model, llava)
    tests = (
        language.pool(tower, "image", TESTS, SEED + 99, "test"),
        language.pool(tower, "clip", TESTS, SEED + 99, "test"),
    )
    writer = packing.Writer(processor.tokenizer)
    more = (MORE_IMAGES, MORE_FILMS, MORE_SEED)
    for course, images, films, seed in ((LANGUAGE, IMAGES, FILMS, SEED), (PLACES, *more), (MORE, *more)):
        path = work / f"{course.name}.pt"
        if path.exists() and (saved := torch.load(path, weights_only=True))["step"] == course.steps:
            model.load_state_dict(saved["model"])
            continue
        pools = (
            language.pool(tower, "image", images, seed, path=work / f"images-{images}.pt"),
            language.pool(tower, "clip", films, seed, path=work / f"clips-{films}.pt"),
        )
        if course is LANGUAGE and not path.exists():
            projector.align(model, writer, llava, pools[0], ALIGN_STEPS, SEED, journal)
            journal({"stage": "align", "step": ALIGN_STEPS, "seconds": round(time.time() - begin)})
        if course is PLACES and not path.exists():
            projector.put_places_back(model, writer, pools[0], PLACE_STEPS, seed, journal)
        language.teach(model, writer, pools, tests, work, course, seed, journal)
    save(model, processor, out)
    finish(out, journal)


def finish(out: Path, journal: Journal) -> None:
    """Measure the saved model and write its card."""
    model, processor = evaluate.load(out)
    facts = card.facts(model, processor) | {
        "vision_steps": VISION_STEPS, "vision_views": 5 * VISION_IMAGES + VISION_SHOTS, "align_steps": ALIGN_STEPS,
        "language_steps": LANGUAGE.steps, "images": LANGUAGE.images, "films": LANGUAGE.films, "pairs": LANGUAGE.pairs,
        "pool_images": IMAGES, "pool_films": FILMS, "history": HISTORY, "places_steps": PLACES.steps,
        "places_images": PLACES.images, "more_steps": MORE.steps, "more_images": MORE.images, "more_films": MORE.films,
        "more_pool_images": MORE_IMAGES, "more_pool_films": MORE_FILMS,
    }  # fmt: skip
    card.write(out, evaluate.figures(model, processor, card.NUMBER), journal.read(), facts)


def main() -> None:
    """Train, evaluate and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL, help="folder for the weights and the model card")
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints (default: OUT/../.OUT-work)")
    parser.add_argument("--start", type=Path, default=pocket_llava.MODEL, help="pocket-llava's folder, to begin from")
    parser.add_argument("--card-only", action="store_true", help="measure the weights in OUT and write the card again")
    args = parser.parse_args()
    work = args.work or args.out.parent / f".{args.out.name}-work"
    if args.card_only:
        finish(args.out, Journal(work / "curve.jsonl"))
    else:
        train(args.out, work, args.start)


if __name__ == "__main__":
    main()
