"""Paired tests and intervals: against statsmodels and scipy, on equal methods, and on planted differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, ttest_rel, wilcoxon
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from pruneval.reports import statistics


def drawn(n=200, share=0.7, seed=0):
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def frame(correct, images=None):
    rows = pd.DataFrame({"doc_id": range(len(correct)), "prompt_hash": "p", "correct": correct})
    return rows if images is None else rows.assign(image=images)


def paired(first, second):
    return statistics.paired(statistics.answers(first), statistics.answers(second))


def test_right_or_wrong_is_tested_by_mcnemar():
    a, b = drawn(seed=1), drawn(seed=2, share=0.5)
    found = statistics.compare(a, b)
    table = [[((a == x) & (b == y)).sum() for y in (1, 0)] for x in (1, 0)]
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.stderr == pytest.approx((a - b).std(ddof=1) / len(a) ** 0.5)


def test_fractions_are_tested_by_a_paired_t_test():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 11, 80) / 10, draw.integers(0, 8, 80) / 10
    found = statistics.compare(a, b)
    assert found.test == "paired t"
    assert found.p == pytest.approx(ttest_rel(a, b).pvalue)
    assert (found.p < 0.05) == (wilcoxon(a, b).pvalue < 0.05)


def test_questions_about_one_image_are_clustered():
    draw = np.random.default_rng(3)
    images = np.repeat(np.arange(40), draw.integers(1, 9, 40))
    a, b = drawn(len(images), seed=4), drawn(len(images), 0.6, seed=5)
    found = statistics.compare(a, b, images)
    fit = OLS(a - b, np.ones(len(a))).fit(cov_type="cluster", cov_kwds={"groups": images}, use_t=True)
    assert found.test == "clustered" and found.units == 40 and found.n == len(images)
    assert (found.mean, found.stderr, found.p) == pytest.approx((fit.params[0], fit.bse[0], fit.pvalues[0]))


def test_copies_of_a_question_add_no_evidence():
    a, b = drawn(60, seed=6), drawn(60, 0.55, seed=7)
    once = statistics.compare(a, b, np.arange(60))
    tenfold = statistics.compare(np.repeat(a, 10), np.repeat(b, 10), np.repeat(np.arange(60), 10))
    assert tenfold.stderr == pytest.approx(once.stderr)
    assert tenfold.p > 0.5 * once.p
    wide = statistics.interval(np.repeat(a, 10), np.repeat(b, 10), np.repeat(np.arange(60), 10))
    assert wide == pytest.approx(statistics.interval(a, b), abs=0.02)


def test_identical_methods_are_never_told_apart():
    a = drawn()
    for images in (None, np.arange(200) // 2):
        found = statistics.compare(a, a, images)
        assert (found.mean, found.stderr, found.p, found.detectable) == (0.0, 0.0, 1.0, 0.0)
    assert statistics.together([statistics.compare(a, a)] * 5).p == 1.0
    assert statistics.interval(a, a) == (0.0, 0.0)


def test_chance_is_found_in_one_of_twenty_repetitions():
    draw = np.random.default_rng(8)
    images = np.arange(240) // 3
    of_image = draw.random((300, 80))  # questions about one image go well or badly together

    def of(at):
        return (draw.random(240) < np.repeat(of_image[at], 3)).astype(float)

    hits = [statistics.compare(of(at), of(at), images).p < 0.05 for at in range(300)]
    assert 0.02 < np.mean(hits) < 0.09


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(9)
    inside = 0
    for _ in range(120):
        a, b = (draw.random(150) < 0.7).astype(float), (draw.random(150) < 0.6).astype(float)
        low, high = statistics.interval(a, b)
        inside += low <= 0.1 <= high
    assert 0.88 < inside / 120 <= 1.0


def test_the_interval_is_scipys():
    a, b, images = drawn(seed=13), drawn(share=0.6, seed=14), np.arange(200) // 2
    sums, sizes = np.bincount(images, a - b), np.bincount(images)
    theirs = bootstrap(
        (sums, sizes), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), paired=True, method="percentile",
        n_resamples=5000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert statistics.interval(a, b, images) == pytest.approx(tuple(theirs), abs=0.01)


def test_holm_is_statsmodels():
    for values in ([0.001, 0.04, 0.03, 0.5], [0.5], np.random.default_rng(15).random(40) ** 4):
        assert statistics.holm(values) == pytest.approx(multipletests(values, method="holm")[1])
    assert statistics.holm([]) == []


@pytest.mark.parametrize("gained, lost", [(1, 0), (3, 9), (4, 4), (0, 30), (120, 70)])
def test_mcnemar_is_statsmodels(gained, lost):
    a = np.array([1.0] * gained + [0.0] * lost + [1.0] * 5)
    b = np.array([0.0] * gained + [1.0] * lost + [1.0] * 5)
    assert statistics.compare(a, b).p == pytest.approx(mcnemar([[5, gained], [lost, 0]], exact=True).pvalue)


@pytest.mark.parametrize("units", [2, 5, 40, 1000])
def test_the_smallest_detectable_difference_is_statsmodels(units):
    found = statistics.Difference(0.1, 0.02, 0.5, 2 * units, units, "clustered")
    effect = TTestPower().solve_power(nobs=units, alpha=0.05, power=0.8)
    assert found.detectable == pytest.approx(0.02 * units**0.5 * float(np.squeeze(effect)), rel=1e-4)


def test_the_smallest_detectable_difference_is_detected_in_four_of_five():
    draw = np.random.default_rng(10)
    found = statistics.compare(draw.normal(0, 1, 100) + 0.5, draw.normal(0, 1, 100))
    sigma = found.stderr * 10
    shifted = draw.normal(found.detectable, sigma, (400, 100))
    hits = [statistics.compare(row, np.zeros(100)).p < 0.05 for row in shifted]
    assert 0.73 < np.mean(hits) < 0.87


def test_samples_are_matched_by_question_and_prompt():
    a, b = drawn(50, seed=11), drawn(50, seed=12)
    found = paired(frame(a), frame(b).sample(frac=1, random_state=0))
    assert found.mean == pytest.approx(a.mean() - b.mean()) and found.n == 50
    other = frame(b).assign(prompt_hash=["q"] * 10 + ["p"] * 40)
    assert paired(frame(a), other).n == 40
    assert paired(frame(a), frame(b).iloc[:0]) is None


def test_an_unknown_image_stands_alone():
    images = ["x", "x", None, None, "y"]
    found = paired(frame([1.0, 1, 0, 1, 0], images), frame([0.0, 1, 1, 1, 1], images))
    assert found.units == 4
