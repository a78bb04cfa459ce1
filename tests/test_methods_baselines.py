"""Random and uniform: counts, centred stride, and the same chance for every token."""

from __future__ import annotations

import pytest
import torch
from steps import shape, step

from pruneval import methods
from pruneval.methods.base import kept
from pruneval.methods.uniform import centres


def test_uniform_takes_the_centres():
    assert centres(10, 4).tolist() == [1, 3, 6, 8]
    assert centres(576, 64)[[0, 1, -1]].tolist() == [4, 13, 571]
    assert centres(7, 7).tolist() == list(range(7))


@pytest.mark.parametrize("n", [1, 2, 5, 16, 577])
def test_counts_hold_for_every_budget(n):
    for percent in range(1, 101, 3):
        count = kept(n, percent / 100)
        assert 1 <= count <= n
        index = centres(n, count)
        assert torch.equal(index, index.unique()) and len(index) == count
        assert int(index[0]) >= 0 and int(index[-1]) < n
        for name in ("random", "uniform"):
            method = methods.build(name, {"keep": percent / 100})
            result = method.reduce(step(2, n, 3))
            size = 5 + n if result is None else len(result.keep)
            assert size == 5 + count and method.schedule(shape(4), n) == [count] * 4


def test_random_draws_are_fair_sorted_and_unique():
    method, counts, draws = methods.build("random", {"keep": 0.25}), torch.zeros(16), 1000
    for seed in range(draws):
        one = step(0, 16, 1, generator=lambda seed=seed: torch.Generator().manual_seed(seed))
        index = method.reduce(one).keep[:-1]
        assert torch.equal(index, index.unique())
        counts[index] += 1
    sigma = (0.25 * 0.75 / draws) ** 0.5
    assert ((counts / draws - 0.25).abs() < 4 * sigma).all()
