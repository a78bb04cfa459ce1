"""FitPrune: the shipped recipes, the score, and recipes at other sizes."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.fitprune import received
from pruneval.methods.recipe import SHIPPED

DELETED = {10: 66, 20: 149, 30: 264, 40: 336, 50: 403, 55: 424, 60: 449, 70: 488, 80: 514, 90: 539}


@pytest.mark.parametrize("ratio, deleted", DELETED.items())
def test_shipped_recipes(ratio, deleted):
    """Each layer deletes what the table says; the last one's deletion would change nothing and is never made."""
    row = json.loads((SHIPPED / "fitprune_llava-1.5-7b.json").read_text())["deleted"][str(ratio)]
    declared = methods.build("fitprune", {"keep": 1 - ratio / 100}).schedule(shape(), 576)
    assert declared[0] == 576 and declared[-1] == 576 - deleted == 576 - sum(row)
    assert [a - b for a, b in itertools.pairwise(declared)] == row[:-1]


@pytest.mark.parametrize("ratio, average", [(60, 245.0), (50, 301.8), (80, 130.6), (90, 72.8), (70, 187.9)])
def test_published_averages(ratio, average):
    declared = methods.build("fitprune", {"keep": 1 - ratio / 100}).schedule(shape(), 576)
    assert sum(declared) / 32 == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize("ratio, left", [(50, 0.503), (60, 0.403), (80, 0.203), (90, 0.103)])
def test_the_ratio_is_one_of_flops(ratio, left):
    """The paper's account: projections and attention of a layer at what enters, the rest at what it leaves over."""
    d, m = 4096, 11008
    entering = [*methods.build("fitprune", {"keep": 1 - ratio / 100}).schedule(shape(), 576)]
    leaving = [*entering[1:], entering[-1]]

    def layer(n, rest):
        return 3 * n * d * d + 2 * n * n * d + rest * d * d + 3 * rest * d * m

    assert sum(map(layer, entering, leaving)) / (32 * layer(576, 576)) == pytest.approx(left, abs=1e-3)


def test_worked_example():
    """Cross [.4, .1, .2] and self [.1, .5, .3]: the product lets token 0 go although its cross is the largest."""
    full = torch.zeros(2, 4, 4, dtype=torch.float64)
    full[0, :3, :3] = torch.tensor([[0.1, 0.5, 0.3]] * 3)
    full[1, 3, :3] = torch.tensor([0.4, 0.1, 0.2])
    one = step(0, 3, 1, layer=1, layers=4, total=16, seen={0: Rows(full)})
    method = methods.build("fitprune", {"recipe": str(tiny.RECIPE), "keep": 0.5})
    torch.testing.assert_close(method.score(one).tolist(), [0.04, 0.05, 0.06])
    assert method._goes_on(1, 8) == 6 and method._goes_on(1, 3) == 3
    assert methods.build("fitprune", {"recipe": str(tiny.RECIPE), "keep": 0.2}).reduce(one).keep.tolist() == [1, 2, 3]


def test_the_strongest_head_counts_row_by_row():
    """Maximum over heads before the sum over rows, not after."""
    full = torch.tensor([[[0.9, 0.0], [0.0, 0.3]], [[0.1, 0.2], [0.6, 0.1]]], dtype=torch.float64)
    torch.testing.assert_close(received(Rows(full), torch.tensor([0, 1])).tolist(), [1.5, 0.5])


def test_other_sizes_delete_the_same_shares():
    """int(c * d / c_recipe), of what enters each layer."""
    method = methods.build("fitprune", {"recipe": str(tiny.RECIPE), "keep": 0.5})
    assert method.schedule(shape(4), 16) == [16, 12, 9, 7]
    assert method.schedule(shape(4), 21) == [21, 21 - 21 * 4 // 16, 12, 12 - 12 * 2 // 9]
    assert method.schedule(shape(4), 1) == [1] * 4


def test_between_recipes_survivors_are_interpolated():
    schedules = [methods.build("fitprune", {"keep": keep}).schedule(shape(), 576) for keep in (0.3, 0.25, 0.2)]
    for more, between, fewer in zip(*schedules, strict=True):
        assert fewer <= between <= more and abs(2 * between - more - fewer) <= 1
    assert methods.build("fitprune", {"keep": 1}).needs(shape()) == {}


def test_refusals(tmp_path):
    with pytest.raises(MethodError, match=r"recipes of llava-1.5-7b end at keep = 0.1, not 0.05"):
        methods.build("fitprune", {"keep": 0.05})
    with pytest.raises(MethodError, match=r"recipes of llava-1.5-7b are for 32 layers, this model has 28"):
        methods.build("fitprune").needs(shape(28))
    path = tmp_path / "recipe.json"
    for deleted, message in (([9, 8], "fewer than 16"), ([1, 2, 3], "name 2 deletions"), ([-1, 2], "name 2 deletions")):
        path.write_text(json.dumps({"layers": 2, "tokens": 16, "deleted": {"50": deleted}}))
        with pytest.raises(MethodError, match=message):
            methods.build("fitprune", {"recipe": path})
    path.write_text("{}")
    with pytest.raises(MethodError, match="must have layers, tokens and deleted by percent"):
        methods.build("fitprune", {"recipe": path})
