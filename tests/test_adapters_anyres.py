"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: tokens and tiles, and methods on images, groups and videos."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny_anyres as tiny
import torch
from transformers import LlavaNextConfig, LlavaOnevisionConfig

from pruneval import methods
from pruneval.harness.adapters import Encoding, adapter_for
from pruneval.harness.adapters.llava_next import LlavaNext
from pruneval.harness.adapters.llava_onevision import LlavaOnevision
from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step
from pruneval.methods.salience import spread

NEW = 4
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


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits, which must be numbers."""
    logits = torch.stack(out.logits, dim=1)
    assert logits.isfinite().all()
    return logits


def placeholders(ids: torch.Tensor) -> list[int]:
    """Visual tokens of each prompt."""
    tokens = tiny.tokenizer()
    return ((ids == tokens.image_token_id) | (ids == tokens.video_token_id)).sum(1).tolist()


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def reduce(self, step: Step) -> Reduction | None:
        return self.see(step)


def observed(family: str, inputs: dict[str, Any], **options: Any) -> list[Step]:
    """The steps of a forward, or of generate when there are options."""
    seen: list[Step] = []
    model = tiny.model(family)
    with torch.no_grad(), pruned(model, Probe(seen.append)):
        generate(model, inputs, **options) if options else model(**inputs)
    return seen


def one(family: str, *images: Any, videos: tuple[Any, ...] = (), nested: bool = True) -> Step:
    """The only step of a prompt with these images and videos side by side."""
    text = "a" + "<image>" * len(images) + "<video>" * len(videos) + "b"
    (step,) = observed(family, tiny.inputs(family, (text, list(images), list(videos)), nested=nested))
    return step


# Counts and the way from cells to tokens


COUNTS = {
    "llava_next": {(56, 56): 36, (80, 107): 70, (180, 320): 52, (20, 200): 42},
    "llava_onevision": {(42, 42): 21, (60, 80): 37, (120, 210): 81, (250, 250): 99},
    "llava_next_video": {(80, 107): 70},
}
OTHERS = [(100, 40), (333, 90), (43, 255), (199, 200)]
SIZES = [(family, size) for family, sizes in COUNTS.items() for size in [*sizes, *OTHERS]]


def packed(model: Any, cells: torch.Tensor, size: tuple[int, int], fill: float) -> torch.Tensor:
    """(tiles, P, k) cells of an image through the model's own packing, with `fill` as newline: (N, k)."""
    newline = torch.full((cells.shape[-1],), fill, dtype=cells.dtype)
    extra = {} if model.config.model_type == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    made, _ = model.model.pack_image_features([cells], torch.tensor([size]), image_newline=newline, **extra)
    return made[0]


@pytest.mark.parametrize(("family", "size"), SIZES, ids=str)
def test_cells_become_tokens_as_the_model_packs_features(family, size):
    model, step = tiny.model(family), one(family, tiny.picture(*size))
    view = step.vision
    assert step.total == COUNTS[family].get(size, step.total) and view.images == (view.tiles,)
    side = view.grid[0]
    cells = torch.randn(view.tiles, side * side, 3, dtype=torch.float64)
    theirs = packed(model, cells, size, -7.0)
    assert len(theirs) == step.total
    torch.testing.assert_close(view.to_tokens(cells, -7.0), theirs, rtol=0, atol=1e-12)
    expected = theirs[:, 1].where(~view.is_newline(), float("nan"))
    torch.testing.assert_close(view.to_tokens(cells[..., 1]), expected, rtol=0, atol=1e-12, equal_nan=True)

    # tile and cell of each token: exact where tokens are cells, the one below the middle where they are resampled
    number = torch.arange(view.tiles * side * side, dtype=torch.float64).reshape(view.tiles, -1, 1)
    mine, tile, cell = packed(model, number, size, -1.0)[:, 0], view.tile_of(), view.cell_of()
    assert torch.equal(view.is_newline(), mine == -1)
    ours = torch.where(tile < 0, -1, tile * side * side + cell)
    back = view.token_of()
    if family == "llava_onevision" and size in ((120, 210), (250, 250), (199, 200)):
        assert torch.equal(ours[: side * side], mine[: side * side].long()) and bool((back[1:] == -1).all())
    else:
        assert torch.equal(ours, mine.long())
        assert torch.equal(back[tile[tile >= 0], cell[tile >= 0]], (tile >= 0).nonzero().squeeze(-1))
        assert int((back >= 0).sum()) == int((tile >= 0).sum())


def test_resampled_tokens_name_the_tile_they_lie_in():
    """Where all cells that a token is made of are of one tile, it is the one that is named."""
    view = one("llava_onevision", LARGE).vision
    flags = torch.eye(view.tiles, dtype=torch.float64)[:, None].expand(-1, 9, -1)
    share = view.to_tokens(flags, 0.0)
    sure = share.amax(1) == 1
    assert int(sure.sum()) > 40 and torch.equal(share.argmax(1)[sure], view.tile_of()[sure])
    named = share.gather(1, view.tile_of().clamp(min=0)[:, None])[:, 0][~view.is_newline()]
    assert bool((named >= 0.25 - 1e-9).all())


def test_places_in_sheets():
    view = one("llava_onevision", SMALL).vision  # 4 x 6 cells of 2 x 2 tiles are left of 6 x 6
    place, sheet, newline = view.place_of(), view.sheet_of(), view.is_newline()
    assert sheet.tolist() == [0] * 9 + [1] * 28
    assert place[:9].tolist() == [[r, c] for r in range(3) for c in range(3)]
    assert place[9:].tolist() == [[r, c] for r in range(4) for c in range(7)]
    assert newline.nonzero().squeeze(-1).tolist() == [15, 22, 29, 36]
    assert view.tile_of()[9:16].tolist() == [1, 1, 1, 2, 2, 2, -1]
    assert view.cell_of()[9:16].tolist() == [3, 4, 5, 3, 4, 5, -1]

    group = one("llava_onevision", SMALL, LARGE).vision
    assert group.images == (1, 1) and group.sheet_of().tolist() == [0] * 10 + [1] * 10
    assert group.is_newline().nonzero().squeeze(-1).tolist() == [9, 19] and group.place_of()[9].tolist() == [3, 0]

    flat = one("llava_onevision", SMALL, tiny.picture(42, 42), nested=False)
    assert flat.vision.images == (5, 2) and flat.total == 58 and flat.spans == ((1, 38), (38, 59))


@pytest.mark.parametrize(("family", "total"), [("llava_onevision", 33), ("llava_next_video", 32)])
def test_frames_are_pooled_as_the_model_pools(family, total):
    model, step = tiny.model(family), one(family, videos=(tiny.clip(8),))
    view, width = step.vision, model.config.vision_config.hidden_size
    assert step.total == total and view.images == (8,)
    cells = torch.randn(8, view.grid[0] ** 2, width, dtype=torch.float64)
    if family == "llava_onevision":
        pooled = model.model.apply_pooling(cells).flatten(0, 1)
        pooled = torch.cat([pooled, torch.full((1, width), -7.0)])
    else:
        pooled = model.model.vision_resampler(cells).flatten(0, 1)
    torch.testing.assert_close(view.to_tokens(cells, -7.0), pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(view.to_tokens(cells[..., 0], -7.0), pooled[:, 0], rtol=0, atol=1e-12)
    frames = [frame for frame in range(8) for _ in range(4)]
    assert view.tile_of().tolist() == frames + [-1] * (total - 32) and view.sheet_of()[:32].tolist() == frames
    assert view.grids == ((2, 2),) * 8 and bool((view.token_of() == -1).all())


REAL = {
    LlavaNext: {
        (336, 336): 1176, (480, 640): 2340, (1080, 1920): 1948, (899, 1024): 2634, (640, 480): 2352, (100, 1000): 1160,
        (672, 672): 2928,
    },
    LlavaOnevision: {
        (384, 384): 1485, (480, 640): 2929, (899, 1024): 6551, (1080, 1920): 7269, (2304, 2304): 7371,
        (100, 1000): 1467,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
def test_counts_of_the_released_models(family):
    """What the processors of the released sizes make of images and clips."""
    config = LlavaNextConfig() if family is LlavaNext else LlavaOnevisionConfig()
    adapter, run = family(SimpleNamespace(config=config)), Encoding("image", {}, (), {}, {})
    found = {size: sum(s.tokens for s in adapter.image(torch.tensor(size), True, run)) for size in REAL[family]}
    assert found == REAL[family]
    if family is LlavaOnevision:
        assert sum(sheet.tokens for sheet in adapter.image(torch.tensor((480, 640)), False, run)) == 730
        assert [sum(sheet.tokens for sheet in adapter.video(frames)) for frames in (1, 8, 32)] == [197, 1569, 6273]


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
