"""VFlowOpt: the map of importance, rates and budgets, what is gathered, and what stays where."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness import measure
from pruneval.harness.flops import lengths_of
from pruneval.harness.scoring import scoring
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.budget import solve
from pruneval.methods.importance import entropy
from pruneval.methods.recycle import filling
from pruneval.methods.vflowopt import RELEASED, last_rate, left, mean_rate

LASTING = (9, 9, 10)
MAP = [[0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]


def tile(full, grid):
    """A sample of one tile without CLS whose attention map is given, (P, P)."""
    attention = Rows(torch.as_tensor(full, dtype=torch.float64)[None])
    attention.key = torch.zeros(1, len(full), 1)
    view = SimpleNamespace(
        attention=lambda layer: [attention],
        grids=(grid,),
        to_tokens=lambda cells, fill: torch.cat(list(cells)),
    )
    plain = dataclasses.replace(shape(28), has_cls=False, feature_layer=25)
    return step(0, len(full), 1, vision=view, shape=plain)


def alike(importance, grid):
    """A tile in which every row of attention is the same, so it is the importance."""
    row = torch.tensor(importance, dtype=torch.float64)
    return tile(row.expand(len(row), -1), grid)


@pytest.mark.parametrize("budget, mean", [("50%", 0.5008), ("25%", 0.2507), ("10%", 0.1000)])
def test_released_rates(budget, mean):
    rates = RELEASED[budget][:3]
    assert mean_rate(rates, LASTING) == pytest.approx(mean, abs=5e-5)
    method = methods.build("vflowopt", methods.method_class("vflowopt").presets[f"llava-ov-7b@{budget}"])
    assert method.keep == pytest.approx(mean, abs=5e-5) and method.variant == "code"
    assert method.stages(shape(28)) == pytest.approx(dict(zip((0, 9, 18), rates, strict=True)))


def test_the_last_rate_follows_from_the_budget():
    assert last_rate(0.25, 0.3, 0.8, LASTING) == pytest.approx(0.8917, abs=5e-5)
    assert mean_rate((0.3, 0.8, last_rate(0.25, 0.3, 0.8, LASTING)), LASTING) == pytest.approx(0.25)
    assert last_rate(0.9, 0.3, 0.8, LASTING) == 1
    assert list(methods.build("vflowopt").stages(shape(32))) == [0, 10, 20]


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.8, 0.83, 0.9, 0.99, 1])
@pytest.mark.parametrize("layers", [3, 4, 28, 32])
def test_automatic_rates_meet_the_budget(keep, layers):
    stages = methods.build("vflowopt", {"keep": keep}).stages(shape(layers))
    lasting = (layers // 3, layers // 3, layers - 2 * (layers // 3))
    assert mean_rate(stages.values(), lasting) == pytest.approx(keep)
    assert all(0 < rate <= 1 for rate in stages.values())


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_importance_is_attention_from_trusted_cells(variant):
    """Received .1625, .5125, .1875, .1375; more than 1.5 times the mean is the second only."""
    method = methods.build("vflowopt", {"trust": 1.5, "variant": variant})
    assert method.score(tile(MAP, (2, 2))).tolist() == pytest.approx([0.2, 0.5, 0.2, 0.1])


def test_several_trusted_cells_are_summed_or_averaged():
    """Above .7 of the mean are the second and the third (.1875 > .175)."""
    both = torch.tensor(MAP[1]) + torch.tensor(MAP[2])
    for variant, factor in (("paper", 1), ("code", 0.5)):
        found = methods.build("vflowopt", {"trust": 0.7, "variant": variant}).score(tile(MAP, (2, 2)))
        assert found.tolist() == pytest.approx((both * factor).tolist())


def test_without_trusted_cells_it_is_what_is_received():
    found = methods.build("vflowopt", {"trust": 30}).score(tile(MAP, (2, 2)))
    assert found.tolist() == pytest.approx([0.1625, 0.5125, 0.1875, 0.1375])


def test_cls_is_left_out():
    """A CLS token that everybody looks at, in row and column 0."""
    with_cls = torch.full((5, 5), 0.9, dtype=torch.float64)
    with_cls[1:, 1:] = torch.tensor(MAP)
    one = tile(with_cls, (2, 2))
    one.shape = dataclasses.replace(one.shape, has_cls=True)
    found = methods.build("vflowopt", {"trust": 1.5}).score(one)
    assert found.tolist() == pytest.approx([0.2, 0.5, 0.2, 0.1])


def test_a_square_becomes_its_weighted_mean_in_the_best_place():
    """Tokens 2 and 5 with importance 1 and 3 become (2 + 3 * 5) / 4, where the 5 was; stages keep its importance."""
    one = alike([9.0, 3.0, 1.0, 8.0], (1, 4))
    one.hidden = torch.tensor([[0.0], [5.0], [2.0], [7.0], [1.0]], dtype=torch.float64)
    found = methods.build("vflowopt", {"keep": 0.5, "side": 9, "rates": "0.5,1", "recycle": "about"}).reduce(one)
    assert found.keep.tolist() == [0, 1, 3, 4]
    assert found.slots.tolist() == [1] and found.values.tolist() == [[4.25]] and found.added is None
    assert one.memory["importance"].tolist() == [9, 3, 1, 8, 0]


@pytest.mark.parametrize("recycle", ["about", "exact", "none"])
@pytest.mark.parametrize("side", [1.5, 3.3, 15.581])
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_counts(rate, side, recycle):
    """About: n - p - m + G. Exact and none: n - p; exact gathers nothing in more squares than tokens may stay."""
    score = torch.rand(144, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = alike(score.tolist(), (12, 12))
    params = {"keep": rate * 0.8, "rates": f"{rate},0.9", "side": side, "recycle": recycle}
    found = methods.build("vflowopt", params).reduce(one)
    drop, square = round(144 * (1 - rate)), [(int(i // 12 / side), int(i % 12 / side)) for i in range(144)]
    expected = 144 - drop
    if recycle == "about":
        low = score.argsort()[: drop + int(144 / side**2)].tolist()
        expected = 144 - len(low) + len({square[i] for i in low})
    assert len(found.keep) - 1 == expected and len(found.keep.unique()) == len(found.keep)
    assert (found.slots is None) == (recycle == "none" or (recycle == "exact" and len(set(square)) > 144 - drop))


def test_exact_is_the_first_number_that_fits():
    square = torch.tensor([0, 1, 0, 1, 2, 2])  # the worst are last
    assert filling(square, 2) == 3  # with 0, 1 and 1 they fill three
    assert filling(torch.tensor([0, 1, 2]), 3) is None and filling(square, 0) == 0
    assert [left(10, rate) for rate in (0.5, 0.74, 1, 0.001)] == [5, 7, 10, 1]


def test_exact_budgets_can_be_solved():
    found = solve("vflowopt", {"recycle": "exact"}, shape(32), 576, "avg_in", 128)
    plan = methods.build("vflowopt", found).schedule(shape(32), 576)
    assert sum(plan) / 32 == pytest.approx(128, abs=0.5) and plan[0] > plan[10] > plan[20]
    with pytest.raises(MethodError, match="depends on the sample"):
        methods.build("vflowopt").schedule(shape(32), 576)


def kept(params, sample, family):
    """The trace, and the step before the language model."""
    seen, kind = [], methods.method_class("vflowopt")
    spy = type("Spy", (kind,), {"reduce": lambda self, one: seen.append(one) or kind.reduce(self, one)})
    with torch.no_grad(), pruned(tiny(family), spy(**params)) as session:
        tiny(family)(**sample)
    return session.trace, seen[0]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "video_llava"])
def test_exact_schedule_is_observed(family):
    trace, _ = kept({"keep": 0.5, "side": 2.5, "recycle": "exact"}, subject(family).samples[0], family)
    budget = trace.budget(0)
    method = methods.build("vflowopt", {"keep": 0.5, "side": 2.5, "recycle": "exact"})
    assert budget.per_layer == method.schedule(shape(4), budget.visual)
    assert bool(trace.entering(0).samples[0].made.any())


def test_newlines_outlast_the_first_stage():
    """They have importance 1, more than any cell, as long as there are cells enough to drop."""
    trace, one = kept({"keep": 0.5, "variant": "code"}, subject("llava_next").samples[0], "llava_next")
    newline = one.visual[one.vision.is_newline()]
    assert len(newline) and bool(torch.isin(newline, trace.entering(0).samples[0].origin).all())
    assert bool((one.memory["importance"][newline] == 1).all())


def test_several_images_keep_their_shares_and_nothing_is_gathered():
    trace, one = kept({"keep": 0.5}, subject("llava").samples[1], "llava")
    tokens, prompt = trace.entering(0).samples[0], trace.prompt.samples[0]
    rate = methods.build("vflowopt", {"keep": 0.5}).stages(shape(4))[0]
    assert len(one.spans) == 2 and not bool(tokens.made.any())
    for start, stop in one.spans:
        inside = (tokens.origin >= start) & (tokens.origin < stop)
        assert int(inside.sum()) == left(stop - start, rate)
    assert torch.equal(tokens.origin, tokens.origin.sort().values) and int(prompt.visual.sum()) == 32


def test_a_video_is_one_whole():
    trace, one = kept({"keep": 0.5}, subject("llava_onevision").samples[2], "llava_onevision")
    rate = methods.build("vflowopt", {"keep": 0.5}).stages(shape(4))[0]
    tokens = trace.entering(0).samples[0]
    assert len(one.clips) == 1 and int(tokens.visual.sum()) == left(one.total, rate)
    best = one.memory["importance"][one.visual].sort(descending=True).values[: left(one.total, rate)]
    assert torch.equal(one.memory["importance"][tokens.origin[tokens.visual]].sort(descending=True).values, best)


def test_positions_of_the_variants():
    sample = subject("llava").samples[0]
    position = {
        (variant, layer): kept({"keep": 0.3, "variant": variant}, sample, "llava")[0].entering(layer).samples[0]
        for variant in ("paper", "code")
        for layer in (0, 2)
    }
    for layer in (0, 2):
        tokens = position["paper", layer]
        assert torch.equal(tokens.position, tokens.origin)
    first, later = position["code", 0], position["code", 2]
    assert first.position.tolist() == list(range(len(first))) and len(later) < len(first)
    assert torch.equal(later.position, first.position[torch.isin(first.origin, later.origin)])


@pytest.mark.parametrize(
    "params, message",
    [
        ({"recycle": "all"}, "recycle must be about, exact or none, not 'all'"),
        ({"variant": "mine"}, "variant must be paper or code, not 'mine'"),
        ({"variant": "code", "position_mode": "compact"}, "variant=code has positions of its own"),
        ({"side": 0.5}, "trust must not be negative, and side at least 1"),
        ({"rates": "0.5"}, "rates must be auto or two fractions like 0.5,0.75, not '0.5'"),
        ({"rates": "0.5,1.5"}, "rates must be auto or two fractions"),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises(MethodError, match=message):
        methods.build("vflowopt", params)


def test_rates_that_leave_too_much():
    with pytest.raises(MethodError, match=r"with rates=0\.9,0\.9 more than keep=0\.1 stays"):
        methods.build("vflowopt", {"keep": 0.1, "rates": "0.9,0.9"}).needs(shape(28))


def test_entropy_of_grey_values():
    flat, noisy = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    noisy[:, 0, 0], noisy[:, 0, 1] = 1.0, 0.5  # the first patch has three values: 2 of 4, 1, 1
    assert entropy(flat, 4).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(entropy(noisy, 4), torch.tensor([1.5, 0, 0, 0]))


def test_entropy_of_bytes_that_wrap():
    """A half of black (-1 becomes -255, which is byte 1) and of the grey whose byte is 1 too (1/255) is one level."""
    pixels = torch.zeros(3, 2, 2)
    pixels[:, 0] = (1 / 255 + 1) / 2 + 1e-4
    assert entropy(pixels, 1).tolist() == [1] and entropy(pixels, 1, wrapped=True).tolist() == [0]
    pixels[0, 0] = 1.0  # red is 255, which makes the mean 86
    assert entropy(pixels, 1, wrapped=True).tolist() == [1]


def test_alpha_prefers_cells_with_detail():
    """With equal attention everywhere the entropy of a cell's pixels decides."""
    flat = tile(torch.full((4, 4), 0.25), (2, 2))
    pixels = torch.zeros(3, 4, 4)
    pixels[:, 2:, 2:] = torch.tensor([[0.1, 0.9], [0.4, 0.7]])
    flat.vision.pixels = lambda: [pixels]
    score = methods.build("vflowopt", {"alpha": 1.0}).score(flat)
    assert score.argmax() == 3 and score[0] == score[1] == score[2]
    assert methods.build("vflowopt").score(flat).unique().numel() == 1


def test_pixels_are_those_of_the_image():
    """Read back from what the tower got, tile by tile, without the processor's normalisation."""
    from PIL import Image

    from pruneval.harness import models

    loaded = models.load("pocket-llava", "cpu", "float32", None)
    image = Image.fromarray(torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8).numpy())
    seen = []

    class Looks(type(methods.build("vflowopt"))):
        def score(self, step):
            seen.extend(step.vision.pixels())
            return super().score(step)

    inputs = loaded.processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    with torch.no_grad(), pruned(loaded.model, Looks(alpha=0.5), adapter=loaded.adapter):
        loaded.model(**inputs)
    expected = torch.tensor(list(image.get_flattened_data())).reshape(96, 96, 3).movedim(-1, 0) / 255
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=0)


def test_pixels_need_a_tower_that_takes_tiles():
    from pruneval.harness.adapters import adapter_for

    reason = adapter_for(tiny("qwen2_5_vl")).supports(methods.build("vflowopt", {"alpha": 0.5}))
    assert "patches of any grid" in reason


def test_gathering_on_sheets_is_what_loops_find():
    """Base grid and crop grid apart, newlines as the crops' last column; every square's mean in its best place."""
    params = {"keep": 0.5, "rates": "0.45,0.9", "side": 2.3}
    trace, one = kept(params, subject("llava_next").samples[0], "llava_next")
    score, side = one.memory["importance"][one.visual].tolist(), 2.3
    n, (sheet, place) = one.total, (one.vision.sheet_of().tolist(), one.vision.place_of().tolist())
    drop = round(n * 0.55)
    low = sorted(range(n), key=lambda token: (score[token], -token))[: drop + int(n / side**2)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for token in low:
        row, column = place[token]
        groups.setdefault((sheet[token], int(row // side), int(column // side)), []).append(token)
    expected = {token: None for token in range(n) if token not in low}
    for members in groups.values():
        best = max(members, key=lambda token: (score[token], -token))
        weight = torch.tensor([score[token] for token in members])[:, None].to(one.hidden)
        expected[best] = (weight * one.hidden[one.visual[members]]).sum(0) / weight.sum()
    tokens = trace.entering(0).samples[0]
    assert tokens.origin[tokens.visual].tolist() == one.visual[sorted(expected)].tolist()
    found = methods.build("vflowopt", params).reduce(one)
    hidden = one.hidden[found.keep]
    hidden[found.slots] = found.values
    for token, mean in expected.items():
        place_now = (found.keep == one.visual[token]).nonzero().item()
        torch.testing.assert_close(hidden[place_now], one.hidden[one.visual[token]] if mean is None else mean)
    assert len({sheet[token] for token in low}) == 2 and any(len(members) > 2 for members in groups.values())


def test_every_row_of_the_map_is_priced():
    """577 rows of 577 columns in LLaVA-1.5's tower, where FasterVLM reads one."""
    dimensions = measure.dimensions_for("llava-1.5-7b")
    lengths = lengths_of(dimensions)
    for name, rows in (("vflowopt", 577), ("fastervlm", 1)):
        (work,) = scoring(methods.build(name), dimensions, lengths)
        assert work.macs == 1024 * 577 * rows


def test_nothing_to_drop_is_nothing_to_do():
    """Two tokens of which nine tenths stay, and no square to fill."""
    method = methods.build("vflowopt", {"keep": 0.9, "rates": "0.95,0.95"})
    assert method.reduce(alike([0.6, 0.4], (1, 2))) is None
