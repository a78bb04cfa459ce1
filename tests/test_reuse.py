"""Reused features: the very same answers, computed once, bounded, and never for methods that look into the tower."""

from __future__ import annotations

import pytest
import torch

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.reuse import Features, reusing
from pruneval.harness.session import pruned
from pruneval.harness.subjects import FAMILIES, subject


def logits(tiny, method: str, inputs) -> torch.Tensor:
    with torch.no_grad(), pruned(tiny.model("sdpa"), methods.build(method, {"keep": 0.5})) as session:
        session.sample_keys = ["0"] * len(inputs["input_ids"])
        return tiny.model("sdpa")(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_very_same(family):
    tiny = subject(family)
    inputs = tiny.batch(*tiny.samples)
    expected = {name: logits(tiny, name, inputs) for name in ("fastv", "random")}
    with reusing(adapter_for(tiny.model("sdpa"))) as features:
        for _ in range(2):
            for name, value in expected.items():
                assert torch.equal(logits(tiny, name, inputs), value)
    assert features.misses <= 2 and features.hits == 3 * features.misses  # images, and perhaps videos


@pytest.mark.parametrize("name", ["visionzip", "tome", "flowcut", "resize"])
def test_methods_that_look_into_the_tower_get_the_tower(name):
    tiny = subject("llava")
    inputs = tiny.samples[0]
    expected = logits(tiny, name, inputs)
    with reusing(adapter_for(tiny.model("sdpa"))) as features:
        logits(tiny, "fastv", inputs)
        assert torch.equal(logits(tiny, name, inputs), expected)
        logits(tiny, "fastv", inputs)
    assert (features.misses, features.hits) == (1, 1)


def test_nor_do_they_get_another_store_where_stores_nest():
    tiny = subject("llava")
    inputs = tiny.samples[0]
    expected = logits(tiny, "visionzip", inputs)
    adapter = adapter_for(tiny.model("sdpa"))
    with reusing(adapter) as outer, reusing(adapter) as inner:
        logits(tiny, "fastv", inputs)
        assert torch.equal(logits(tiny, "visionzip", inputs), expected)
    assert (outer.misses, outer.hits, inner.misses, inner.hits) == (1, 0, 1, 0)


def test_the_model_is_as_before():
    tiny = subject("llava")
    inner = tiny.model("sdpa").model
    with reusing(adapter_for(tiny.model("sdpa"))):
        assert "get_image_features" in vars(inner)
    assert "get_image_features" not in vars(inner)


def test_memory_and_disk_are_bounded(tmp_path):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def made(value):
        return lambda: BaseModelOutputWithPooling(pooler_output=torch.full((256,), float(value)))

    store = Features(tmp_path, memory=2500, disk=2500)  # two each
    for key in "abcd":
        store.get(key, made(ord(key)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert store.get("a", made(0)).pooler_output[0] == ord("a")  # from the disk
    assert (store.misses, store.hits) == (4, 1)
    for key in "efg":
        store.get(key, made(ord(key)))
    assert len(list(tmp_path.iterdir())) == 2
    assert store.get("b", made(7)).pooler_output[0] == 7  # forgotten, computed again
