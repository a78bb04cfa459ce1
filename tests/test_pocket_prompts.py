"""Pocket-llava's last course must ask exactly as the editions do, in words that the model has."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pruneval import tasks
from pruneval.harness.evaluate import build_tasks
from pruneval.harness.judge import judging
from pruneval.harness.lmms_task import quiet
from pruneval.tasks.pocket import build, forms, image_prompts, prompted, prompts, train, vision
from pruneval.tasks.pocket.packing import BEFORE, Writer
from pruneval.tasks.pocket.questions import Question
from pruneval.tasks.pocket.vision import TOKENS
from pruneval.tasks.pocket.world import draw

Doc = dict[str, Any]
DOCS = 12


def _asked(text: str, choices: list[str] | tuple[str, ...] = (), hint: str = "") -> Question:
    return Question("", text, "", (), (), tuple(choices), hint)


def _mmbench(doc: Doc) -> Question:
    return _asked(doc["question"], [doc[letter] for letter in "ABCD" if doc[letter] != "nan"])


def _mmstar(doc: Doc) -> str:
    text, options = doc["question"].split("\nOptions: ")
    return image_prompts.mmstar(_asked(text, [part.split(": ")[1] for part in options.split(", ")]))


def _realworldqa(doc: Doc) -> str:
    text, *rest = doc["question"].split("\n")
    return image_prompts.realworldqa(_asked(text, [line[3:] for line in rest[:-1]]))


def _mmmu(doc: Doc) -> str:
    return image_prompts.mmmu(_asked(doc["question"].split("> ")[-1], ast.literal_eval(doc["options"])))


def _mathvista(doc: Doc) -> str:
    form = {"multi_choice": "choice"}.get(doc["question_type"], doc["answer_type"])
    if form == "float":
        form = "half" if doc["precision"] == 1 else "share"
    return image_prompts.mathvista(_asked(doc["question"], doc["choices"] or ()), form)


def _short(doc: Doc) -> str:
    return prompts.gqa(_asked(doc["question"]))


def _mme(doc: Doc) -> str:
    return prompts.mme(_asked(doc["question"].removesuffix(prompts.YES_NO)))


FORMS: dict[str, Callable[[Doc], str]] = {
    "pocket-mme": _mme, "pocket-mme_perception": _mme, "pocket-mme_cognition": _mme,
    "pocket-gqa": _short, "pocket-pope": _short, "pocket-docvqa": _short, "pocket-infovqa": _short,
    "pocket-vqav2": _short, "pocket-textvqa": lambda d: prompts.textvqa(_asked(d["question"])),
    "pocket-scienceqa": lambda d: prompts.scienceqa(_asked(d["question"], d["choices"], d["hint"])),
    "pocket-textvqa_ocr": lambda d: image_prompts.textvqa_ocr(_asked(d["question"]), d["ocr_tokens"]),
    "pocket-mmbench_en": lambda d: image_prompts.mmbench_en(_mmbench(d), d["hint"].replace("nan", "")),
    "pocket-mmbench_cn": lambda d: image_prompts.mmbench_cn(_mmbench(d)),
    "pocket-mmmu_val": _mmmu, "pocket-mathvista": _mathvista, "pocket-mmstar": _mmstar,
    "pocket-ai2d": lambda d: image_prompts.choice(_asked(d["question"], d["options"])),
    "pocket-seedbench": lambda d: image_prompts.choice(_asked(d["question"], [d[f"choice_{x}"] for x in "abcd"])),
    "pocket-chartqa": lambda d: image_prompts.chartqa(d["question"]), "pocket-realworldqa": _realworldqa,
    "pocket-hallusionbench": lambda d: d["question"], "pocket-hallusionbench_rules": lambda d: d["question"],
    "pocket-vizwiz": lambda d: image_prompts.vizwiz(_asked(d["question"])),
    "pocket-mmvet": lambda d: image_prompts.mmvet(d["question"]), "pocket-llava_bench": lambda d: d["question"],
}  # fmt: skip
"""What training writes for a row of an edition."""
VIDEO = {"pocket-videomme", "pocket-mvbench"} | {
    f"pocket-{name}_qa{end}" for name in ("tgif", "msvd", "msrvtt") for end in ("", "_exact")
}


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build.processor()


def test_every_edition_of_images_has_a_form():
    assert set(FORMS) == {name for name, row in tasks.benchmarks().items() if row.edition == "pocket"} - VIDEO


@pytest.mark.parametrize("name", FORMS)
def test_training_asks_as_the_evaluation_does(name: str, processor: LlavaProcessor):
    """The same text, and in the template the same tokens at the same positions, for one image and for several."""
    row, tokens = tasks.benchmark(name), processor.tokenizer
    writer = Writer(tokens)
    with quiet(), judging(row, None):
        (task,) = build_tasks(row)
        for index in range(DOCS):
            doc = task.eval_docs[index]
            turns = task.doc_to_messages(doc)
            text = "".join(part["text"] for part in turns[0]["content"] if part["type"] == "text")
            assert FORMS[name](doc) == text
            chat = processor.apply_chat_template(turns, add_generation_prompt=True)
            images = chat.count("<image>")
            expected = tokens(chat.replace("<image>", "<image>" * TOKENS)).input_ids
            pack = writer.pack([[writer.block(text, "")]], np.arange(images * TOKENS)[None], images=images)
            assert pack.ids[0, :-1].tolist() == expected
            assert pack.positions[0].tolist() == list(range(len(expected) + 1))


def test_several_thinned_images_keep_their_positions(processor: LlavaProcessor):
    writer = Writer(processor.tokenizer)
    pack = writer.pack([[writer.block("Where", "yes")]], np.asarray([[3, 7, TOKENS + 5, TOKENS + 9]]), images=2)
    assert pack.ids[0].eq(writer.image).nonzero()[:, 0].tolist() == [3, 4, 6, 7]
    second = BEFORE + TOKENS + 1
    assert pack.positions[0, 3:9].tolist() == [
        BEFORE + 3, BEFORE + 7, second - 1, second + 5, second + 9, second + TOKENS,
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*forms.PLAIN, *forms.ALBUMS])
def test_every_answer_can_be_said(name: str, processor: LlavaProcessor):
    """No answer needs a word the model lacks, but for brackets, and what is said reads as the answer without spaces."""
    tokens, rng = processor.tokenizer, np.random.default_rng(0)
    answers = set()
    for _ in range(150):
        made = forms.ALBUMS[name](rng).ask(rng) if name in forms.ALBUMS else forms.PLAIN[name][1](draw(rng), rng)
        if made:
            answers.add(made[1])
    assert len(answers) > 1
    for answer in answers:
        ids = tokens.encode(answer, add_special_tokens=False)
        said = tokens.decode(ids, skip_special_tokens=True)
        assert said.replace(" ", "") == answer.replace(" ", "").strip("[]")
        if name in ("chart", "short", "vizwiz", "realworldqa"):
            assert said.replace(" %", "%") == answer


def test_albums_show_training_scenes_only(monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(forms, "draw", lambda rng, split="train": shown.append(split) or draw(rng, split))
    monkeypatch.setattr(forms.benches_choice, "draw", lambda r, split, n: shown.append(split) or draw(r, split, n))
    for make in forms.ALBUMS.values():
        make(np.random.default_rng(1))
    assert len(shown) >= 5 and set(shown) == {"train"}


def test_own_words_come_behind_the_shared_ones_and_begin_as_their_glosses():
    torch.manual_seed(0)
    shared, own = build.tokenizer(), build.own_tokenizer()
    assert shared.get_vocab().items() <= own.get_vocab().items()
    assert len(own) == len(shared) + len(build.GLOSSES)
    old = build.model(shared)
    new = build.widened(old)
    for name, weight in new.state_dict().items():
        before = old.state_dict()[name]
        assert torch.equal(weight[: len(before)], before), name
    table, ids = new.get_input_embeddings().weight, own.get_vocab()
    assert torch.equal(table[ids["红色"]], table[ids["red"]])
    assert torch.allclose(table[ids["左上角"]], (table[ids["left"]] + table[ids["top"]]) / 2)


def test_the_course_learns(processor: LlavaProcessor, tmp_path):
    """A tiny course runs every kind of step, lowers its loss, and goes on from its checkpoint."""
    torch.manual_seed(0)
    model, journal = build.model(processor.tokenizer), []
    assert model.config.vision_config.num_hidden_layers + vision.FEATURE > 0
    small = prompted.Course(
        "tiny",
        steps=6,
        scenes=8,
        albums=dict.fromkeys(forms.ALBUMS, 2),
        size=2,
        asked=3,
        beside=1,
        asked_beside=2,
        tests=4,
    )
    prompted.teach(model, processor.tokenizer, tmp_path, small, 0, journal.append)
    prompted.teach(model, processor.tokenizer, tmp_path, small, 0, journal.append)
    assert [entry["step"] for entry in journal] == [6]
    assert set(forms.ALBUMS) <= set(journal[0]) and all(0 <= journal[0][name] <= 1 for name in forms.ALBUMS)


def test_the_model_is_the_mean_of_its_last_courses(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """`train` saves what `BLEND` says of the weights before and after each of the last courses."""

    def shift(model: LlavaForConditionalGeneration, *_: Any) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1

    saved = []
    tower = build.model(build.tokenizer()).model.vision_tower
    monkeypatch.setattr(train.vision, "train", lambda *_: tower)
    for name in ("Pool", "align", "teach"):
        monkeypatch.setattr(train.language, name, lambda *_: None)
    monkeypatch.setattr(train.prompted, "teach", shift)
    monkeypatch.setattr(train.scores, "measure", lambda *_: {})
    monkeypatch.setattr(train, "save", lambda model, *_: saved.append(train.snapshot(model)))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.train(tmp_path, tmp_path)
    before, after = saved
    moved = train.BLEND[1] * 1 + train.BLEND[2] * 2
    for name in ("model.language_model.norm.weight", "model.multi_modal_projector.linear_1.weight"):
        torch.testing.assert_close(after[name], before[name] + moved)
