"""pocket-llava's CLIP: it finds images by their captions, and methods that need it run on pocket-llava."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from pruneval import methods
from pruneval.harness import models
from pruneval.harness.session import pruned
from pruneval.tasks.pocket import evaluate, prompts, text_tower
from pruneval.tasks.pocket.train import MODEL
from pruneval.tasks.pocket.world import Scene, Thing, render

FOLDER = MODEL / "text_tower"


@pytest.fixture(scope="module")
def figures():
    model, _ = evaluate.load(MODEL)
    clip, words = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval(), text_tower.tokenizer()
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, clip.vision_model.state_dict()[name]), name
    return text_tower.measure(clip, words, text_tower.look(model, 96, 123, "test"))


def test_captions_find_images_that_show_what_they_name(figures):
    assert figures["found"] >= 0.9 and figures["chance"] < 0.15


def test_the_sign_of_clip(figures):
    """What a question is about is less like it than the rest: the reason for the minus in TRIM and CDPruner."""
    assert figures["least"] > 0.35 > figures["most"]
    assert figures["other"] < 0.5 and figures["ground"] < 0.5


def test_the_committed_tokenizer_is_the_one_the_code_builds():
    tower = models.load("pocket-llava", "cpu").adapter.text_tower()
    assert tower.tokenizer.get_vocab() == text_tower.tokenizer().get_vocab()
    for text in ("What color is the number 2?", "Is there a GREEN ring?\nA. zebra"):
        assert tower.tokenizer(text)["input_ids"] == text_tower.tokenizer()(text)["input_ids"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5_000_000


def test_what_texts_name():
    things = (Thing("circle", "red", 0, 0, 1, 1, 12), Thing("7", "blue", 4, 4, 1, 1, 12))
    scene = Scene(things, 0)
    for text, there in [
        ("a red circle and a number 7", True),
        ("What color is the number 7?", True),
        ("a blue circle", False),
        ("Which shape is blue?", True),
        ("a blue number 7 and a ring", False),
    ]:
        assert text_tower.fits(scene, text_tower.named(text)) == there, text


@pytest.mark.parametrize("name", ["trim", "cdpruner", "rcom"])
def test_methods_that_read_the_question_run_on_pocket_llava(name):
    loaded = models.load("pocket-llava", "cpu")
    method = methods.build(name, {"keep": 0.25, "count": "keep"} if name == "rcom" else {"keep": 0.25})
    assert loaded.adapter.supports(method) is None
    asked = [item for skill in ("shape", "colour") for item in evaluate.items(skill, 2)]
    texts = [prompts.chat(prompts.gqa(item.question)) for item in asked]
    images = [np.asarray(render(item.scene)) for item in asked]
    inputs = loaded.processor(images=images, text=texts, padding=True, return_tensors="pt")
    with pruned(loaded.model, method, adapter=loaded.adapter) as session:
        out = loaded.model.generate(**inputs, max_new_tokens=4)
        assert [session.trace.budget(row).per_layer for row in range(4)] == [[36] * 8] * 4
    assert len(out) == 4
