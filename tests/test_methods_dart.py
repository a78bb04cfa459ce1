"""DART: counts, pivots, and which tokens are least like them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from steps import shape, step

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.methods import MethodError


@pytest.mark.parametrize(
    "n, keep, count",
    [(576, 192 / 576, 196), (576, 128 / 576, 132), (576, 64 / 576, 68), (576, 1 - 0.778, 124), (576, 1, 576),
     (2880, 640 / 2880, 644), (2880, 320 / 2880, 324), (2880, 160 / 2880, 164), (16, 0.4, 4), (3, 0.9, 3)],
)  # fmt: skip
def test_counts_are_pivots_and_what_they_take(n, keep, count):
    assert methods.build("dart", {"keep": keep}).schedule(shape(), n) == [n] * 2 + [count] * 30


@pytest.mark.parametrize("budget, average", [(192, 219.75), (128, 159.75), (64, 99.75)])
def test_published_settings(budget, average):
    method = methods.build("dart", methods.method_class("dart").presets[f"llava-1.5-7b@{budget}"])
    assert sum(method.schedule(shape(), 576)) / 32 == average


def sample(hidden: Any, norms: list[float], after: int = 1, **fields: Any):
    """A step at boundary 2 with keys (1, n, 1) of these norms."""
    hidden, key = torch.tensor(hidden, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)
    seen = {1: SimpleNamespace(key=key[None, :, None])}
    return step(0, len(hidden) - after, after, layer=2, hidden=hidden, seen=seen, **fields)


PLANE = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.0], [5.0, 5.0]]


def test_worked_example():
    """One image pivot, token 0; the one token least like it is token 3."""
    one = {"image_pivots": 1, "text_pivots": 0, "keep": 0.25}
    assert methods.build("dart", one).reduce(sample(PLANE, [9, 1, 1, 1, 99])).keep.tolist() == [0, 3, 4]


def test_lengths_of_hidden_states_do_not_matter():
    stretched = [[value * (2 + row) for value in values] for row, values in enumerate(PLANE)]
    one = {"image_pivots": 1, "text_pivots": 0, "keep": 0.5}
    found = [
        methods.build("dart", one).reduce(sample(plane, [9, 1, 1, 1, 99])).keep.tolist() for plane in (PLANE, stretched)
    ]
    assert found[0] == found[1] == [0, 1, 3, 4]


def test_the_final_norm_comes_first():
    """A norm that turns token 3 around makes it a duplicate; then token 1 is the least alike."""
    one = {"image_pivots": 1, "text_pivots": 0, "keep": 0.25}
    turned = sample(PLANE, [9, 1, 1, 1, 99], final_norm=torch.abs)
    assert methods.build("dart", one).reduce(turned).keep.tolist() == [0, 1, 4]


def test_text_pivots_take_their_share_and_go_on_as_text():
    """Pivots 0 (image) and 4 (text): 0 takes 3, then 4 = (5, 5) takes 1, at 45 degrees, rather than 2, at 39."""
    both = {"image_pivots": 1, "text_pivots": 1, "keep": 0.5}
    assert methods.build("dart", both).reduce(sample(PLANE, [9, 1, 1, 1, 2])).keep.tolist() == [0, 1, 3, 4]
    assert methods.build("dart", both).schedule(shape(), 4)[-1] == 3


def test_pivots_choose_in_order():
    """The first pivot takes the token both want; `set` lets Python's order of small numbers decide."""
    plane = [[0.0, 1.0], [0.1, -1.0], [0.3, -1.0], [1.0, 0.0], [1.0, 0.3], [0.0, 0.0]]
    two = {"image_pivots": 2, "text_pivots": 0, "keep": 0.4}
    norms = [9.0, 1, 1, 8, 1, 1]
    assert methods.build("dart", two).reduce(sample(plane, norms)).keep.tolist() == [0, 1, 2, 3, 5]
    assert methods.build("dart", two | {"order": "set"}).reduce(sample(plane, norms)).keep.tolist() == [0, 1, 2, 3, 5]
    with pytest.raises(MethodError, match="dart: order must be sorted or set"):
        methods.build("dart", {"order": "hash"})


def test_the_order_of_a_set_is_not_the_sorted_one():
    """Index 40 comes before 5 in a set with eight places, so another pivot chooses first."""
    n = 48
    method = {"image_pivots": 2, "text_pivots": 0, "keep": 2 / 47}
    hidden = torch.zeros(n, 3, dtype=torch.float64)
    hidden[:, 2] = 1
    hidden[5], hidden[40] = torch.tensor([1.0, 0.2, 0]), torch.tensor([0.2, 1.0, 0])
    hidden[10], hidden[11], hidden[12] = (
        torch.tensor([-1.0, -1, 0]),
        torch.tensor([-0.5, 0, 1]),
        torch.tensor([0.0, -0.5, 1]),
    )
    norms = [1.0] * n
    norms[5], norms[40] = 9, 8
    kept = {
        order: set(
            methods.build("dart", method | {"order": order}).reduce(sample(hidden.tolist(), norms)).keep.tolist()
        )
        for order in ("sorted", "set")
    }
    assert list({5, 40}) == [40, 5]
    assert kept["sorted"] == {5, 40, 10, 12, 47} and kept["set"] == {5, 40, 10, 11, 47}


def test_duplicates_go_before_orthogonal_tokens():
    plane = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    one = {"image_pivots": 1, "text_pivots": 0, "keep": 0.4}
    assert methods.build("dart", one).reduce(sample(plane, [9, 1, 1, 1, 1, 1])).keep.tolist() == [0, 2, 3, 5]


def test_keys_are_summed_over_their_heads_after_rotation():
    """The pivots on a model are the largest L1 norms of what the cache of layer 1 holds."""
    model, inputs = tiny.shared(), tiny.prompt(5, 7)
    with torch.no_grad():
        keys = model(**inputs, use_cache=True).past_key_values.layers[1].keys[0]
        norm = keys.abs().sum((0, 2))
        with pruned(model, methods.build("dart", {"keep": 0.03})) as session:
            model(**inputs)
    tokens = session.trace.entering(2).samples[0]
    assert tokens.origin[tokens.visual].tolist() == sorted((norm[5:21].topk(4).indices + 5).tolist())


def test_refusals():
    for params, message in (({"layer": 0}, "layer must be at least 1"), ({"image_pivots": 0}, "image_pivots must be")):
        with pytest.raises(MethodError, match=message):
            methods.build("dart", params)
