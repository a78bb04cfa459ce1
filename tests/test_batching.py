"""Batches of questions that are alike, their size found by itself, and questions prepared once."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import tiny_llava
import torch
from PIL import Image

from pruneval import tasks
from pruneval.harness import batching, models, preparing
from pruneval.harness.errors import UserError
from pruneval.harness.evaluate import instances_of
from pruneval.harness.lmms_model import PrunevalModel


def asked(number: int, options: dict | None = None, images: int = 1, tokens: int = 10) -> SimpleNamespace:
    return SimpleNamespace(doc_id=number, context="x" * tokens, options=options or {}, images=images, tokens=tokens)


def measure(request: SimpleNamespace) -> tuple[int, int]:
    return request.images, request.tokens


def test_a_batch_has_equal_options_equally_many_images_and_nearly_one_length():
    draw = random.Random(0)
    requests = [
        asked(i, {"max_new_tokens": draw.choice([4, 16])}, draw.choice([0, 1, 2]), draw.randint(10, 400))
        for i in range(300)
    ]
    together = [
        batch
        for window in batching.windows(requests, 8)
        for batch in batching.batches(window, measure, lambda tokens: 8)
    ]
    assert sorted(request.doc_id for batch in together for request in batch) == list(range(300))
    assert max(map(len, together)) == 8 and len(together) <= 300 / 8 * 1.7
    for batch in together:
        assert len({(request.images, str(request.options)) for request in batch}) == 1
    wasted = sum(max(one.tokens for one in batch) - each.tokens for batch in together for each in batch)
    in_order = [requests[start : start + 8] for start in range(0, 300, 8)]
    careless = sum(max(one.tokens for one in batch) - each.tokens for batch in in_order for each in batch)
    assert wasted < careless / 6


def test_the_size_is_asked_again_before_every_batch():
    sizes = iter([1, 5, 2, 2])
    found = list(batching.batches([asked(i) for i in range(10)], measure, lambda tokens: next(sizes)))
    assert list(map(len, found)) == [1, 5, 2, 2]


def test_on_a_cpu_a_batch_has_so_many_tokens():
    found = batching.Automatic(torch.device("cpu"))
    assert found.size(10 * batching.CPU_TOKENS) == 1
    assert found.size(batching.CPU_TOKENS // 8) == 8
    assert found.size(3) == batching.LARGEST == found.largest


def test_on_a_gpu_the_first_question_says_what_fits(monkeypatch: pytest.MonkeyPatch):
    memory = SimpleNamespace(taken=1000, peak=1000, reserved=1500, free=9500)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.taken)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory.reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory.free, 20000))
    found = batching.Automatic(torch.device("cuda"))
    assert found.size(100) == 1
    memory.peak = 1500
    found.saw(100)
    # 5 bytes a token; 80 % of the 10,000 that are free or unused.
    assert found.size(100) == 16 and found.size(50) == 32 and found.size(10_000) == 1


@pytest.mark.parametrize("size", ["0", "-1", "many", "1.5", None, ""])
def test_a_size_that_is_none_is_one_line(size):
    with pytest.raises(UserError, match="the batch size must be auto or a whole number of at least 1"):
        batching.size_of(size)


def pictures() -> list[list[Image.Image]]:
    sizes = [[(96, 96)], [(200, 60)], [(64, 300)], [(50, 50), (120, 90)], [(300, 280)]]
    return [[Image.effect_noise(size, 80).convert("RGB") for size in each] for each in sizes]


@pytest.mark.parametrize("name", ["tiny", "pocket-llava", "pocket-onevision"])
def test_single_questions_put_together_are_what_the_processor_makes_of_several(name: str):
    if name == "tiny":
        processor = tiny_llava.processor()
    else:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(models.packaged(name), local_files_only=True)
    shown = pictures()
    texts = [f"{'<image>' * len(each)} what colour is it{' , really' * place}" for place, each in enumerate(shown)]
    expected = processor(
        images=[image for each in shown for image in each], text=texts, padding=True, padding_side="left",
        return_tensors="pt",
    )  # fmt: skip
    single = [preparing.prepare(processor, text, each, []) for text, each in zip(texts, shown, strict=True)]
    found = preparing.collate(single, processor.tokenizer.pad_token_id)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    at_once = preparing.together(processor, texts, shown)
    assert (at_once is None) == (name == "pocket-onevision")
    for one, alone in zip(at_once or single, single, strict=True):
        assert (one.text, one.picture, one.shown) == (alone.text, alone.picture, alone.shown)
        assert all(torch.equal(one.tensors[key], value) for key, value in alone.tensors.items())
    assert [one.shown for one in single] == [1, 1, 1, 2, 1] and len({one.picture for one in single}) == 5
    assert max(one.tokens for one in single) == expected["input_ids"].shape[1]


def test_a_question_is_prepared_once_whatever_asks_it(monkeypatch: pytest.MonkeyPatch):
    loaded, made = tiny_llava.loaded(), []
    real = preparing.together

    def counted(processor, texts, images):
        made.extend(texts)
        return real(processor, texts, images)

    monkeypatch.setattr("pruneval.harness.preparing.together", counted)
    answers = []
    for size in (2, 3):
        model = PrunevalModel(loaded, batch_size=size)
        instances = instances_of(tasks.benchmark("pocket-pope"), 6, model)
        answers.append(model.generate_until(instances))
    assert answers[0] == answers[1] and len(made) == 6
    other = tiny_llava.loaded()
    fresh = PrunevalModel(other)
    fresh.task_dict = model.task_dict
    assert fresh.generate_until(instances) == answers[0] and len(made) == 12


def test_what_is_kept_is_bounded():
    def question(number: int) -> preparing.Prepared:
        return preparing.Prepared("", {"input_ids": torch.full((1, 100), number)}, None, 0)

    store, made = preparing.Store(limit=2500), []
    for number in (1, 2, 3, 1, 4, 1, 2):
        store.get(number, lambda number=number: made.append(number) or question(number))
    assert made == [1, 2, 3, 4, 2] and store.size <= 2500
