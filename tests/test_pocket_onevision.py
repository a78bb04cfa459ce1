"""The committed pocket-onevision must answer by looking, as its card says, and suffer where it is pruned badly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.tasks.pocket import clips, prompts
from pruneval.tasks.pocket.onevision import build, evaluate, packing
from pruneval.tasks.pocket.onevision.evaluate import CONDITIONS, Item
from pruneval.tasks.pocket.onevision.train import MODEL
from pruneval.tasks.pocket.questions import SKILLS
from pruneval.tasks.pocket.world import draw, render

NUMBER = 40
"""Images, and clips: enough for the margins below, few enough to be quick."""
MAIN = {"image": SKILLS, "clip": [f"video {skill}" for skill in clips.SKILLS]}
LEAST = {
    "image": {"shape": 0.9, "colour": 0.9, "existence": 0.85, "digit": 0.9, "position": 0.85, "count": 0.6},
    "clip": {"video moved": 0.6, "video direction": 0.85, "video order": 0.5, "video count": 0.8},
}
"""Below the card's figures by what forty of each leave to chance."""

Loaded = tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]
Tables = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return evaluate.load(MODEL)


@pytest.fixture(scope="module")
def tables(loaded: Loaded) -> Tables:
    model, processor = loaded
    writer, found = packing.Writer(processor.tokenizer), {}
    for kind in ("image", "clip"):
        asked = evaluate.items(kind, NUMBER)
        sight = evaluate.look(model, kind, asked)
        found[kind] = {
            name: evaluate.right(model, writer, kind, asked, sight, CONDITIONS[name], MAIN[kind])
            for name in ("all tokens", "evidence only", "random 11 %")
        }
    return found


def mean(row: dict[str, float]) -> float:
    return float(np.mean(list(row.values())))


def inputs(processor: LlavaOnevisionProcessor, kind: str, item: Item, prompt: str) -> Any:
    media = {"image": ["image"], "clip": ["video"], "two": ["image", "image"]}[kind]
    turn = [{"role": "user", "content": [*({"type": m} for m in media), {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    if kind == "clip":
        return processor(videos=[clips.render_clip(item.thing)], text=text, do_sample_frames=False, return_tensors="pt")
    images = [render(item.thing)] if kind == "image" else [render(scene) for scene in item.thing]
    return processor(images=[images], text=text, return_tensors="pt")


def test_it_loads_like_any_hub_model() -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert type(processor) is LlavaOnevisionProcessor
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert model.config.text_config.model_type == "qwen2" and model.config.text_config.num_hidden_layers >= 8


def test_it_is_small_and_says_what_it_is() -> None:
    assert Path(MODEL / "model.safetensors").stat().st_size < 9_000_000
    text = (MODEL / "README.md").read_text()
    assert "held-out" in text and "descendant of pocket-llava" in text
    assert (MODEL / "training.png").exists()


def test_the_committed_tokenizer_is_the_one_the_code_builds(loaded: Loaded) -> None:
    assert loaded[1].tokenizer.get_vocab() == build.tokenizer().get_vocab()


def test_training_saw_the_processors_pixels(loaded: Loaded) -> None:
    rng = np.random.default_rng(0)
    image, clip = render(draw(rng)), clips.render_clip(clips.draw(rng))
    made = loaded[1].image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, build.views(torch.from_numpy(image).permute(2, 0, 1)[None]), atol=1e-5)
    made = loaded[1].video_processor(clip, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
    assert torch.allclose(made[0], build.frames(torch.from_numpy(clip).permute(0, 3, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("kind, count", [("image", 336), ("clip", 129), ("two", 130)])
def test_prompts_and_counts_are_those_of_training(loaded: Loaded, kind: str, count: int) -> None:
    """The processor's placeholders, training's rows and what the engine lays out are the same."""
    model, processor = loaded
    item = evaluate.items(kind, 1)[0]
    question, prompt = next(iter(item.asked.values()))
    made = inputs(processor, kind, item, prompt)
    writer = packing.Writer(processor.tokenizer)
    row = writer.sequences(kind, [[writer.block(prompt, question.answer)]], np.arange(count)[None], None)
    length = made["input_ids"].shape[1]
    assert made["input_ids"][0].tolist() == row.ids[0, :length].tolist()
    assert processor.tokenizer.unk_token_id not in made["input_ids"]
    with pruned(model, methods.build("uniform", {"keep": 0.5})) as session:
        model.generate(**made, max_new_tokens=2)
        budget = session.trace.budget(0)
    assert budget.visual == count and budget.final == pytest.approx(count / 2, abs=1)


def test_right_answers_are_those_that_generate_gives(loaded: Loaded) -> None:
    """Figures are worked out without generation, from packed rows; they must agree with the stock path."""
    model, processor = loaded
    writer = packing.Writer(processor.tokenizer)
    for kind in ("image", "clip", "two"):
        for item in evaluate.items(kind, 3):
            sight = evaluate.look(model, kind, [item])
            figures = evaluate.right(model, writer, kind, [item], sight, evaluate.everything)
            for name in list(item.asked)[:5]:
                question, prompt = item.asked[name]
                made = inputs(processor, kind, item, prompt)
                out = model.generate(**made, max_new_tokens=4)[0, made["input_ids"].shape[1] :]
                said = processor.tokenizer.decode(out, skip_special_tokens=True)
                assert (said == question.answer) == bool(figures[name]), (kind, name, said)


@pytest.mark.parametrize("kind, skill", [(kind, skill) for kind, least in LEAST.items() for skill in least])
def test_it_answers(tables: Tables, kind: str, skill: str) -> None:
    assert tables[kind]["all tokens"][skill] >= LEAST[kind][skill]


@pytest.mark.parametrize(("kind", "least"), [("image", 0.9), ("clip", 0.8)])
def test_it_answers_most_questions(tables: Tables, kind: str, least: float) -> None:
    assert mean(tables[kind]["all tokens"]) >= least


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_the_evidence_is_enough_and_chance_is_not(tables: Tables, kind: str) -> None:
    table = tables[kind]
    assert mean(table["evidence only"]) >= mean(table["all tokens"]) - 0.05
    assert mean(table["random 11 %"]) <= mean(table["all tokens"]) - 0.1


def test_the_evidence_is_sparse() -> None:
    """A thing is in a few of an image's tokens, in the whole view and in the crops."""
    for kind, total, most in (("image", 336, 0.06), ("clip", 129, 0.3)):
        held = [len(tokens) / total for item in evaluate.items(kind, 20) for tokens in item.held]
        assert min(held) > 0.005 and max(held) <= most


def test_open_prompts_are_those_of_the_image_editions() -> None:
    item = evaluate.items("image", 1)[0]
    question, prompt = item.asked["existence"]
    assert prompt == prompts.pope(question) == prompts.gqa(question)
