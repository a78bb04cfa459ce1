"""The registry of methods: light, strict, and it says what would have been right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from steps import shape

from pruneval import methods
from pruneval.methods import MethodError


def test_cards_need_no_torch():
    listing = "from pruneval.methods import card, names; [card(n) for n in names()]"
    code = f"import sys; {listing}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", methods.names())
def test_cards_and_parameters_are_complete(name):
    card, method = methods.card(name), methods.build(name)
    assert card.name == name and card.title and card.summary
    assert bool(card.paper) == bool(card.year)
    assert bool(card.arxiv) == bool(card.paper) or name == "ifprune"  # published without a preprint
    assert set(card.seam) <= {"pixels", "vision", "embed", "layer", "decode"}
    assert method.knob in method.params or name in ("vanilla", "gsearch", "tokenpacker")
    assert methods.build(name, {key: str(value) for key, value in method.params.items()}) == method
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen


@pytest.mark.parametrize("name", methods.names())
def test_a_card_says_whether_clip_is_asked(name):
    """A cell's identity goes by the card, the engine by what the method needs."""
    try:
        needs = methods.build(name).needs(shape())
    except MethodError:  # it wants a file or rates first; none of these asks
        needs = {}
    assert any(need.clip for need in needs.values()) == methods.card(name).clip


def test_parameters_are_remembered():
    method = methods.build("fastv", {"keep": "0.25"})
    assert method.params == {"layer": 2, "keep": 0.25, "rows": "last"}
    assert method.given == {"keep": 0.25} and methods.build("fastv").given == {}
    assert method.signature == "fastv(layer=2,keep=0.25,rows=last)"
    assert methods.build("vanilla").signature == "vanilla"


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("fsatv", {}, "unknown method 'fsatv'; did you mean 'fastv'?"),
        ("nothing-like-it", {}, "unknown method 'nothing-like-it'; known: vanilla, random"),
        ("fastv", {"kep": 1}, "fastv has no parameter 'kep'; did you mean 'keep'?"),
        ("vanilla", {"keep": 0.5}, "vanilla has no parameter 'keep'; it has none"),
        ("fastv", {"keep": 1.5}, "fastv: keep must be in (0, 1], not 1.5"),
        ("random", {"keep": "0"}, "random: keep must be in (0, 1], not 0"),
        ("fastv", {"keep": "half"}, "fastv: keep must be a number, not 'half'"),
        ("fastv", {"keep": "nan"}, "fastv: keep must be a number, not 'nan'"),
        ("fastv", {"layer": "2.5"}, "fastv: layer must be a whole number, not '2.5'"),
        ("fastv", {"layer": 0}, "fastv: layer must be at least 1, because layer - 1 does the scoring, not 0"),
        ("fastv", {"rows": "first"}, "fastv: rows must be last or mean_text, not 'first'"),
        ("random", {"position_mode": "both"}, "random: position_mode must be original or compact, not 'both'"),
        ("pdrop", {"layers": "8,4"}, "pdrop: layers must be auto or ascending numbers like 8,16,24, not '8,4'"),
        ("pdrop", {"layers": "early"}, "pdrop: layers must be auto or ascending numbers like 8,16,24, not 'early'"),
    ],
)
def test_errors_are_one_clear_line(name, params, message):
    with pytest.raises(MethodError) as caught:
        methods.build(name, params)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
