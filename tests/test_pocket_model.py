"""The committed pocket-llava must answer by looking, and must suffer where its images are pruned badly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from pruneval.tasks.pocket import build, evaluate, prompts
from pruneval.tasks.pocket.questions import SKILLS
from pruneval.tasks.pocket.train import MODEL
from pruneval.tasks.pocket.vision import TOKENS
from pruneval.tasks.pocket.world import render

LEAST = {"shape": 0.93, "colour": 0.93, "existence": 0.93, "position": 0.93, "count": 0.85, "digit": 0.85}
NUMBER = 100
"""Questions per skill: enough for the margins below, few enough to be quick."""

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return evaluate.load(MODEL)


@pytest.fixture(scope="module")
def table(loaded: Loaded) -> dict[str, dict[str, float]]:
    return evaluate.measure(*loaded, NUMBER)


def test_it_loads_like_any_hub_model() -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    processor = AutoProcessor.from_pretrained(MODEL)
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.config.vision_feature_layer == -2


def test_it_is_small_and_says_what_it_is() -> None:
    assert Path(MODEL / "model.safetensors").stat().st_size < 12_000_000
    text = (MODEL / "README.md").read_text()
    assert "Held-out" in text and "training.png" in text
    assert (MODEL / "training.png").exists()


def test_the_committed_tokenizer_is_the_one_the_code_builds(loaded: Loaded) -> None:
    assert loaded[1].tokenizer.get_vocab() == build.own_tokenizer().get_vocab()


def test_the_prompt_is_the_one_it_was_trained_on(loaded: Loaded) -> None:
    tokens, item = loaded[1].tokenizer, evaluate.items("colour", 1)[0]
    asked = prompts.gqa(item.question)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    text = loaded[1].apply_chat_template(turn, add_generation_prompt=True)
    assert text == prompts.chat(asked)
    inputs = loaded[1](images=render(item.scene), text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(loaded[0].config.image_token_id) == TOKENS
    assert ids[0] == tokens.bos_token_id and tokens.unk_token_id not in ids


def test_pixels_and_features_give_the_same_answers(loaded: Loaded) -> None:
    """The helper that drops tokens, dropping none, says what plain ``generate`` says."""
    model, processor = loaded
    asked = [item for skill in SKILLS for item in evaluate.items(skill, 2)]
    said = evaluate.answers(model, processor, asked, evaluate.look(model, processor, asked), evaluate.everything)
    for item, answer in zip(asked, said, strict=True):
        text = prompts.chat(prompts.gqa(item.question))
        inputs = processor(images=render(item.scene), text=text, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs)
        plain = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert plain == answer


@pytest.mark.parametrize("skill", SKILLS)
def test_it_answers(table: dict[str, dict[str, float]], skill: str) -> None:
    assert table["all patches"][skill] >= LEAST[skill]


def test_the_evidence_is_enough(table: dict[str, dict[str, float]]) -> None:
    assert table["evidence only"]["mean"] >= table["all patches"]["mean"] - 0.02


@pytest.mark.parametrize("share", ["25 %", "11 %"])
def test_cls_attention_beats_chance(table: dict[str, dict[str, float]], share: str) -> None:
    assert table[f"CLS top {share}"]["mean"] >= table[f"random {share}"]["mean"] + 0.05


def test_random_pruning_hurts(table: dict[str, dict[str, float]]) -> None:
    assert table["random 11 %"]["mean"] <= table["all patches"]["mean"] - 0.20
