"""Average pooling: the grid that fits a budget, what is pooled, and where it goes on."""

from __future__ import annotations

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.avgpool import fit


def tower(features):
    """A square tile with these features (P, d), after a CLS token of large numbers."""
    features = torch.cat([torch.full_like(features[:1], 99), features])
    return vision(features, torch.zeros(1, len(features), 2), torch.full((1, len(features)), 0.1))


def test_four_by_four_to_two_by_two():
    hidden = torch.cat([torch.tensor([70.0, 80.0]), torch.arange(16.0), torch.tensor([90.0])])[:, None]
    result = methods.build("avgpool", {"keep": 0.25}).reduce(
        step(2, 16, 1, hidden=hidden, vision=tower(hidden[2:18] + 0.5))
    )
    assert result.values[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert result.keep.tolist() == [0, 1, 7, 9, 15, 17, 18] and result.slots.tolist() == [2, 3, 4, 5]
    biggest = methods.build("avgpool", {"keep": 0.25, "pool": "max"})
    result = biggest.reduce(step(2, 16, 1, hidden=hidden, vision=tower(hidden[2:18])))
    assert result.values[:, 0].tolist() == [5, 7, 13, 15]


def test_before_the_projector_it_pools_what_the_tower_gives():
    features, one = torch.arange(16.0)[:, None] * 10, methods.build("avgpool", {"keep": 0.25, "stage": "pre"})
    result = one.reduce(step(2, 16, 1, vision=tower(features)))
    assert result.values[:, 0].tolist() == [25, 45, 105, 125]


def test_pooling_is_linear():
    x, y = torch.randn(2, 36, 3, dtype=torch.float64)
    one = methods.build("avgpool", {"keep": 0.3, "stage": "pre"})
    pooled = [one.reduce(step(0, 36, 1, vision=tower(each))).values for each in (x, y, 2 * x - 3 * y)]
    torch.testing.assert_close(pooled[2], 2 * pooled[0] - 3 * pooled[1])


@pytest.mark.parametrize(
    "count, rows, columns, expected",
    [
        (64, 24, 24, (8, 8)), (192, 24, 24, (13, 14)), (16, 16, 16, (4, 4)), (25, 16, 16, (5, 5)), (7, 4, 4, (2, 3)),
        (1, 24, 24, (1, 1)), (6, 24, 6, (6, 1)), (8, 8, 24, (2, 4)), (12, 8, 24, (2, 6)), (600, 24, 24, (24, 24)),
    ],
)  # fmt: skip
def test_the_grid_that_fits(count, rows, columns, expected):
    assert fit(count, rows, columns) == expected


def test_more_budget_never_means_fewer_tokens():
    for rows, columns in ((24, 24), (5, 9), (1, 7)):
        sizes = [fit(count, rows, columns) for count in range(1, rows * columns + 1)]
        counts = [height * width for height, width in sizes]
        assert counts == sorted(counts) and sizes[-1] == (rows, columns)
        assert all(count <= limit for limit, count in enumerate(counts, start=1))
    assert all(fit(side * side, 24, 24) == (side, side) for side in range(1, 25))


def test_the_declared_count_of_one_square_image():
    method = methods.build("avgpool", {"keep": 192 / 576})
    assert method.schedule(shape(), 576) == [182] * 32
    with pytest.raises(MethodError, match="avgpool: the count depends on the height and width"):
        method.schedule(shape(), 577)


@pytest.mark.parametrize("stage", ["post", "pre"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_values_are_those_of_the_models_own_features(family, stage):
    """Pooled to one token per grid; before the projector a mean of features is projected."""
    model, inputs = tiny(family), subject(family).samples[0]
    seen = []
    kind = methods.method_class("avgpool")

    class Spy(kind):
        def reduce(self, one):
            result = super().reduce(one)
            seen.append((one, result))
            return result

    with torch.no_grad(), pruned(model, Spy(keep=1e-6, stage=stage)) as session:
        model(**inputs)
    one, result = seen[0]
    assert session.trace.budget(0).final == len(result.values)
    tokens = one.hidden[one.visual]
    if family in ("llava_next", "internvl"):
        counts = one.vision.sheet_of().bincount().tolist() if one.shape.sheets else [4] * one.vision.tiles
        parts = tokens.split(counts)
        newline = one.vision.is_newline().split(counts) if one.shape.sheets else [torch.zeros(4).bool()] * len(parts)
        expected = torch.stack([part[~line].mean(0) for part, line in zip(parts, newline, strict=True)])
    else:
        expected = tokens.mean(0, keepdim=True)
    if stage == "post":
        torch.testing.assert_close(result.values, expected)
    elif one.shape.merge == 1 and not one.shape.sheets:
        cells = one.vision.hidden(one.shape.feature_layer)[0][1:]
        torch.testing.assert_close(result.values, one.vision.project(cells.mean(0, keepdim=True)))
    else:
        assert result.values.shape == expected.shape and not torch.allclose(result.values, expected)


def test_newlines_of_pooled_rows_may_stay():
    model, inputs = tiny("llava_next"), subject("llava_next").samples[0]
    found = []
    for newline in ("drop", "keep"):
        with torch.no_grad(), pruned(model, methods.build("avgpool", {"keep": 0.3, "newline": newline})) as session:
            model(**inputs)
        found.append(session.trace.entering(0).samples[0])
    assert int(found[0].visual.sum()) == int(found[0].made.sum())
    assert torch.equal(found[1].origin[found[1].made], found[0].origin[found[0].made])
    lines = int((found[1].visual & ~found[1].made).sum())
    assert lines == 4, "one per pooled row of the stitched sheet"


def test_choices_are_checked():
    with pytest.raises(MethodError, match="avgpool: stage must be post or pre, not 'both'"):
        methods.build("avgpool", {"stage": "both"})
