"""Budgets: the knob that meets one, and budgets that no knob meets."""

from __future__ import annotations

import pytest
from steps import shape

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.budget import solve


def declared(name: str, params: dict, n: int = 576, layers: int = 32) -> list[int]:
    return methods.build(name, params).schedule(shape(layers), n)


@pytest.mark.parametrize(
    "n, layer, target, count",
    [(576, 2, 192, 166), (576, 2, 128, 98), (576, 2, 64, 30), (576, 3, 192, 152), (576, 3, 128, 82), (576, 3, 64, 11),
     (2880, 2, 640, 491), (2880, 2, 320, 149), (2880, 3, 640, 408), (2880, 3, 320, 55)],
)  # fmt: skip
def test_fastv_at_equal_averages(n, layer, target, count):
    found = solve("fastv", {"layer": layer}, shape(), n, "avg_in", target)
    assert set(found) == {"layer", "keep"} and declared("fastv", found, n)[-1] == count


@pytest.mark.parametrize("n, target, floor", [(576, 32, "36.9375"), (2880, 160, "180.938")])
def test_full_layers_are_a_floor(n, target, floor):
    with pytest.raises(MethodError, match=f"fastv: avg_in of {target} can't be reached, .* above it \\({floor}\\)"):
        solve("fastv", {}, shape(), n, "avg_in", target)


@pytest.mark.parametrize("target, keep, counts", [(192, 0.56, (322, 180, 100)), (128, 0.42, (241, 101, 42)),
                                                 (64, 0.192, (110, 21, 4))])  # fmt: skip
def test_pyramids_with_earlier_stages(target, keep, counts):
    """The card's lambdas for stages 2, 8, 16, nearly: a count may be one token closer to the target."""
    found = solve("pdrop", {"layers": "2,8,16"}, shape(), 576, "avg_in", target)
    assert found["keep"] == pytest.approx(keep, abs=3e-3)
    plan = declared("pdrop", found)
    assert [plan[2], plan[8], plan[16]] == pytest.approx(counts, abs=1)
    assert abs(sum(plan) / 32 - target) <= abs(sum(declared("pdrop", {"layers": "2,8,16", "keep": keep})) / 32 - target)


@pytest.mark.parametrize("target, keep", [(192, 0.696), (128, 0.587), (64, 0.369)])
def test_pyramids_with_many_early_stages(target, keep):
    found = solve("pdrop", {"layers": "2,4,6,8"}, shape(), 576, "avg_in", target)
    assert found["keep"] == pytest.approx(keep, abs=3e-3)


def test_the_default_pyramid_has_a_floor_above_128():
    with pytest.raises(MethodError, match=r"pdrop: avg_in of 128 can't be reached, .* \(144.75\)"):
        solve("pdrop", {}, shape(), 576, "avg_in", 128)


@pytest.mark.parametrize("target, keep", [(192, 0.2889), (128, 0.1704), (64, 0.0519)])
def test_sigmoids(target, keep):
    found = solve("psigmoid", {"slope": 0.2}, shape(), 576, "avg_in", target)
    assert found["keep"] == pytest.approx(keep, abs=1e-3)
    assert sum(declared("psigmoid", found)) / 32 == pytest.approx(target, abs=0.5)


@pytest.mark.parametrize("currency", ["kept_after", "final"])
def test_what_is_left_at_the_end(currency):
    for count in (192, 128, 64, 1, 576):
        found = solve("fastv", {}, shape(), 576, currency, count)
        assert declared("fastv", found)[-1] == count
    assert declared("dart", solve("dart", {}, shape(), 576, currency, 128))[-1] in (124, 132)


def test_methods_before_the_model_meet_every_currency():
    for count in (192, 128, 64):
        for currency in ("avg_in", "kept_after", "final"):
            assert declared("visionzip", solve("visionzip", {}, shape(), 576, currency, count)) == [count] * 32


def test_coarse_methods_meet_what_they_can():
    """Withdrawal moves in steps of 18 tokens; it can't leave some."""
    assert declared("vtw", solve("vtw", {}, shape(), 576, "avg_in", 192)) == [576] * 11 + [0] * 21
    with pytest.raises(MethodError, match="vtw: kept_after of 64 can't be reached, the nearest setting gives 0"):
        solve("vtw", {}, shape(), 576, "kept_after", 64)


def test_recipes_end_somewhere():
    for target in (192, 128):
        found = solve("fitprune", {}, shape(), 576, "avg_in", target)
        assert sum(declared("fitprune", found)) / 32 == pytest.approx(target, abs=0.5)
    with pytest.raises(MethodError, match=r"fitprune: avg_in of 64 can't be reached, .* above it \(72.8"):
        solve("fitprune", {}, shape(), 576, "avg_in", 64)


def test_a_cost_is_a_currency():
    """Any price that does not fall with more tokens: here quadratic."""

    def price(plan):
        return sum(count**2 for count in plan)

    found = solve("fastv", {}, shape(), 576, "tflops", price([576] * 2 + [100] * 30), price)
    assert declared("fastv", found)[-1] == 100


def test_the_shortest_number_is_returned():
    assert solve("random", {}, shape(), 576, "avg_in", 288) == {"keep": 0.5}
    assert solve("fastv", {"layer": 2}, shape(), 576, "kept_after", 166) == {"layer": 2, "keep": 0.288}
    assert solve("random", {}, shape(), 576, "avg_in", 576) == {"keep": 1.0}


@pytest.mark.parametrize(
    "name, params, currency, target, message",
    [
        ("gsearch", {}, "avg_in", 64, "gsearch: has no single parameter"),
        ("vanilla", {}, "avg_in", 64, "vanilla: has no single parameter"),
        ("fastv", {"keep": 0.5}, "avg_in", 64, "fastv: keep is what is looked for"),
        ("fastv", {}, "tokens", 64, "unknown currency 'tokens'; known: avg_in, kept_after, final"),
        ("fastv", {}, "avg_in", 600, r"every setting is below it \(576\)"),
        ("feather", {}, "avg_in", 64, "feather: .*depends on"),
        ("fitprune", {"recipe": "nowhere.json"}, "avg_in", 64, "can't read the recipe"),
    ],
)
def test_refusals(name, params, currency, target, message):
    with pytest.raises(MethodError, match=message):
        solve(name, params, shape(), 576, currency, target)
