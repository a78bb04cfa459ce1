"""TRIM: what stands out, the mean of the rest, its counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.conformance import CHECKS, Case, verdicts
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject
from pruneval.methods import MethodError
from pruneval.methods.trim import outliers


def sample(products, features=None, question=(1.0,), **fields):
    """One image whose cells have these dot products with the question (1 in a space of one dimension)."""
    products = torch.tensor(products, dtype=torch.float64)[:, None]
    features = products if features is None else torch.tensor(features, dtype=torch.float64)[:, None]
    lookup = {float(key): value for key, value in zip(features[:, 0], products, strict=True)}
    clip = SimpleNamespace(
        question=torch.tensor(question, dtype=torch.float64),
        project=lambda hidden: torch.stack([lookup[float(row[0])] for row in hidden]),
    )
    count = len(products)
    tower = vision(torch.cat([torch.zeros(1, 1), features]), torch.zeros(1, count + 1, 1), torch.zeros(1, count + 1))
    return step(2, count, 1, vision=tower, clip=clip, **fields)


def test_the_cards_example():
    """p.t = [1, -2, 0, 3]: 1 and 2 stay, the mean of 0 and 3 comes behind them, a token of its own."""
    result = methods.build("trim", {"keep": 0.75}).reduce(sample([1, -2, 0, 3], features=[10, 20, 30, 50]))
    assert result.keep.tolist() == [0, 1, 3, 4, 4, 6]
    assert result.slots.tolist() == [4] and result.added.tolist() == [True]
    assert result.values.tolist() == [[(10 + 50) / 2]]


def test_the_sign_is_meant():
    """With the similarity itself, tokens 0 and 3 would stay."""
    assert methods.build("trim", {"keep": 0.75}).reduce(sample([-1, 2, 0, -3])).keep.tolist() == [0, 1, 2, 5, 5, 6]


def test_a_longer_question_vector_keeps_the_selection_but_not_the_outliers():
    products = [-1.0, -0.1, *[0.1 * index for index in range(14)]]
    kept = [
        methods.build("trim", {"keep": 0.5}).reduce(sample(products, question=(scale,))).keep.tolist()
        for scale in (1.0, 7.0)
    ]
    assert kept[0] == kept[1]
    counts = [outliers((-torch.tensor(products) * scale).softmax(0)) for scale in (0.1, 7.0)]
    assert counts[0] != counts[1]


def test_outliers_are_counted_on_weights_as_numpy_does():
    numpy = pytest.importorskip("numpy")
    weight = torch.rand(576, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(8).softmax(0) ** 3
    low, high = numpy.percentile(weight.numpy(), [25, 75])
    assert outliers(weight) == int((weight.numpy() > high + 1.5 * (high - low)).sum()) > 1
    assert outliers(torch.full((9,), 1 / 9)) == 1  # none: the card's guard


def test_the_papers_count():
    method = methods.build("trim", {"count": "outliers"})
    result = method.reduce(sample([-9, -8.5, *[0.01 * index for index in range(10)]]))
    assert result.keep.tolist() == [0, 1, 2, 3, 3, 14]
    with pytest.raises(MethodError, match="count depends on the sample"):
        method.schedule(shape(), 576)


@pytest.mark.parametrize("count", [192, 128, 64, 32, 2, 1])
def test_published_counts(count):
    """n + 1 = T; a single token is the best cell, not a mean."""
    method = methods.build("trim", {"keep": count / 576})
    assert method.schedule(shape(), 576) == [count] * 32
    products = torch.randn(576, generator=torch.Generator().manual_seed(1)).tolist()
    result = method.reduce(sample(products))
    assert len(result.keep) == count + 3
    assert (result.slots is None) == (count == 1)


def test_all_of_it_is_nothing_to_do():
    assert methods.build("trim", {"keep": 1}).reduce(sample([1, 2, 3])) is None


@pytest.mark.parametrize("preset", methods.method_class("trim").presets)
def test_presets(preset):
    method, count = methods.build("trim", methods.method_class("trim").presets[preset]), preset.split("@")[1]
    if count != "outliers":
        tiles = 5 if "next" in preset else 1
        assert method.schedule(replace(shape(), whole=((576, 576),) * tiles), 576 * tiles) == [int(count)] * 32


def test_the_outliers_of_an_image_do_not_depend_on_its_batch():
    subject_ = subject("llava")
    method = methods.build("trim", {"count": "outliers"})
    layouts = []
    for batch in ([0], [1], [0, 1], [1, 0]):
        inputs = subject_.batch(*(subject_.samples[row] for row in batch))
        model = subject_.model("sdpa")
        with torch.no_grad(), pruned(model, method, adapter=subject_.adapter(model)) as session:
            model(**inputs)
            layouts.append([tokens.origin.tolist() for tokens in session.trace.entering(3).samples])
    assert layouts[2] == layouts[0] + layouts[1] and layouts[3] == layouts[1] + layouts[0]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
def test_the_engines_promises(family):
    for given in ((), (("count", "outliers"),)):
        checks = {name: check for name, check in CHECKS.items() if name != "keep=1" or not given}
        found = list(verdicts(Case("trim", subject(family), given=given), checks))
        assert [verdict for verdict in found if verdict.status == "fail"] == []
        assert sum(verdict.status == "pass" for verdict in found) >= 8


def test_parameters():
    with pytest.raises(MethodError, match="trim: count must be keep or outliers, not 'all'"):
        methods.build("trim", {"count": "all"})
