"""PruMerge and PruMerge+: how many stand out, what is absorbed, order and counts."""

from __future__ import annotations

import pytest
import torch
from steps import Rows, shape, step, vision

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.prumerge import absorb, single_head
from pruneval.methods.salience import outliers

PAIR = pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])


def test_outliers_of_the_card():
    """Four 1, four 2, three 3 and one 20: Q1 is 1, Q3 is 3, the bound 6."""
    assert outliers(torch.tensor([1.0] * 4 + [2.0] * 4 + [3.0] * 3 + [20.0])) == 1
    assert outliers(torch.ones(12)) == 1, "flat maps have one all the same"


def test_what_is_absorbed():
    """x = 1, 2, 4 with weights .5, .3, .2: the first keeps 1 + .3 * 2, the others make .3 * 2 + .2 * 4."""
    x, keys = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    weight = torch.tensor([0.5, 0.3, 0.2])
    made = absorb(x, keys, weight, torch.tensor([0]), neighbours=1)
    assert made[:, 0].tolist() == pytest.approx([1.6, 1.4])
    both = absorb(x, keys, weight, torch.tensor([1, 0]), neighbours=32)
    assert both[:, 0].tolist() == pytest.approx([2 + 0.5 + 0.8, 1 + 0.6 + 0.8, 0.8]), "kept ones are absorbed too"


def test_one_map_over_the_full_width():
    """Two heads of width 1 are one of width 2; CLS is in the softmax and then left out."""
    attention = Rows(torch.zeros(1, 3))
    attention.query = torch.tensor([[[1.0], [9.0], [9.0]], [[2.0], [9.0], [9.0]]])
    attention.key = torch.tensor([[[1.0], [2.0], [0.0]], [[0.0], [1.0], [3.0]]])
    view = vision(torch.zeros(3, 1), torch.zeros(1, 3, 1), torch.zeros(1, 3))
    view.attention = lambda layer: [attention] if layer == 23 else None
    weight, keys = single_head(step(0, 2, 1, vision=view))
    expected = (torch.tensor([1.0, 4.0, 6.0]) / 2**0.5).softmax(0)[1:]
    torch.testing.assert_close(weight, expected)
    assert keys.tolist() == [[2.0, 1.0], [0.0, 3.0]]


def weights(n, high):
    """A flat map on n tokens with `high` that stand out, the later the more."""
    weight = torch.full((n,), 0.001)
    weight[torch.tensor(high)] = 0.01 + torch.arange(len(high)) / 1000
    return weight


def test_the_strongest_come_first():
    weight, method = weights(576, [40, 300, 7]), methods.build("prumerge", {"count": "outliers"})
    assert method.centres(weight, None).tolist() == [7, 300, 40]
    assert method.centres(weight, 2).tolist() == [7, 300]


@pytest.mark.parametrize("found, samples", [(32, 96), (57, 192)])
def test_plus_samples_at_a_third_of_the_distance(found, samples):
    """32 of 576 (5.6 %) make steps of 6; 57 (9.9 %) steps of 3; 575 is never one."""
    weight = weights(576, list(range(575, 575 - found, -1)))
    chosen = methods.build("prumerge_plus", {"count": "outliers"}).centres(weight, None)
    assert chosen[:found].tolist() == list(range(576 - found, 576))
    step_ = 575 // samples + 1
    even = [index for index in range(0, 575, step_) if index < 576 - found]
    assert len(range(0, 575, step_)) == samples and chosen[found:].tolist() == even


def test_plus_with_many_outliers_steps_by_one():
    """More than a third can't lie beyond the quartiles by much, but at most a quarter can: steps are at least 1."""
    weight = weights(8, [1, 5])
    assert (
        sorted(methods.build("prumerge_plus", {"count": "outliers"}).centres(weight, None).tolist())
        == list(range(8))[:7]
    )


@pytest.mark.parametrize("count", [1, 5, 20, 63, 127])
def test_plus_with_a_fixed_count(count):
    weight, found = weights(576, list(range(500, 532))), 32
    chosen = methods.build("prumerge_plus").centres(weight, count)
    assert len(chosen.unique()) == len(chosen) == count
    assert chosen[:found].tolist() == list(range(531, 531 - min(count, found), -1))
    even = [index for index in range(0, 576, 576 // count) if not 500 <= index < 532]
    assert chosen[found:].tolist() == even[: max(0, count - found)]


def tower(x, weight):
    """A tile with these features whose single-head CLS row is `weight`, with keys along two axes."""
    n = len(x) + 1
    attention = Rows(torch.zeros(1, n))
    key = torch.zeros(1, n, 4)
    key[0, 1:, 0] = weight.log() - weight.log().min()
    key[0, :, 1] = 1.0
    attention.key, attention.query = key, torch.zeros(1, n, 4)
    attention.query[0, 0, 0] = 2.0
    view = vision(torch.cat([torch.zeros(1, x.shape[1]), x]), key, torch.zeros(1, n))
    view.attention = lambda layer: [attention]
    return view


@PAIR
@pytest.mark.parametrize("order", ["score", "raster"])
def test_order_and_the_extra_token(name, order):
    x = torch.arange(16.0)[:, None]
    weight = weights(16, [11, 3, 6])
    method = methods.build(name, {"keep": 0.25, "order": order})
    result = method.reduce(step(2, 16, 1, vision=tower(x, weight)))
    kept = [6, 3, 11] if order == "score" else [3, 6, 11]
    assert result.keep.tolist() == [0, 1, *(2 + index for index in kept), 2 + kept[-1], 18]
    assert result.slots.tolist() == [2, 3, 4, 5] and result.added.tolist() == [False] * 3 + [True]
    exact = torch.tensor([0.0, *((weight.log() - weight.log().min()).tolist())]).softmax(0)[1:]
    rest = [index for index in range(16) if index not in kept]
    assert float(result.values[-1, 0]) == pytest.approx(float((exact[rest] * x[rest, 0]).sum()), rel=1e-5)
    every = float((exact * x[:, 0]).sum())
    for index, made in zip(kept, result.values[:-1, 0].tolist(), strict=True):
        assert made == pytest.approx(index + every - float(exact[index]) * index, rel=1e-5)


@PAIR
def test_a_budget_of_one_is_the_sum(name):
    result = methods.build(name, {"keep": 1 / 16}).reduce(
        step(0, 16, 2, vision=tower(torch.ones(16, 1), weights(16, [2])))
    )
    assert len(result.keep) == 3 and result.added.tolist() == [True]


@PAIR
@pytest.mark.parametrize("count", [192, 128, 64, 32])
def test_published_counts(name, count):
    method = methods.build(name, methods.method_class(name).presets[f"llava-1.5-7b@{count}"])
    assert method.schedule(shape(), 576) == [count] * 32
    weight = torch.rand(576, generator=torch.Generator().manual_seed(count)) ** 8 + 1e-3
    result = method.reduce(step(0, 576, 1, vision=tower(torch.randn(576, 2), weight)))
    assert len(result.keep) == count + 1 and len(result.slots) == count


@PAIR
def test_a_free_count_is_not_declared(name):
    method = methods.build(name, {"count": "outliers"})
    with pytest.raises(MethodError, match=f"{name}: with count=outliers the count depends on the sample"):
        method.schedule(shape(), 576)
    with pytest.raises(MethodError, match=f"{name}: order must be score or raster, not 'none'"):
        methods.build(name, {"order": "none"})


@PAIR
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_a_free_count_does_not_depend_on_the_batch(name, family):
    one = subject(family)
    with torch.no_grad(), pruned(tiny(family), methods.build(name, {"count": "outliers"})) as session:
        alone = []
        for sample in one.samples:
            tiny(family)(**sample)
            alone.append(session.trace.entering(0).samples[0].origin)
        tiny(family)(**one.batch(*one.samples))
        for row, origin in enumerate(alone):
            assert torch.equal(session.trace.entering(0).samples[row].origin, origin)


@PAIR
def test_keys_are_the_last_layers_and_features_those_that_are_projected(name):
    view, asked = tower(torch.arange(16.0)[:, None], weights(16, [5])), []
    attention, hidden = view.attention, view.hidden
    view.attention = lambda layer: asked.append(("attention", layer)) or attention(layer)
    view.hidden = lambda layer: asked.append(("hidden", layer)) or hidden(layer)
    method = methods.build(name, {"keep": 0.25})
    assert method.needs(shape())[0].vision == (22, 23)
    method.reduce(step(0, 16, 1, vision=view))
    assert set(asked) == {("attention", 23), ("hidden", 22)}
