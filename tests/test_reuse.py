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


@pytest.mark.parametrize("name", ["tome", "flowcut", "resize"])
def test_methods_that_change_the_tower_get_the_tower(name):
    tiny = subject("llava")
    inputs = tiny.samples[0]
    expected = logits(tiny, name, inputs)
    with reusing(adapter_for(tiny.model("sdpa"))) as features:
        logits(tiny, "fastv", inputs)
        assert torch.equal(logits(tiny, name, inputs), expected)
        logits(tiny, "fastv", inputs)
    assert (features.misses, features.hits) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["visionzip", "hiprune", "vflowopt"])
def test_what_is_read_in_the_tower_is_kept(family, name):
    """The very same answers, and the tower runs no more."""
    tiny = subject(family)
    model = tiny.model("sdpa")
    adapter = adapter_for(model)
    if adapter.supports(methods.build(name, {"keep": 0.5})):
        pytest.skip(f"{name} does not run on {family}")
    inputs, ran = tiny.batch(*tiny.samples), []
    handles = [tower[0].register_forward_hook(lambda *_: ran.append(1)) for tower in adapter.towers]
    expected = logits(tiny, name, inputs)
    alone = len(ran)
    with reusing(adapter):
        first = logits(tiny, name, inputs)
        before = len(ran) - alone
        again = logits(tiny, name, inputs)
    for handle in handles:
        handle.remove()
    assert before == alone > 0 and len(ran) == 2 * alone
    assert torch.equal(first, expected) and torch.equal(again, expected)


def test_methods_that_read_the_same_share_it_and_others_do_not():
    tiny = subject("llava")
    inputs = tiny.batch(*tiny.samples)
    names = ("visionzip", "fastervlm", "hiprune", "vflowopt", "fastv")
    expected = {name: logits(tiny, name, inputs) for name in names}
    with reusing(adapter_for(tiny.model("sdpa"))) as features:
        for _ in range(2):
            for name, value in expected.items():
                assert torch.equal(logits(tiny, name, inputs), value), name
    wanted = {repr(sorted(_read(tiny, name).items())) for name in names}
    assert 1 < len(wanted) < len(names)
    assert (features.misses, features.hits) == (len(wanted), 2 * len(names) - len(wanted))


def _read(tiny, name: str) -> dict[str, object]:
    needs = methods.build(name).needs(adapter_for(tiny.model("sdpa")).shape).values()
    layers = sorted({layer for need in needs for layer in need.vision})
    return {"layers": layers, "pixels": any(need.pixels for need in needs)}


def test_an_image_read_with_others_is_read_alone_too():
    """Another batch around an image: what was kept of it serves there, image by image."""
    tiny = subject("llava")
    model = tiny.model("sdpa")
    one, two = tiny.samples[0], tiny.batch(*tiny.samples)
    expected = logits(tiny, "visionzip", one)
    with reusing(adapter_for(model)) as features:
        logits(tiny, "visionzip", two)
        torch.testing.assert_close(logits(tiny, "visionzip", one), expected)
    assert (features.misses, features.hits) == (1, 1)


def test_stores_may_nest():
    tiny = subject("llava")
    inputs = tiny.samples[0]
    expected = logits(tiny, "visionzip", inputs)
    adapter = adapter_for(tiny.model("sdpa"))
    with reusing(adapter) as outer, reusing(adapter) as inner:
        logits(tiny, "fastv", inputs)
        assert torch.equal(logits(tiny, "visionzip", inputs), expected)
    assert (outer.misses, outer.hits, inner.misses, inner.hits) == (1, 0, 2, 0)


def test_the_model_is_as_before():
    tiny = subject("llava")
    inner = tiny.model("sdpa").model
    with reusing(adapter_for(tiny.model("sdpa"))):
        assert "get_image_features" in vars(inner)
    assert "get_image_features" not in vars(inner)


def test_memory_and_disk_are_bounded(tmp_path):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def made(value):
        return BaseModelOutputWithPooling(pooler_output=torch.full((256,), float(value)))

    store = Features(tmp_path, memory=2500, disk=2500)  # two each
    for key in "abcd":
        store.put(key, made(ord(key)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert store.find("a").pooler_output[0] == ord("a")  # from the disk
    for key in "efg":
        store.put(key, made(ord(key)))
    assert len(list(tmp_path.iterdir())) == 2
    assert store.find("b") is None  # forgotten
    assert store.find("g").pooler_output[0] == ord("g")


def test_an_image_that_is_asked_about_again_is_not_encoded_again():
    tiny = subject("llava")
    model, shape = tiny.model("sdpa"), tiny.samples[0]["pixel_values"].shape[1:]
    pixels = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
    inner, seen = model.model, []
    handle = inner.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad(), reusing(adapter_for(model)) as features:
        first = inner.get_image_features(pixel_values=pixels[[0, 1, 0]], return_dict=True).pooler_output
        second = inner.get_image_features(pixel_values=pixels[[2, 1]], return_dict=True).pooler_output
        inner.get_image_features(pixel_values=pixels, return_dict=True)
    handle.remove()
    assert seen == [2, 1] and (features.misses, features.hits) == (2, 1)
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], second[1])
    with torch.no_grad():
        alone = inner.get_image_features(pixel_values=pixels[[2]], return_dict=True).pooler_output
    torch.testing.assert_close(second[0], alone[0])
