"""InternVL: what the vision tower's view says, and every method on tiles, several images, ragged batches and beams."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_internvl as tiny
import torch

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, MethodError, Needs, Reduction, Shape, Step

SAMPLES = (tiny.prompt(5, 7, (3,), 1), tiny.prompt(3, 4, (1, 4), 2), tiny.prompt(9, 3, (1,), 3))
TEXT = {"input_ids": torch.tensor([[1, 7, 8, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
KINDS = ["qwen2", "llama", "phi3"]
CORE = ("random", "fastv", "pdrop", "uniform")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
NEW = 3


@functools.cache
def supported() -> list[str]:
    """Methods that run on this family."""
    adapter = adapter_for(tiny.shared())
    names = [name for name in methods.names() if adapter.supports(methods.build(name)) is None and name != "vanilla"]
    assert set(CORE) <= set(names)
    return names


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits of greedy decoding."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, dim=1)


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    asked: Any = None
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return self.asked

    def reduce(self, step: Step) -> Reduction | None:
        return self.see(step)


def observed(model: Any, inputs: dict[str, torch.Tensor], needs: dict[int, Needs], **options: Any) -> list[Step]:
    """The steps of a forward, or of generate when there are options."""
    seen: list[Step] = []
    with torch.no_grad(), pruned(model, Probe(needs, seen.append)):
        generate(model, inputs, **options) if options else model(**inputs)
    return seen


# The vision tower's view


def test_tokens_are_blocks_of_cells_in_the_models_order():
    model = tiny.shared()
    adapter = adapter_for(model)
    cells = torch.arange(2 * 16.0, dtype=torch.float64).reshape(2, 4, 4, 1)
    shuffled = model.model.pixel_shuffle(cells, 0.5).reshape(2, 4, 4)
    assert torch.equal(cells.reshape(2, 16)[:, adapter.members], shuffled)
    assert adapter.members.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]

    views = []

    def see(step: Step) -> None:
        views.append(step.vision)

    with torch.no_grad(), pruned(model, Probe({0: Needs(vision=(3,))}, see)):
        model(**tiny.prompt(3, 3, (2,)))
    assert torch.equal(views[0].to_tokens(cells.reshape(2, 16)), shuffled.mean(-1).reshape(-1))
    assert torch.equal(views[0].to_tokens([tile.reshape(16, 1) for tile in cells])[:, 0], shuffled.mean(-1).reshape(-1))
    assert torch.equal(views[0].blocks(cells[1].reshape(16, 1))[..., 0], shuffled[1])


@pytest.mark.parametrize("large_vision", [False, True], ids=["300M", "6B"])
def test_projected_blocks_are_the_prompts_visual_tokens(large_vision: bool):
    model = tiny.shared("llama", large_vision)
    seen = observed(model, tiny.batch(*SAMPLES), {0: Needs(vision=(3,))})
    assert adapter_for(model).shape.feature_layer == 3
    for step, sample in zip(seen, SAMPLES, strict=True):
        blocks = torch.cat([step.vision.blocks(hidden[1:]) for hidden in step.vision.hidden(3)])
        with torch.no_grad():
            mine = step.vision.project(blocks)
            features = model.model.get_image_features(sample["pixel_values"]).pooler_output
            assert torch.equal(step.vision.project(blocks.flatten(1)), mine)
        torch.testing.assert_close(mine, features.flatten(0, 1), **CLOSE)
        torch.testing.assert_close(mine, step.hidden[step.visual], **CLOSE)


def test_views_know_tiles_images_and_spans():
    steps = observed(tiny.shared(), tiny.batch(*SAMPLES), {0: Needs(vision=(3,))})
    assert [step.vision.images for step in steps] == [(3,), (1, 4), (1,)]
    assert [step.vision.tiles for step in steps] == [3, 5, 1]
    assert [step.spans for step in steps] == [((6, 18),), ((4, 8), (10, 26)), ((10, 14),)]
    assert all(step.vision.has_cls and step.vision.grid == (4, 4) for step in steps)
    assert [step.vision.grids for step in steps] == [((2, 2),) * tiles for tiles in (3, 5, 1)]
    assert [step.total for step in steps] == [12, 20, 4]


@pytest.mark.parametrize("large_vision", [False, True], ids=["300M", "6B"])
def test_tower_rows_equal_eager_attention(large_vision: bool):
    model, sample, found = tiny.shared("qwen2", large_vision, "eager"), SAMPLES[1], {}

    def see(step: Step) -> None:
        for layer in (1, 3):
            found[layer] = [one.rows([0, 5]) for one in step.vision.attention(layer)], step.vision.hidden(layer)

    with torch.no_grad():
        tower = model.model.vision_tower(sample["pixel_values"], output_attentions=True, output_hidden_states=True)
        with pruned(model, Probe({2: Needs(vision=(1, 3))}, see)):
            model(**sample)
    for layer, (rows, hidden) in found.items():
        torch.testing.assert_close(torch.stack(rows), tower.attentions[layer][:, :, [0, 5]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(hidden), tower.hidden_states[layer + 1])
    assert not torch.allclose(found[1][0][0], found[3][0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_equal_eager_attention(kind: str):
    """With longrope and dynamic rope, fused and separate projections."""
    model, sample, found = tiny.shared(kind, kernel="eager"), SAMPLES[0], {}

    def see(step: Step) -> None:
        found["seen"], found["next"] = step.seen[1].rows(range(len(step.origin))), step.next.rows([-1])

    with torch.no_grad():
        plain = model(**sample, output_attentions=True).attentions
        with pruned(model, Probe({2: Needs(attention=(1,), next=True)}, see)):
            model(**sample)
    torch.testing.assert_close(found["seen"], plain[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["next"], plain[2][0][:, -1:], rtol=1e-5, atol=1e-5)


def test_beams_see_the_sample_they_belong_to():
    batch = tiny.batch(*SAMPLES)
    plain = observed(tiny.shared(), batch, {0: Needs(vision=(3,))})
    beams = observed(tiny.shared(), batch, {0: Needs(vision=(3,))}, num_beams=2, max_new_tokens=1)
    assert len(beams) == 6
    for row, step in enumerate(beams):
        mine = plain[row // 2]
        assert step.vision.images == mine.vision.images
        assert all(torch.equal(*pair) for pair in zip(step.vision.hidden(3), mine.vision.hidden(3), strict=True))


# Every method


@pytest.mark.parametrize("name", supported())
@pytest.mark.parametrize("kind", KINDS)
def test_methods_on_every_language_model(kind: str, name: str):
    """No-op at keep = 1, ragged batch as single prompts, text untouched, schedule observed, cache as the trace says."""
    model, batch = tiny.shared(kind), tiny.batch(*SAMPLES, TEXT)
    plain = generate(model, batch)
    with pruned(model, methods.build(name, {"keep": 1})):
        assert torch.equal(generate(model, batch), plain)
    with pruned(model, methods.build(name, {"keep": 0.4})) as session:
        singles = []
        for key, sample in enumerate((*SAMPLES, TEXT)):
            session.sample_keys = [str(key)]
            singles.append(generate(model, sample))
            total = int((sample["input_ids"] == tiny.IMAGE).sum())
            with contextlib.suppress(MethodError):  # a schedule that depends on the sample
                assert not total or session.trace.budget(0).per_layer == session.method.schedule(session.shape, total)
        session.sample_keys = ["0", "1", "2", "3"]
        together = generate(model, batch)
        visual = [session.trace.budget(row).visual for row in range(4)]
    assert visual == [12, 20, 4, 0]
    torch.testing.assert_close(together, torch.cat(singles), **CLOSE)
    torch.testing.assert_close(singles[3], plain[3:], **CLOSE)
    assert not torch.allclose(together[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("name", supported())
def test_beams_of_a_batch_answer_like_single_prompts(name: str):
    model, batch = tiny.shared("llama"), tiny.batch(*SAMPLES)
    search = {"num_beams": 2, "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**batch, **search)
    with pruned(model, methods.build(name, {"keep": 1})):
        assert torch.equal(model.generate(**batch, **search), plain)
    with pruned(model, methods.build(name, {"keep": 0.4})) as session:
        session.sample_keys = ["0", "1", "2"]
        together = model.generate(**batch, **search)[:, -NEW:]
        for key, sample in enumerate(SAMPLES):
            session.sample_keys = [str(key)]
            assert torch.equal(model.generate(**sample, **search)[0, -NEW:], together[key])


@pytest.mark.parametrize("name", supported())
def test_forward_and_generate_agree(name: str):
    model, batch = tiny.shared("phi3"), tiny.batch(*SAMPLES)
    with torch.no_grad(), pruned(model, methods.build(name, {"keep": 0.4})) as session:
        session.sample_keys = ["0", "1", "2"]
        direct = model(**batch).logits[:, -1]
        session.sample_keys = ["0", "1", "2"]
        torch.testing.assert_close(generate(model, batch)[:, 0].to(direct), direct, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_dropping_equals_masking(kind: str):
    model, sample = tiny.shared(kind), SAMPLES[1]
    length = sample["input_ids"].shape[1]
    with torch.no_grad():
        with pruned(model, methods.build("fastv", {"layer": 2, "keep": 0.3})) as session:
            dropped = model(**sample).logits[:, -1]
        kept = torch.zeros(length, dtype=torch.bool)
        kept[session.trace.entering(2).samples[0].origin] = True
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & kept
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k: (a, k | {"attention_mask": mask}), with_kwargs=True)
            for layer in model.model.language_model.layers[2:]
        ]
        masked = model(**sample).logits[:, -1]
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(dropped, masked, **CLOSE)


def test_a_family_without_support_says_why():
    adapter = adapter_for(tiny.shared())
    assert "layer must be between 0 and 3" in adapter.supports(methods.build("fastv", {"layer": 4}))
    for name in set(methods.names()) - set(supported()) - {"vanilla"}:
        assert name in adapter.supports(methods.build(name))
