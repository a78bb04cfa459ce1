"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: tokens and tiles, and methods on images, groups and videos."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_anyres as tiny
import torch
from steps_anyres import NEW, generate, observed, one

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.session import pruned
from pruneval.methods.salience import spread

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
METHODS = {"random": {}, "fastv": {"layer": 2}, "pdrop": {}, "visionzip": {}}
SMALL, LARGE, WIDE, TALL = tiny.picture(60, 80), tiny.picture(250, 250), tiny.picture(20, 200), tiny.picture(100, 40)
NEXT_SMALL, NEXT_WIDE = tiny.picture(80, 107), tiny.picture(180, 320)
TEXT = ("What do you see?", [], [])
SAMPLES = {
    "llava_next": [
        ("<image>hi", [NEXT_SMALL], []),
        ("a<image>and <image>?", [NEXT_WIDE, TALL], []),
        TEXT,
        ("what<image><image>", [WIDE, NEXT_SMALL], []),
    ],
    "llava_onevision": [
        ("<image>hi", [SMALL], []),
        ("a longer one <image> what is it", [LARGE], []),
        ("x<image><image>? two", [SMALL, tiny.picture(42, 42)], []),
        TEXT,
        ("see <video>ok", [], [tiny.clip(8)]),
        ("<image>tall", [TALL], []),
        ("<image>panorama here", [WIDE], []),
        ("q:<image>a", [tiny.picture(120, 210)], []),
    ],
    "llava_next_video": [
        ("<image>hi", [NEXT_SMALL], []),
        ("see <video><video>ok", [], [tiny.clip(4), tiny.clip(4, 1)]),
        TEXT,
        ("both<video>and<image>?", [NEXT_WIDE], [tiny.clip(4, 2)]),
    ],
}


@functools.cache
def batch(family: str) -> dict[str, Any]:
    """All samples of a family in one left-padded batch."""
    return tiny.inputs(family, *SAMPLES[family])


def steps(out: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits, which must be numbers."""
    logits = torch.stack(out.logits, dim=1)
    assert logits.isfinite().all()
    return logits


def placeholders(ids: torch.Tensor) -> list[int]:
    """Visual tokens of each prompt."""
    tokens = tiny.tokenizer()
    return ((ids == tokens.image_token_id) | (ids == tokens.video_token_id)).sum(1).tolist()


# The view


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tower_outputs_become_the_prompts_visual_tokens(family):
    """Projected, put together and pooled by the view, against what entered the language model."""
    newline = tiny.model(family).model.image_newline
    for step in observed(family, batch(family)):
        view, layer = step.vision, step.shape.feature_layer
        hidden = torch.stack([tile[int(view.has_cls) :] for tile in view.hidden(layer)])
        with torch.no_grad():
            if family == "llava_next_video":  # pooled before the projector
                mine = view.project(view.to_tokens(hidden, 0.0))
            else:
                mine = view.to_tokens(view.project(hidden), 0.0)
        mine = torch.where(view.is_newline()[:, None], newline.detach(), mine)
        torch.testing.assert_close(mine, step.hidden[step.visual], **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batches_and_beams_see_the_sample_they_belong_to(family):
    singles = [step for sample in SAMPLES[family] for step in observed(family, tiny.inputs(family, sample))]
    together, beams = observed(family, batch(family)), observed(family, batch(family), num_beams=3, max_new_tokens=1)
    assert len(together) == len(singles) == sum(bool(sample[1] or sample[2]) for sample in SAMPLES[family])
    tripled = [step for step in singles for _ in range(3)]
    for mine, same in [*zip(singles, together, strict=True), *zip(tripled, beams, strict=True)]:
        assert (mine.vision.images, mine.spans, mine.total) == (same.vision.images, same.spans, same.total)
        layer = mine.shape.feature_layer
        torch.testing.assert_close(mine.vision.hidden(layer), same.vision.hidden(layer))
        rows = [[tile.received() for tile in view.attention(layer)] for view in (mine.vision, same.vision)]
        torch.testing.assert_close(*rows)


def test_spans_tell_images_and_videos_side_by_side_apart():
    spans = {family: [step.spans for step in observed(family, batch(family))] for family in tiny.FAMILIES}
    assert spans["llava_next"][0] == ((0, 70),) and spans["llava_next"][2] == ((4, 46), (46, 116))
    assert spans["llava_onevision"][2] == ((1, 11), (11, 21)) and spans["llava_onevision"][3] == ((4, 37),)
    assert spans["llava_next_video"][1] == ((4, 20), (20, 36)) and spans["llava_next_video"][2] == ((4, 20), (23, 75))


# Methods


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_ragged_batch_answers_as_single_prompts(family, name):
    """Images of several sizes, groups, videos and text; keep = 1 is a no-op; the cache is what the trace says."""
    model, samples, inputs = tiny.model(family), SAMPLES[family], batch(family)
    keys = [str(key) for key in range(len(samples))]
    plain = steps(generate(model, inputs))
    with torch.no_grad():
        direct = model(**inputs).logits
        with pruned(model, methods.build(name, {"keep": 1} | METHODS[name])):
            assert torch.equal(steps(generate(model, inputs)), plain)
            assert torch.equal(model(**inputs).logits, direct)
    with pruned(model, methods.build(name, {"keep": 0.4} | METHODS[name])) as session:
        session.sample_keys = keys
        out = generate(model, inputs)
        together, trace = steps(out), session.trace
        lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        assert lengths == [trace.entering(layer).width + NEW - 1 for layer in range(4)]
        assert [trace.budget(row).visual for row in range(len(samples))] == placeholders(inputs["input_ids"])
        for row, sample in enumerate(samples):
            session.sample_keys = [keys[row]]
            single = steps(generate(model, tiny.inputs(family, sample)))
            torch.testing.assert_close(together[row], single[0], **CLOSE)
            assert torch.equal(together[row].argmax(-1), single[0].argmax(-1))
            assert session.trace.budget(0).per_layer == trace.budget(row).per_layer
            if sample is TEXT:
                torch.testing.assert_close(single[0], plain[row], **CLOSE)
            else:
                assert not torch.allclose(single[0], plain[row], atol=1e-3)
        with torch.no_grad():
            session.sample_keys = keys
            torch.testing.assert_close(model(**inputs).logits[:, -1].float(), together[:, 0], **CLOSE)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_vanilla_changes_nothing(family):
    model, inputs = tiny.model(family), batch(family)
    plain = generate(model, inputs)
    with pruned(model, methods.build("vanilla")) as session:
        out = generate(model, inputs)
    assert torch.equal(steps(out), steps(plain))
    assert session.trace.budget(0).per_layer == [placeholders(inputs["input_ids"])[0]] * 4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_beams_answer_as_single_prompts(family):
    model, search = tiny.model(family), {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    samples = SAMPLES[family]
    keys = [str(key) for key in range(len(samples))]
    for name in ("fastv", "visionzip"):
        with pruned(model, methods.build(name, {"keep": 0.4} | METHODS[name])) as session:
            session.sample_keys = keys
            together = model.generate(**batch(family), **search)[:, -NEW:]
            for row, sample in enumerate(samples):
                session.sample_keys = [keys[row]]
                assert torch.equal(model.generate(**tiny.inputs(family, sample), **search)[0, -NEW:], together[row])


# VisionZip on sheets


def test_shares_of_the_budget():
    assert spread(640, [576] * 5, least=2) == [128] * 5
    assert spread(10, [9, 9, 2], least=2) == [5, 4, 2]  # 4.5, 4.5, 1: the first remainder wins; at least two
    assert spread(20, [9, 9, 2], least=2) == [9, 9, 2]
    assert spread(9, [0, 30, 60], least=2) == [0, 3, 6]


def test_visionzip_spreads_over_tiles_and_drops_newlines():
    model = tiny.model("llava_next")
    inputs = tiny.inputs("llava_next", ("ab<image>cd", [NEXT_SMALL], []))
    view = one("llava_next", NEXT_SMALL).vision
    with torch.no_grad(), pruned(model, methods.build("visionzip", {"keep": 0.5})) as session:
        model(**inputs)
    (tokens,) = session.trace.entering(0).samples
    assert session.trace.budget(0).per_layer == [35] * 4
    assert torch.equal(tokens.position, torch.arange(len(tokens)))
    assert tokens.visual.tolist() == [False] * 2 + [True] * 35 + [False] * 2
    kept = tokens.origin[tokens.visual]
    added = kept >= inputs["input_ids"].shape[1]
    assert int(added.sum()) == 5 and int((tokens.made & ~tokens.visual).sum()) == 0  # a CLS token per tile
    own = kept[~added] - 2
    assert not bool(view.is_newline()[own].any()) and len(own.unique()) == 30
    sheet = view.sheet_of()[own]
    assert torch.equal(sheet, sheet.sort().values)
    crops, made = own[sheet == 1], tokens.made[tokens.visual][~added][sheet == 1]
    assert torch.equal(crops[~made], crops[~made].sort().values)  # dominant ones in raster order, over all crops
    assert made.tolist() == sorted(made.tolist())  # contextual ones last


def test_shapes_and_what_does_not_fit_them():
    for family in tiny.FAMILIES:
        adapter = adapter_for(tiny.model(family))
        assert adapter.supports(methods.build("visionzip")) is None
        assert adapter.shape.has_cls == (family != "llava_onevision") and adapter.shape.sheets
        assert adapter.shape.feature_layer == (3 if family == "llava_onevision" else 2)
        assert "layer must be" in adapter.supports(methods.build("fastv", {"layer": 9}))
