"""CLS top-k and FasterVLM: what is ranked, shares of tiles, newlines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import Rows, shape, step, vision

from pruneval import methods
from pruneval.harness.attention import HeadAttention
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.salience import salience, spread


def tower(row):
    """A tile of cells whose CLS attention is given, heads x (1 + cells); CLS gets what is left."""
    row = torch.as_tensor(row, dtype=torch.float64)
    row = torch.cat([1 - row.sum(-1, keepdim=True), row], dim=-1)
    return vision(torch.zeros(row.shape[1], 1), torch.zeros(len(row), row.shape[1], 2), row)


@pytest.mark.parametrize("name", ["fastervlm", "cls_topk"])
def test_the_mean_over_heads_ranks_and_order_is_kept(name):
    """Head mean [.1, .4, .2, .3]; two of four stay."""
    heads = [[0.0, 0.5, 0.1, 0.4], [0.2, 0.3, 0.3, 0.2]]
    result = methods.build(name, {"keep": 0.5}).reduce(step(2, 4, 1, vision=tower(heads)))
    assert result.keep.tolist() == [0, 1, 3, 5, 6]


@pytest.mark.parametrize("name", ["fastervlm", "cls_topk"])
def test_ties_go_to_the_first(name):
    result = methods.build(name, {"keep": 3 / 8}).reduce(step(0, 8, 1, vision=tower([[0.125] * 8])))
    assert result.keep.tolist() == [0, 1, 2, 8]


def test_what_is_received_takes_the_place_of_a_cls_token():
    """A column's mean over all rows; alike everywhere, every cell gets 1/N."""
    full = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4]]])
    torch.testing.assert_close(salience(Rows(full), False), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    assert salience(Rows(torch.full((2, 5, 5), 0.2)), False).tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(
    "preset, count",
    [("llava-1.5-7b@192", 192), ("llava-1.5-7b@128", 128), ("llava-1.5-7b@64", 64), ("llava-1.5-7b@58", 58)],
)
def test_published_counts(preset, count):
    method = methods.build("fastervlm", methods.method_class("fastervlm").presets[preset])
    assert method.schedule(shape(), 576) == [count] * 32
    drawn = torch.rand(16, 576, dtype=torch.float64).softmax(-1) / 2
    index = method.reduce(step(0, 576, 1, vision=tower(drawn))).keep[:-1]
    assert len(index) == count and torch.equal(index, index.unique())


@pytest.mark.parametrize("total, tile", [(640, 128), (320, 64), (160, 32), (145, 29)])
def test_published_counts_of_llava_next(total, tile):
    method = methods.build("fastervlm", methods.method_class("fastervlm").presets[f"llava-next-7b@{total}"])
    assert method.per_tile == tile
    assert method.schedule(replace(shape(), whole=((576, 576),) * 5), 2880) == [total] * 32


def test_half_to_five_percent_of_576():
    counts = [methods.build("fastervlm", {"keep": keep}).schedule(shape(), 576)[0] for keep in (0.5, 0.25, 0.1, 0.05)]
    assert counts == [288, 144, 58, 29]


def test_every_token_is_shared_out():
    assert spread(10, [9, 9, 2]) == [5, 4, 1] and spread(1, [4, 8]) == [0, 1]
    assert spread(5, [2, 0, 3]) == [2, 0, 3] and spread(7, [2, 3]) == [2, 3]


def kept_tokens(method, inputs, model):
    """Numbers of the visual tokens that stay, and the view of the tower."""
    views = []
    kind = type(method)
    spy = type(kind.__name__, (kind,), {"reduce": lambda self, one: views.append(one) or kind.reduce(self, one)})
    with torch.no_grad(), pruned(model, spy(**method.params)) as session:
        model(**inputs)
    layout, prompt = session.trace.entering(0).samples[0], session.trace.prompt.samples[0]
    stays = torch.isin(prompt.origin[prompt.visual], layout.origin)
    return stays.nonzero().squeeze(-1), views[0]


def test_tiles_share_the_budget_and_newlines_go():
    model, inputs = tiny("llava_next"), subject("llava_next").samples[0]
    method = methods.build("fastervlm", {"keep": 0.4})
    chosen, seen = kept_tokens(method, inputs, model)
    tile, newline = seen.vision.tile_of(), seen.vision.is_newline()
    assert len(chosen) == round(0.4 * seen.total) and not bool(newline[chosen].any()) and bool(newline.any())
    sizes = [int((tile == each).sum()) for each in range(seen.vision.tiles)]
    assert [int((tile[chosen] == each).sum()) for each in range(seen.vision.tiles)] == spread(len(chosen), sizes)
    score = method.score(seen)
    for each in range(seen.vision.tiles):
        mine, left = score[chosen][tile[chosen] == each], score[tile == each]
        assert torch.equal(mine.sort().values, left.sort().values[len(left) - len(mine) :])


def test_newlines_of_rows_that_stay_may_stay():
    model, inputs = tiny("llava_next"), subject("llava_next").samples[0]
    plain, seen = kept_tokens(methods.build("fastervlm", {"keep": 0.2}), inputs, model)
    chosen, _ = kept_tokens(methods.build("fastervlm", {"keep": 0.2, "newline": "keep"}), inputs, model)
    newline, place, sheet = seen.vision.is_newline(), seen.vision.place_of(), seen.vision.sheet_of()
    assert torch.equal(chosen[~newline[chosen]], plain)
    rows = {(int(sheet[token]), int(place[token, 0])) for token in plain if sheet[token] == 1}
    ends = {(int(sheet[token]), int(place[token, 0])) for token in chosen if newline[token]}
    assert rows == ends and len(rows) > 0
    with pytest.raises(MethodError, match="fastervlm: with newline=keep the count depends on the rows that stay"):
        methods.build("fastervlm", {"newline": "keep"}).schedule(seen.shape, 100)


def test_the_budget_holds_where_there_are_fewer_cells_than_tokens():
    """Newlines fill what is left of it."""
    model, inputs = tiny("llava_next"), subject("llava_next").samples[0]
    total = 70
    for name in ("fastervlm", "cls_topk"):
        chosen, seen = kept_tokens(methods.build(name, {"keep": (total - 1) / total}), inputs, model)
        assert seen.total == total and len(chosen) == total - 1


def test_the_control_has_no_shares():
    """All of the budget goes to the image that looks salient."""
    scores = [torch.tensor([0.1, 0.1, 0.1, 0.1]), torch.tensor([0.2, 0.2, 0.2, 0.2])]
    rows = [Rows(torch.cat([1 - each.sum(0, True), each])[None]) for each in scores]
    view = tower([[0.25] * 4])
    view.tiles, view.images, view.attention = 2, (1, 1), lambda layer: rows
    view.grids = ((2, 2), (2, 2))
    one = step(0, 8, 1, vision=view)
    assert methods.build("cls_topk").reduce(one).keep.tolist() == [4, 5, 6, 7, 8]
    assert methods.build("fastervlm").reduce(one).keep.tolist() == [0, 1, 4, 5, 8]


def test_newline_is_one_of_two():
    with pytest.raises(MethodError, match="fastervlm: newline must be drop or keep, not 'some'"):
        methods.build("fastervlm", {"newline": "some"})


def test_a_constant_added_to_a_heads_logits_changes_nothing():
    """CLS's column is inside the softmax, which does not see what all columns have in common."""
    query, key = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = key.clone()
    shifted[1] += 2 * query[1, 0]
    plain, moved = (salience(HeadAttention(query, each, each, 0.5, causal=False), True) for each in (key, shifted))
    torch.testing.assert_close(plain, moved)
    logits = query[:, :1] @ key.transpose(1, 2) * 0.5
    torch.testing.assert_close(plain, logits.softmax(-1)[:, 0, 1:].mean(0))
