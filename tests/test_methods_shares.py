"""G-Search and P-Sigmoid: shares per layer, their budgets, and the attention that ranks."""

from __future__ import annotations

import json

import pytest
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.psigmoid import budget_to_keep

TEN = "1,0.9,0.9,0.5,0.5,0.25,0.25,0.1,0.1,0"


def test_rates_hold_for_stride_layers():
    """Ten boundaries 2, 5, ..., 29; counts come from the original number and are at least one."""
    method = methods.build("gsearch", {"rates": TEN})
    counts = [518, 518, 288, 288, 144, 144, 58, 58, 1]
    expected = [576] * 5 + [count for count in counts for _ in range(3)]
    assert method.schedule(shape(), 576) == expected
    assert list(method.needs(shape())) == list(range(2, 32, 3))
    assert all(need.attention == (layer - 1,) for layer, need in method.needs(shape()).items())


def test_every_layer_may_have_a_rate():
    rates = ",".join(["0.5"] * 22)
    assert methods.build("gsearch", {"rates": rates, "stride": 1}).schedule(shape(24), 10) == [10, 10] + [5] * 22


def test_recipes_are_read_from_files(tmp_path):
    boundaries = range(2, 32, 3)
    rates = dict(zip(boundaries, map(float, TEN.split(",")), strict=True))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"model": "m", "layers": 32, "stride": 3, "lambda": 0.01, "rates": rates}))
    method, listed = methods.build("gsearch", {"recipe": path}), methods.build("gsearch", {"rates": TEN})
    assert method.schedule(shape(), 576) == listed.schedule(shape(), 576)
    with pytest.raises(MethodError, match="gsearch: the recipe is for 32 layers, this model has 24"):
        method.needs(shape(24))
    path.write_text(json.dumps({"layers": 32, "rates": {"2": 0.5, "9": 0.25}}))
    with pytest.raises(MethodError, match="gsearch: the recipe must rate 2, 5"):
        methods.build("gsearch", {"recipe": path}).needs(shape())
    path.write_text("{")
    with pytest.raises(MethodError, match="gsearch: can't read the recipe") as caught:
        methods.build("gsearch", {"recipe": path})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"rates": "0.5,0.6"}, "gsearch: rates must lie in"),
        ({"rates": "1.2"}, "gsearch: rates must lie in"),
        ({"rates": "half"}, "gsearch: rates must be numbers like"),
        ({"rates": "1", "recipe": "x.json"}, "gsearch: give rates or a recipe, not both"),
        ({"recipe": "nowhere.json"}, "gsearch: can't read the recipe nowhere.json"),
        ({"stride": 0}, "gsearch: stride must be at least 1"),
        ({"rates": "1", "rows": "all"}, "gsearch: rows must be last or mean_text"),
    ],
)
def test_wrong_rates_are_refused(params, message):
    with pytest.raises(MethodError, match=message):
        methods.build("gsearch", params)


def test_without_rates_it_says_what_is_needed():
    with pytest.raises(MethodError, match=r"gsearch: no searched rates .* \(10 numbers, for every 3 layers from 2\)"):
        methods.build("gsearch").needs(shape())
    with pytest.raises(MethodError, match="gsearch: 32 layers with stride 3 need 10 rates, not 2"):
        methods.build("gsearch", {"rates": "1,1"}).needs(shape())


def test_text_after_the_image_ranks_on_average_or_the_last_row_alone():
    full = torch.zeros(2, 7, 7, dtype=torch.float64)
    full[:, :, 1:5] = torch.tensor([0.9, 0.0, 0.0, 0.0])  # rows before the question may not count
    full[:, 5, 1:5] = torch.tensor([[0.0, 0.6, 0.0, 0.1], [0.0, 0.4, 0.0, 0.1]])
    full[:, 6, 1:5] = torch.tensor([[0.0, 0.0, 0.4, 0.2], [0.0, 0.0, 0.2, 0.2]])
    one = step(1, 4, 2, layer=2, layers=4, seen={1: Rows(full)})
    mean, last = ({"rates": "0.5", "rows": rows} for rows in ("mean_text", "last"))
    torch.testing.assert_close(methods.build("gsearch", mean).score(one).tolist(), [0.0, 0.25, 0.15, 0.15])
    assert methods.build("gsearch", mean).reduce(one).keep.tolist() == [0, 2, 3, 5, 6]
    assert methods.build("gsearch", last).reduce(one).keep.tolist() == [0, 3, 4, 5, 6]


def test_equal_counts_read_no_attention():
    """An empty mapping of seen layers would fail if it were asked."""
    method = methods.build("gsearch", {"rates": ",".join(["0.5"] * 10)})
    assert method.reduce(step(0, 4, 2, layer=5, total=8, seen={})) is None
    assert list(method.work(shape(), 8, 3)) == ["rows of layer 1"]
    assert method.work(shape(), 8, 3) == {"rows of layer 1": 3 * 4096 * 11}


def test_the_sigmoid_of_the_card():
    shares = methods.build("psigmoid", {"keep": 0.125, "slope": 0.2}).shares(shape())
    assert list(shares) == list(range(2, 32))
    assert shares[2] == pytest.approx(0.23696, abs=1e-5) and shares[31] == pytest.approx(0.01304, abs=1e-5)
    assert sum(shares.values()) == pytest.approx(3.75)


@pytest.mark.parametrize("slope", [0, 0.2, 1, 2, 100])
@pytest.mark.parametrize("keep", [0.05, 0.125, 0.5, 0.6, 0.9, 1])
def test_the_sum_is_kept_for_every_slope(keep, slope):
    """Also above one half, where the first shares are cut at 1; memory of b = 0.125 is 0.1797."""
    shares = list(methods.build("psigmoid", {"keep": keep, "slope": slope}).shares(shape()).values())
    assert sum(shares) == pytest.approx(30 * keep) and max(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    if keep == 0.125:
        assert (2 + sum(shares)) / 32 == pytest.approx(0.1797, abs=1e-4)


def test_plain_shares_and_all():
    assert methods.build("psigmoid", {"keep": 0.25, "slope": 0}).schedule(shape(), 576) == [576] * 2 + [144] * 30
    assert methods.build("psigmoid", {"keep": 1}).schedule(shape(), 576) == [576] * 32


@pytest.mark.parametrize("average, keep", [(192, 0.2889), (128, 0.1704), (64, 0.0519)])
def test_shares_of_token_budgets(average, keep):
    found = budget_to_keep(average, shape(), 576)
    assert found == pytest.approx(keep, abs=1e-4) and budget_to_keep(32, shape(), 576) < 0
    declared = methods.build("psigmoid", {"keep": found}).schedule(shape(), 576)
    assert sum(declared) / 32 == pytest.approx(average, abs=0.5)


def test_slopes_fall():
    with pytest.raises(MethodError, match="psigmoid: slope must be a number from 0, not -1"):
        methods.build("psigmoid", {"slope": -1})
