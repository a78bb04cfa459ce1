"""FEATHER: attention without rotary embedding, the grid, and two boundaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.methods import MethodError
from pruneval.methods.feather import on_grid, places


def view(rows: int, columns: int) -> SimpleNamespace:
    """One tile whose cells are the tokens."""
    hidden = lambda layer: [torch.zeros(rows * columns, 2)]  # noqa: E731
    return SimpleNamespace(
        has_cls=False, grids=((rows, columns),), hidden=hidden, to_tokens=lambda cells: torch.cat(list(cells))
    )


def sample(side: int, row: Any, layer: int = 8) -> Any:
    """A step whose last row attends as `row` says; two heads."""
    full = torch.zeros(2, side * side + 1, dtype=torch.float64)
    full[:, : side * side] = torch.as_tensor(row, dtype=torch.float64)
    return step(0, side * side, 1, layer=layer, seen={layer - 1: Rows(full)}, vision=view(side, side))


def test_worked_example():
    """Nine tokens, stride 3: the grid is token 0; the best two are 4 and 8."""
    row = [0.01] * 9
    row[4], row[8] = 0.4, 0.3
    assert methods.build("feather", {"keep": 2 / 9}).reduce(sample(3, row)).keep.tolist() == [0, 4, 8, 9]


@pytest.mark.parametrize("side, keep, best, grid", [(27, 0.3, 218, 81), (24, 0.3, 172, 64)])
def test_published_counts(side, keep, best, grid):
    """The best and the grid, merged; then int(M * f * f) of them."""
    method = methods.build("feather", {"keep": keep})
    place = places(sample(side, 0.0))
    laid = on_grid(place, 3)
    assert int(laid.sum()) == grid
    for seed in range(3):
        row = torch.rand(side * side, generator=torch.Generator().manual_seed(seed))
        result = method.reduce(sample(side, row))
        size = len(result.keep) - 1
        assert best < size < best + grid and bool(torch.isin(laid.nonzero().squeeze(-1), result.keep).all())
        assert size == best + grid - int(laid[row.topk(best).indices].sum())
    assert len(method.reduce(sample(side, -laid.int())).keep) - 1 == best + grid
    assert len(method.reduce(sample(side, laid.int())).keep) - 1 == best
    later = step(0, 275, 1, layer=16, seen={15: Rows(torch.rand(2, 276))})
    assert len(method.reduce(later).keep) - 1 == 24


def test_heads_weigh_the_same():
    """Softmax runs over visual columns only: a head that looks at text elsewhere counts as much as the others."""
    full = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.001, 0.004, 0.005, 0.99]], dtype=torch.float64)
    one = step(0, 3, 1, layer=8, seen={7: Rows(full)})
    expected = (full[:, :3] / full[:, :3].sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(methods.build("feather").score(one), expected)


@pytest.mark.parametrize("layers, expected", [(32, [8, 16]), (28, [7, 14]), (4, [1, 2])])
def test_boundaries(layers, expected):
    needs = methods.build("feather").needs(shape(layers))
    assert list(needs) == expected and [need.attention for need in needs.values()] == [(b - 1,) for b in expected]


def test_the_score_is_that_of_projections_without_rotation():
    model, inputs, found = tiny.shared(), tiny.prompt(5, 7), {}
    method = methods.build("feather")

    def spy(self, step):
        found[step.layer] = (type(method).score(self, step), step.hidden, step.visual)
        return found[step.layer][0]

    spied = type("Spied", (type(method),), {"score": spy})(keep=0.5)
    with torch.no_grad():
        entering = model(**inputs, output_hidden_states=True).hidden_states[0]
        with pruned(model, spied):
            model(**inputs)
        layer = model.model.language_model.layers[0]
        normed = layer.input_layernorm(entering)[0]
        query = layer.self_attn.q_proj(normed[-1]).view(4, 16)
        key = layer.self_attn.k_proj(normed[5:21]).view(16, 2, 16).repeat_interleave(2, 1)
        expected = (torch.einsum("hd,nhd->hn", query, key) / 4).softmax(-1).mean(0)
    torch.testing.assert_close(found[1][0], expected, rtol=1e-6, atol=1e-8)


def test_later_survivors_are_among_the_earlier():
    model = tiny.shared()
    with torch.no_grad(), pruned(model, methods.build("feather", {"keep": 0.5})) as session:
        model(**tiny.prompt(3, 4, 2, 2))
    before, after = (session.trace.entering(layer).samples[0] for layer in (1, 2))
    grid = [3 + i for i in (0, 3, 12, 15)] + [20 + i for i in (0, 3, 12, 15)]
    assert set(grid) <= set(before.origin[before.visual].tolist())
    assert set(after.origin.tolist()) < set(before.origin.tolist())
    assert int(after.visual.sum()) == int(before.visual.sum()) // 4


def test_newlines_are_no_part_of_the_grid():
    place = torch.tensor([[0, 0], [0, 1], [-1, -1], [3, 0], [3, 3], [4, 3]])
    assert on_grid(place, 3).tolist() == [True, False, False, True, True, False]


def test_how_many_stay_depends_on_the_sample():
    with pytest.raises(MethodError, match="feather: how many tokens stay depends"):
        methods.build("feather").schedule(shape(), 576)
    assert methods.build("feather", {"keep": 1}).schedule(shape(), 576) == [576] * 32


@pytest.mark.parametrize("layers", ["8", "16,8", "0,8", "early"])
def test_wrong_boundaries(layers):
    with pytest.raises(MethodError, match="feather: layers must be auto or two numbers like 8,16"):
        methods.build("feather", {"layers": layers})
