"""HiPrune: anchors and their neighbours, layers, counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import Rows, shape, step, vision

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.hiprune import hierarchy, received, with_neighbours


@pytest.mark.parametrize(
    "anchor, expected",
    [(0, [0, 1, 24]), (23, [0, 22, 23, 24, 47]), (300, [276, 299, 300, 301, 324]), (575, [551, 574, 575])],
)
def test_neighbours_wrap_and_are_clamped(anchor, expected):
    assert with_neighbours(torch.tensor([anchor]), 24, 576).tolist() == expected


def test_registers_fill_the_budget():
    objects = torch.zeros(576).index_fill_(0, torch.tensor([0]), 1.0)
    chosen = hierarchy(objects, torch.arange(576.0), 24, 10, 0.5)
    assert chosen.tolist() == [0, 1, 24, *range(569, 576)]
    assert len(hierarchy(objects, torch.rand(576), 24, 192, 5 / 192).unique()) == 192


def test_anchors_are_the_highest_of_the_object_layer():
    """V = 192, 128, 64 have 4, 3 and 1 of them, and 24 or fewer tokens none."""
    objects, deep = torch.arange(576, 0, -1.0), torch.arange(576.0)
    for count, anchors in ((192, 4), (128, 3), (64, 1), (25, 0), (24, 0)):
        near = with_neighbours(torch.arange(anchors), 24, 576).tolist() if anchors else []
        expected = sorted({*near, *range(576 - count + len(near), 576)})
        assert hierarchy(objects, deep, 24, count, 0.1).sort().values.tolist() == expected
        assert round(count * 0.1 / 5) == anchors


def test_without_anchors_the_deep_layer_decides():
    deep = torch.rand(100, generator=torch.Generator().manual_seed(0))
    chosen = hierarchy(torch.rand(100), deep, 10, 30, 0.0)
    assert torch.equal(chosen, deep.topk(30).indices.sort().values)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_the_count_is_exact(alpha):
    objects, deep = torch.rand(2, 36, generator=torch.Generator().manual_seed(1))
    for count in range(37):
        chosen = hierarchy(objects, deep, 6, count, alpha)
        assert len(chosen.unique()) == len(chosen) == count


def tower(objects, deep, layer, last):
    """A tile of nine cells that receive these in the two layers, whichever row (CLS's too) looks."""
    rows = {
        number: Rows(torch.cat([torch.tensor([0.5]), each])[None]) for number, each in ((layer, objects), (last, deep))
    }
    view = vision(torch.zeros(10, 1), torch.zeros(1, 10, 2), torch.zeros(1, 10))
    view.attention = lambda number: [rows[number]]
    return view


def test_layers_and_rows_of_the_released_code():
    """Layer 8 finds the anchor 4, the middle of nine; layer 22 the other four."""
    objects, deep = torch.zeros(9), torch.tensor([0.4, 0.0, 0.3, 0.9, 0.8, 0.7, 0.2, 0.6, 0.1])
    objects[4] = 1
    method = methods.build("hiprune", {"keep": 7 / 9, "alpha": 0.8})
    result = method.reduce(step(1, 9, 1, vision=tower(objects, deep, 8, 22)))
    assert result.keep.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10]


@pytest.mark.parametrize(
    "layers, last, merge, cls, expected",
    [(24, 22, 1, True, 8), (26, 25, 1, False, 9), (32, 31, 4, False, 15), (24, 23, 4, True, 8), (4, 2, 1, True, 1)],
)
def test_the_object_layer(layers, last, merge, cls, expected):
    one = replace(shape(), vision_layers=layers, feature_layer=last, merge=merge, has_cls=cls)
    method = methods.build("hiprune")
    assert method.layer(one) == expected and method.needs(one)[0].vision == (expected, last)
    assert methods.build("hiprune", {"object_layer": "1"}).needs(one)[0].vision == (1, last)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"alpha": 1.5}, r"hiprune: alpha must be in \[0, 1\], not 1.5"),
        ({"object_layer": "deep"}, "hiprune: object_layer must be auto or a number from 0, not 'deep'"),
        ({"newline": "no"}, "hiprune: newline must be drop or keep, not 'no'"),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises(MethodError, match=message):
        methods.build("hiprune", params)


def test_a_layer_behind_the_projected_one_is_refused():
    with pytest.raises(MethodError, match="hiprune: object_layer must be at most 22 for this vision tower, not 23"):
        methods.build("hiprune", {"object_layer": 23}).needs(shape())


@pytest.mark.parametrize(
    "model, n, counts", [("llava-1.5-7b", 576, (192, 128, 64)), ("llava-next-7b", 2880, (640, 320, 160))]
)
def test_published_counts(model, n, counts):
    for count in counts:
        method = methods.build("hiprune", methods.method_class("hiprune").presets[f"{model}@{count}"])
        assert method.schedule(replace(shape(), whole=((576, 576),) * (n // 576)), n) == [count] * 32


def test_the_cls_row_looks_too_and_its_column_is_left_out():
    """Without that row cell 1 would be received most; CLS itself, received most of all, is no cell."""
    full = torch.zeros(5, 5, dtype=torch.float64)
    full[:, 0] = 0.5
    full[1:, 2], full[0, 3] = 0.1, 0.45
    attention = Rows(full[None])
    view = vision(torch.zeros(5, 1), torch.zeros(1, 5, 2), torch.zeros(1, 5))
    view.attention = lambda layer: [attention]
    found = received(step(0, 4, 1, vision=view), 8)
    torch.testing.assert_close(found, torch.tensor([0, 0.4 / 5, 0.45 / 5, 0], dtype=torch.float64))
    assert methods.build("hiprune", {"keep": 0.25}).reduce(step(0, 4, 1, vision=view)).keep.tolist() == [2, 4]
