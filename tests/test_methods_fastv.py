"""FastV's worked example and invariants."""

from __future__ import annotations

import pytest
import torch
from steps import Rows, shape, step

from pruneval import methods

HEADS = [[0.1, 0.2, 0.05, 0.16], [0.3, 0.0, 0.05, 0.05]]


def attention(heads: list[list[float]]) -> Rows:
    """(2, 8, 8): visual columns 2..5 of the last row carry `heads`; other rows say the opposite."""
    full = torch.zeros(2, 8, 8, dtype=torch.float64)
    full[:, :-1, 2:6] = -torch.tensor(heads, dtype=torch.float64)[:, None]
    full[:, -1, 2:6] = torch.tensor(heads, dtype=torch.float64)
    return Rows(full)


def test_worked_example():
    """Mean over heads is [.2, .1, .05, .105]: visual tokens 0 and 3 stay, ids 0 1 2 5 6 7."""
    method = methods.build("fastv")
    one = step(2, 4, 2, layer=2, seen={1: attention(HEADS)})
    torch.testing.assert_close(method.score(one), torch.tensor([0.2, 0.1, 0.05, 0.105], dtype=torch.float64))
    assert method.reduce(one).keep.tolist() == [0, 1, 2, 5, 6, 7]
    other = step(2, 4, 2, layer=2, seen={1: attention(HEADS[::-1])})
    assert method.reduce(other).keep.tolist() == [0, 1, 2, 5, 6, 7]


def test_mean_text_averages_the_rows_after_the_image():
    method = methods.build("fastv", {"rows": "mean_text"})
    one = step(2, 4, 2, layer=2, seen={1: attention(HEADS)})
    torch.testing.assert_close(method.score(one), torch.zeros(4, dtype=torch.float64))


def test_ties_go_to_the_lower_index():
    one = step(0, 6, 1, layer=2, seen={1: Rows(torch.full((1, 7), 0.5))})
    assert methods.build("fastv").reduce(one).keep.tolist() == [0, 1, 2, 6]


@pytest.mark.parametrize("keep, average", [(0.5, 306), (0.25, 171), (0.125, 103.5)])
def test_published_averages(keep, average):
    declared = methods.build("fastv", {"keep": keep}).schedule(shape(), 576)
    assert declared[:3] == [576, 576, round(576 * keep)] and sum(declared) / 32 == average
