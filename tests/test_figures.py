"""Figures: what is drawn is what the frame says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pruneval.reports import figures

QUALITY = pd.DataFrame(
    {
        "label": list("vabcd"),
        "method": ["vanilla", "a", "random", "c", "d"],
        "avg_in": [144.0, 72.0, 72.0, 36.0, 36.0],
        "tflops": [2.0, 1.0, 1.0, 0.5, 0.5],
        "relative": [100.0, 101.0, 90.0, 80.0, 80.0],
    }
)


def test_the_front_is_what_nothing_beats():
    front = figures.pareto(QUALITY, "tflops", "relative")
    assert list(front["label"]) == ["c", "d", "a"]  # vanilla costs more and is worse; equals share the front


def test_a_row_without_cost_or_score_is_no_point_of_the_front():
    holes = QUALITY.assign(tflops=[np.nan, 1, 1, 0.5, 0.5], relative=[100, 101, 90, np.nan, 80])
    assert list(figures.pareto(holes, "tflops", "relative")["label"]) == ["d", "a"]


def test_the_sigmoid_is_found_again():
    layers = np.arange(2, 32.0)
    rates = figures.sigmoid(layers, 0.25, 0.4, 17.0)
    assert figures.fit_sigmoid(layers, rates) == pytest.approx((0.25, 0.4, 17.0), rel=1e-3)
    assert figures.fit_sigmoid(layers, np.full(30, 0.5)) is None
    assert figures.fit_sigmoid(layers, np.random.default_rng(0).random(30)) is None


def test_quality_names_the_front_and_the_baselines():
    axes = figures.quality(QUALITY).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["a", "c", "d"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "methods", "vanilla", "random", "Pareto front",
    }  # fmt: skip


def test_rank_correlation_draws_neighbours_and_all_pairs():
    matrix = np.array([[1, 0.5, 0.1], [0.5, 1, 0.7], [0.1, 0.7, 1]])
    curve, full, *_ = figures.rank_correlation(matrix).axes
    assert list(curve.lines[0].get_ydata()) == [0.5, 0.7]
    assert np.array_equal(full.images[0].get_array(), matrix)


@pytest.mark.parametrize("names", [list("012"), ["fastv(keep=0.5)", "vtw", "vanilla"]])
def test_bars_add_up(names):
    frame = pd.DataFrame({"place": np.repeat(names, 2), "part": ["llm", "vision"] * 3, "tflops": [3.0, 1, 2, 1, 1, 1]})
    bars = figures.cost_breakdown(frame).axes[0].containers
    lying = len(names[0]) > 3
    ends = [(bar.get_x() + bar.get_width()) if lying else (bar.get_y() + bar.get_height()) for bar in bars[-1]]
    assert ends == [4.0, 3.0, 2.0]


def test_the_best_so_far_never_falls():
    frame = pd.DataFrame({"step": range(5), "objective": [1.0, 3.0, 2.0, 5.0, 4.0]})
    assert list(figures.search_history(frame).axes[0].lines[0].get_ydata()) == [1, 3, 3, 5, 5]
    assert list(figures.search_history(frame, lower_is_better=True).axes[0].lines[0].get_ydata()) == [1] * 5


def test_other_curves_follow_their_frames():
    heads = pd.DataFrame({"kind": "all", "layer": [0, 1], "low": [0.1, 0], "median": [0.2, 0.1], "high": [0.3, 0.2]})
    assert list(figures.attention(heads).axes[0].lines[0].get_ydata()) == [0.2, 0.1]
    knob = pd.DataFrame({"label": "fastv", "k": [3, 1, 2], "tflops": [30.0, 10.0, 20.0]})
    assert list(figures.k_against_cost(knob).axes[0].lines[0].get_ydata()) == [10, 20, 30]
    rates = pd.DataFrame({"label": "x", "layer": [0, 1, 2, 3], "keep": [1, 1, 0.5, 0.5]})
    assert list(figures.keep_rates(rates).axes[0].lines[0].get_ydata()) == [1, 1, 0.5, 0.5]


def test_the_same_figure_is_the_same_text():
    assert figures.svg(figures.quality(QUALITY)) == figures.svg(figures.quality(QUALITY))
