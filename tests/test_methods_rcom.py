"""RCom: how many stand out, what is recovered, what the centres take in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.conformance import Case, verdicts
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject
from pruneval.methods import MethodError, rcom
from pruneval.methods.lof import local_outliers
from pruneval.methods.rcom import split


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rates(monkeypatch, *values):
    """The three rates of a sample, given."""
    waiting = list(values)
    asked = []

    def given(scores, neighbours):
        asked.append((len(scores), neighbours))
        return waiting.pop(0)

    monkeypatch.setattr(rcom, "local_outliers", given)
    return asked


def sample(features, salience, toward, keys=None, **fields):
    """One image of cells with CLS attention proportional to `salience` and this cosine with the question."""
    count = len(features)
    salience, toward = (torch.tensor(each, dtype=torch.float64) for each in (salience, toward))
    tower = vision(torch.zeros(count + 1, 1), torch.zeros(1), torch.zeros(1, count + 1))
    # One dimension scores, the others are keys: the query of CLS looks at the first alone.
    keys = torch.zeros(count, 1) if keys is None else torch.tensor(keys)
    keys = torch.cat([salience.log()[:, None] * (1 + keys.shape[1]) ** 0.5, keys.double()], dim=1)
    keys = torch.cat([torch.full_like(keys[:1], -1e9), keys])
    query = torch.zeros_like(keys)
    query[:, 0] = 1
    attention = SimpleNamespace(query=query[None], key=keys[None])
    features = torch.tensor(features, dtype=torch.float64)[:, None]
    pointing = torch.stack([toward, (1 - toward**2).sqrt()], dim=1) * 7
    tower.attention = lambda layer: [attention]
    tower.hidden = lambda layer: [torch.nn.functional.pad(pointing if layer == 23 else features, (0, 0, 1, 0))]
    clip = SimpleNamespace(padded=torch.tensor([3.0, 0.0]).double(), project=lambda hidden, norm: hidden)
    return step(2, count, 1, vision=tower, clip=clip, **fields)


# How many


@pytest.mark.parametrize("neighbours", [10, 20])
@pytest.mark.parametrize("n", [8, 57, 576])
def test_the_local_outlier_factor_is_scikit_learns(n, neighbours):
    for seed in range(5):
        scores = drawn(n, seed=seed).exp() / n
        expected = LocalOutlierFactor(n_neighbors=min(neighbours, n - 1)).fit_predict(scores[:, None].numpy())
        assert local_outliers(scores, neighbours) == (expected == -1).mean()


def test_equal_scores_have_no_outliers_but_one_token_stays():
    assert local_outliers(torch.full((40,), 0.3), 20) == 0 and local_outliers(torch.ones(1), 20) == 0
    result = methods.build("rcom").reduce(sample(list(range(30)), [1.0] * 30, [0.5] * 30))
    assert result.keep.tolist() == [0, 1, 2, 32] and result.slots is None


def test_whose_neighbours_and_how_many(monkeypatch):
    """20 for attention and question (over all, attention's own lowered), 10 for the rest."""
    asked = rates(monkeypatch, 0.25, 0.5, 0.5)
    methods.build("rcom").reduce(sample([1.0] * 8, range(1, 9), [0.1 * i for i in range(8)]))
    assert asked == [(8, 20), (8, 20), (3, 10)]


# Which, and what becomes of the others

SALIENCE, TOWARD, FEATURES = [8, 1, 2, 3, 4, 7], [0.9, 0.8, 0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def test_the_largest_stay_the_question_recovers_the_rest_is_folded(monkeypatch):
    """V = {0, 5}; of the others the question points at 1; R = {2, 3, 4} with centre 4, which takes in 2 and 3."""
    rates(monkeypatch, 2 / 6, 1 / 4, 1 / 3)
    result = methods.build("rcom").reduce(sample(FEATURES, SALIENCE, TOWARD))
    assert result.keep.tolist() == [0, 1, 2, 3, 7, 6, 6, 8]
    assert result.slots.tolist() == [5, 6] and result.added.tolist() == [False, True]
    a = torch.tensor(SALIENCE, dtype=torch.float64) / 25
    folded = float(a[2] * 4 + a[3] * 8)
    assert result.values[:, 0].tolist() == pytest.approx([16 + folded, folded])


def test_without_centres_the_last_token_goes_too(monkeypatch):
    rates(monkeypatch, 2 / 6, 1 / 4, 0.1)
    result = methods.build("rcom").reduce(sample(FEATURES, SALIENCE, TOWARD))
    assert result.keep.tolist() == [0, 1, 2, 3, 7, 8] and result.slots is None


def test_all_outliers_is_nothing_to_do(monkeypatch):
    rates(monkeypatch, 1.0, 1.0, 1.0)
    assert methods.build("rcom").reduce(sample(FEATURES, SALIENCE, TOWARD)) is None


def test_what_is_taken_in_is_near_by_keys_and_question(monkeypatch):
    """One neighbour each: keys choose among cells that the question likes alike, and lose against fifty times it."""
    monkeypatch.setattr(rcom, "NEAREST", 1)
    salience, keys = [9, 5, 4, 3], [[0.0, 0.0], [1e6, 0.0], [0.0, 1e6], [1e6, 1.0]]
    for toward, taken in [([0.9, 0.0, 0.0, 0.0], 3), ([0.9, 0.0, 0.5, 0.0], 2)]:
        rates(monkeypatch, 0.25, 0.0, 0.34)
        result = methods.build("rcom").reduce(sample([1.0, 2.0, 4.0, 8.0], salience, toward, keys))
        a = torch.tensor(salience, dtype=torch.float64) / 21
        feature = {2: 4.0, 3: 8.0}[taken]
        assert float(result.values[0]) == pytest.approx(2 + float(a[taken]) * feature)


def test_the_released_slips(monkeypatch):
    """R = {1, 2, 3} with centre 1, whose key is nearest to that of 2. The code looks the keys of R up as 0, 1, 2: there
    the first and the last are alike, which it takes for 1 and 3. Its share of centres is of the features' width, 1.
    """
    monkeypatch.setattr(rcom, "NEAREST", 1)
    salience, keys = [9.0, 5.0, 4.0, 3.0], [[1e6, 0.0], [0.0, 1e6], [1e6, 1e3], [0.0, 0.0]]
    a = torch.tensor(salience, dtype=torch.float64) / 21
    for version, share, taken in [("paper", 0.34, a[2] * 4), ("released", 1.0, a[3] * 8)]:
        rates(monkeypatch, 0.25, 0.0, share)
        method = methods.build("rcom", {"version": version})
        result = method.reduce(sample([1.0, 2.0, 4.0, 8.0], salience, [0.0] * 4, keys))
        assert result.keep.tolist() == [0, 1, 2, 3, 3, 6]
        assert float(result.values[0]) == pytest.approx(2 + float(taken))


# Counts


@pytest.mark.parametrize("total", range(1, 200))
def test_a_fixed_number_is_met(total):
    seen, recovered, centres = split(total)
    assert seen >= 1 and seen + recovered + centres + (centres > 0) == total


@pytest.mark.parametrize("count", [192, 57, 2, 1, 575])
def test_budgets(count):
    method = methods.build("rcom", {"count": "keep", "keep": count / 576})
    assert method.schedule(shape(), 576) == [count] * 32
    result = method.reduce(sample(range(576), drawn(576).exp().tolist(), drawn(576, seed=1).tanh().tolist()))
    visual = [index for index in result.keep.tolist() if 2 <= index < 578]
    kept = split(count)[0] + split(count)[1]
    assert len(visual) == count and visual[:kept] == sorted(set(visual[:kept]))
    assert methods.build("rcom", {"count": "keep", "keep": 1}).reduce(sample([1, 2], [1, 2], [0, 0])) is None


# On models


def test_the_outliers_of_an_image_do_not_depend_on_its_batch():
    tiny, layouts = subject("llava"), []
    model = tiny.model("sdpa")
    for rows in ([0], [1], [0, 1]):
        inputs = tiny.batch(*(tiny.samples[row] for row in rows))
        with torch.no_grad(), pruned(model, methods.build("rcom"), adapter=tiny.adapter(model)) as session:
            model(**inputs)
            layouts.append([tokens.origin.tolist() for tokens in session.trace.entering(3).samples])
            assert all(session.trace.budget(row).final < session.trace.budget(row).visual for row in range(len(rows)))
    assert layouts[2] == layouts[0] + layouts[1]


def test_the_engines_promises():
    found = list(verdicts(Case("rcom", subject("llava"), given=(("count", "keep"),))))
    assert [verdict for verdict in found if verdict.status == "fail"] == []
    assert sum(verdict.status == "pass" for verdict in found) >= 9
    for family, reason in [("llava_next", "one tile with a CLS token"), ("qwen2_5_vl", "one tile with a CLS token")]:
        (verdict,) = verdicts(Case("rcom", subject(family), given=(("count", "keep"),)))
        assert verdict.status == "n/a" and reason in verdict.note


def test_parameters():
    with pytest.raises(MethodError, match="rcom: the sample decides how many tokens stay; for a budget set count=keep"):
        methods.build("rcom", {"keep": 0.3})
    with pytest.raises(MethodError, match="rcom: version must be paper or released, not 'code'"):
        methods.build("rcom", {"version": "code"})
    with pytest.raises(MethodError, match="count depends on the sample"):
        methods.build("rcom").schedule(shape(), 576)
    assert set(methods.method_class("rcom").presets) == {"llava-1.5-7b@outliers", "llava-1.5-7b@released"}
