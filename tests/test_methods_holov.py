"""HoloV: shares of crops, which tokens stay in a crop, and their order."""

from __future__ import annotations

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.holov import quotas


def one(attention, tokens=None):
    """A sample of one tile with this CLS attention to its cells, and one token of text."""
    attention = torch.as_tensor(attention, dtype=torch.float64)
    n = len(attention)
    row = torch.cat([1 - attention.sum()[None], attention])[None]
    hidden = torch.ones(n, 1, dtype=torch.float64) if tokens is None else torch.as_tensor(tokens, dtype=torch.float64)
    view = vision(torch.zeros(n + 1, 1), torch.zeros(1, n + 1, 1), row)
    return step(0, n, 1, vision=view, hidden=torch.cat([hidden, hidden[:1]]))


def test_worked_quotas():
    """Floors 4, 2, 1, 1; the two left go to the heaviest."""
    assert quotas([3, 2, 1, 1], [36] * 4, 10) == [5, 3, 1, 1]


def test_what_has_no_room_goes_by_weight_and_room():
    """8 of 10 to the first, of which 5 have no room: .5 * 5 against .5 * 3, 3 and 1, one more for the heavier."""
    assert quotas([8, 1, 1], [3, 6, 4], 10) == [3, 5, 2]
    assert quotas([1, 0], [3, 6], 8) == [3, 5] and quotas([0, 0], [3, 6], 8) == [3, 5]


@pytest.mark.parametrize("total", [1, 7, 64, 130, 191])
def test_quotas_add_up_and_fit(total):
    generator = torch.Generator().manual_seed(total)
    for _ in range(20):
        sizes = torch.randint(1, 30, (16,), generator=generator).tolist()
        weights = torch.rand(16, generator=generator).pow(8).tolist()
        budget = min(total, sum(sizes))
        shares = quotas(weights, sizes, budget)
        assert sum(shares) == budget and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


def test_crops_are_runs_of_the_raster():
    """Four crops of nine cells; with equal attention and features each has a quarter, the first by index."""
    found = methods.build("holov", {"keep": 12 / 36, "crops": "4"}).reduce(one([1 / 72] * 36))
    assert found.keep.tolist() == [0, 1, 2, 9, 10, 11, 18, 19, 20, 27, 28, 29, 36]
    sizes = [len(run) for run in torch.arange(577).tensor_split(16)]
    assert sizes == [37] + [36] * 15


def test_the_most_attended_of_a_crop_stay_in_that_order():
    """[.1, .5, .4] is one crop of two: 1 and 2; in the order of the prompt when asked."""
    attention, given = [0.08, 0.4, 0.1, 0.2], {"keep": 0.5, "crops": "1"}
    assert methods.build("holov", given).reduce(one(attention)).keep.tolist() == [1, 3, 4]
    attention = [0.08, 0.2, 0.1, 0.4]
    assert methods.build("holov", given).reduce(one(attention)).keep.tolist() == [3, 1, 4]
    assert methods.build("holov", given | {"order": "prompt"}).reduce(one(attention)).keep.tolist() == [1, 3, 4]


def test_a_whole_crop_keeps_its_order():
    """The first crop has all the attention and room for two; the other takes what is left."""
    found = methods.build("holov", {"keep": 0.75, "crops": "2"}).reduce(one([0.3, 0.6, 0.0, 0.0]))
    assert found.keep.tolist() == [0, 1, 2, 4]


def test_scores_of_a_crop():
    """Tokens a, a, b (orthogonal): mean cosines 1/2, 1/2, 0; the variance counts the diagonal's 0 in."""
    tokens = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    attention = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)
    variance = torch.tensor([0.375, 0.375, 0.0], dtype=torch.float64)  # (1/4 + 1/4 + 1/4) / 2
    gamma = 0.3 / (0.25 + 1e-6)
    for variant, weight in (("code", 0.09), ("paper", 1.0)):
        found = methods.build("holov", {"variant": variant}).scores(attention, tokens)
        torch.testing.assert_close(found, attention + weight * gamma * variance)
    assert methods.build("holov").scores(attention[:1], tokens[:1]).tolist() == [0.5]


def test_the_score_chooses_within_crops_in_the_paper():
    """The second token is alone of its kind among like ones only by features, not by attention."""
    tokens, attention = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.2, 0.22, 0.25]
    given = {"keep": 1 / 3, "crops": "1"}
    assert methods.build("holov", given).reduce(one(attention, tokens)).keep.tolist() == [2, 3]
    assert methods.build("holov", given | {"variant": "paper"}).reduce(one(attention, tokens)).keep.tolist() == [1, 3]


@pytest.mark.parametrize("count, crops", [(192, 5), (128, 8), (64, 16)])
def test_published_counts_and_crops(count, crops):
    method = methods.build("holov", methods.method_class("holov").presets[f"llava-1.5-7b@{count}"])
    assert method.schedule(shape(), 576) == [count] * 32
    attention = torch.rand(576, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    tokens = torch.randn(576, 4, generator=torch.Generator().manual_seed(1))
    sample = one(attention / attention.sum() / 2, tokens)
    found = method.reduce(sample).keep
    assert len(found.unique()) == len(found) == count + 1
    given = {"keep": count / 576, "crops": str(crops)}
    assert torch.equal(found, methods.build("holov", given).reduce(sample).keep)
    edges = [0, *torch.tensor([len(run) for run in torch.arange(576).tensor_split(crops)]).cumsum(0).tolist()]
    crop = torch.bucketize(found[:-1], torch.tensor(edges[1:]), right=True)
    assert torch.equal(crop, crop.sort().values) and bool((found[:-1].diff() < 0).any())


def test_images_have_their_own_crops_and_places():
    model, sample = tiny("llava"), subject("llava").samples[1]
    for order in ("attention", "prompt"):
        with torch.no_grad(), pruned(model, methods.build("holov", {"keep": 0.5, "order": order})) as session:
            model(**sample)
        tokens, prompt = session.trace.entering(0).samples[0], session.trace.prompt.samples[0]
        edges = (prompt.visual.int().diff() == 1).nonzero().squeeze(-1) + 1
        text = tokens.origin[~tokens.visual]
        assert torch.equal(text, text.sort().values) and len(edges) == 2
        for start in edges.tolist():
            mine = (tokens.origin >= start) & (tokens.origin < start + 16)
            assert int(mine.sum()) == 8
            places = mine.nonzero().squeeze(-1)
            assert int(places[-1] - places[0]) == 7  # nothing else is between them
        assert bool((tokens.origin.diff() > 0).all()) == (order == "prompt")


def test_newlines_go():
    model, sample = tiny("llava_next"), subject("llava_next").samples[0]
    with torch.no_grad(), pruned(model, methods.build("holov", {"keep": 0.4})) as session:
        model(**sample)
    budget = session.trace.budget(0)
    assert budget.per_layer == methods.build("holov", {"keep": 0.4}).schedule(session.shape, budget.visual)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"variant": "mine"}, "variant must be code or paper, not 'mine'"),
        ({"order": "raster"}, "order must be attention or prompt, not 'raster'"),
        ({"crops": "0"}, "crops must be auto or a number, not '0'"),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises(MethodError, match=message):
        methods.build("holov", params)
