"""The figures, each a function of a data frame. Every one can be drawn from a program; the HTML page takes them as SVG.

quality           label, method, avg_in, tflops, relative      accuracy against cost, with the Pareto front
keep_rates        label, layer, keep                           keep rate over layers, with the fitted sigmoid
rank_correlation  a matrix (layers, layers)                    Kendall's tau: next layer, and all pairs
attention         kind, layer, low, median, high               attention of visual tokens over layers
k_against_cost    label, k, tflops                             what a knob costs
cost_breakdown    place, part, tflops                          cost by part, per layer or per method
search_history    step, objective                              what a search has found, and the best so far
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT = "#1b1f24", "#9aa4ae"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""
NAMED = {"vanilla": ("#000000", "s"), "random": ("#d55e00", "X"), "uniform": ("#e69f00", "P")}
AXES = {
    "tflops": "TFLOPs (implied, prefill)",
    "avg_in": "visual tokens per layer (avg_in)",
    "relative": "score relative to vanilla (%)",
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pruneval", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": INK, "figure.dpi": 100,
}  # fmt: skip


def svg(figure: Figure) -> str:
    """The figure as SVG; the same figure gives the same text."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return out.getvalue()


def pareto(frame: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """Rows that no other row beats: none costs at most as much and gains at least as much, one of the two strictly."""
    ordered = frame.dropna(subset=[cost, gain]).sort_values([cost, gain], ascending=[True, False], kind="stable")
    best = ordered[gain].cummax().shift(fill_value=-np.inf)
    kept = ordered[ordered[gain] > best]
    twins = ordered.merge(kept[[cost, gain]].drop_duplicates(), on=[cost, gain])
    return twins[list(frame.columns)]


def quality(frame: pd.DataFrame, cost: str = "tflops") -> Figure:
    """Score relative to vanilla against a cost; names stand at the front and at the baselines."""
    figure, axes = _axes(6.4, 4.2)
    frame = frame.dropna(subset=[cost, "relative"])
    front = pareto(frame, cost, "relative")
    others = frame[~frame["method"].isin(NAMED)]
    axes.scatter(others[cost], others["relative"], s=16, color=COLOURS[0], alpha=0.55, label="methods", zorder=3)
    for method, (colour, marker) in NAMED.items():
        mine = frame[frame["method"] == method]
        if len(mine):
            axes.scatter(mine[cost], mine["relative"], s=34, color=colour, marker=marker, label=method, zorder=4)
    axes.plot(front[cost], front["relative"], color=COLOURS[2], lw=1.2, zorder=2, label="Pareto front")
    for at, (_, point) in enumerate(front.iterrows()):
        place = (4, -11 if at % 2 else 5)
        axes.annotate(point["method"], (point[cost], point["relative"]), place, textcoords="offset points", fontsize=7)
    axes.set_xlabel(AXES.get(cost, cost))
    axes.set_ylabel(AXES["relative"])
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def keep_rates(frame: pd.DataFrame, fitted: bool = True) -> Figure:
    """Share of the visual tokens that enters each layer; dashed the sigmoid fitted to each label's rates."""
    figure, axes = _axes(6.4, 3.6)
    for (label, rows), colour in zip(frame.groupby("label", sort=False), _cycle(), strict=False):
        axes.step(rows["layer"], rows["keep"], where="mid", color=colour, label=str(label), lw=1.4)
        curve = fit_sigmoid(rows["layer"].to_numpy(float), rows["keep"].to_numpy(float)) if fitted else None
        if curve is not None:
            axes.plot(rows["layer"], sigmoid(rows["layer"].to_numpy(float), *curve), "--", color=colour, lw=1)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("decoder layer (0-based)")
    axes.set_ylabel("keep (visual tokens entering / all)")
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def sigmoid(layers: np.ndarray, height: float, slope: float, middle: float) -> np.ndarray:
    """The falling form of P-Sigmoid: height / (1 + exp(slope * (layer - middle)))."""
    return height / (1 + np.exp(np.clip(slope * (layers - middle), -60, 60)))


def fit_sigmoid(layers: np.ndarray, keep: np.ndarray) -> tuple[float, float, float] | None:
    """(height, slope, middle) by least squares; None where that leaves over a tenth of the rates' variance."""
    from scipy.optimize import curve_fit

    if len(keep) < 4 or np.ptp(keep) < 1e-9:
        return None
    start = (float(keep.max()), 0.2, float(layers.mean()))
    bounds = ([0.0, 0.0, float(layers.min()) - 100], [4.0, 20.0, float(layers.max()) + 100])
    try:
        found, _ = curve_fit(sigmoid, layers, keep, p0=start, bounds=bounds, maxfev=5000)
    except (RuntimeError, ValueError):
        return None
    left = np.square(keep - sigmoid(layers, *found)).mean() / np.var(keep)
    return tuple(float(value) for value in found) if left <= 0.1 else None  # type: ignore[return-value]


def rank_correlation(matrix: np.ndarray) -> Figure:
    """Kendall's tau between the rankings of visual tokens by layers: neighbours as a curve, all pairs as a map."""
    figure, (curve, full) = _axes(9.2, 3.8, columns=2)
    layers = np.arange(len(matrix))
    curve.plot(layers[:-1], np.diagonal(matrix, 1), "o-", color=COLOURS[0], ms=3)
    curve.axhline(0, color=SOFT, lw=0.8)
    curve.set_ylim(min(-0.05, float(np.nanmin(np.diagonal(matrix, 1), initial=0))) - 0.05, 1.02)
    curve.set_xlabel("decoder layer l (0-based)")
    curve.set_ylabel("Kendall's τ of layers l and l + 1")
    image = full.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
    full.set_xlabel("decoder layer")
    full.set_ylabel("decoder layer")
    figure.colorbar(image, ax=full, shrink=0.85, label="Kendall's τ")
    return figure


def attention(frame: pd.DataFrame) -> Figure:
    """What visual tokens get of the last rows' attention, layer by layer: median, and the quartiles as a band."""
    figure, axes = _axes(6.4, 3.6)
    for (kind, rows), colour in zip(frame.groupby("kind", sort=False), _cycle(), strict=False):
        axes.plot(rows["layer"], rows["median"], "o-", ms=3, color=colour, label=str(kind))
        axes.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
    axes.set_xlabel("decoder layer (0-based)")
    axes.set_ylabel("attention")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def k_against_cost(frame: pd.DataFrame, name: str = "k") -> Figure:
    """A method's knob against what it costs."""
    figure, axes = _axes(5.6, 3.4)
    for (label, rows), colour in zip(frame.groupby("label", sort=False), _cycle(), strict=False):
        rows = rows.sort_values("k")
        axes.plot(rows["k"], rows["tflops"], "o-", ms=3, color=colour, label=str(label))
    axes.set_xlabel(name)
    axes.set_ylabel(AXES["tflops"])
    axes.legend(frameon=False, fontsize=8)
    return figure


def cost_breakdown(frame: pd.DataFrame) -> Figure:
    """Stacked bars: what each place (a layer or a method) spends on each part."""
    table = frame.pivot_table(index="place", columns="part", values="tflops", aggfunc="sum", sort=False).fillna(0.0)
    names = [str(name) for name in table.index]
    lying = any(len(name) > 3 for name in names)
    long = min(12.0, 0.2 * len(table) + 1.6)
    figure, axes = _axes(8.4, long) if lying else _axes(max(6.4, long), 3.8)
    below = np.zeros(len(table))
    for part, colour in zip(table.columns, _cycle(), strict=False):
        values = table[part].to_numpy()
        if lying:
            axes.barh(names, values, left=below, color=colour, label=str(part), height=0.8)
        else:
            axes.bar(names, values, bottom=below, color=colour, label=str(part), width=0.8)
        below = below + values
    if lying:
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
    (axes.set_xlabel if lying else axes.set_ylabel)("TFLOPs (implied)")
    axes.legend(fontsize=7, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def search_history(frame: pd.DataFrame, lower_is_better: bool = False) -> Figure:
    """Every evaluation of a search and the best found so far."""
    figure, axes = _axes(6.0, 3.4)
    best = frame["objective"].cummin() if lower_is_better else frame["objective"].cummax()
    axes.scatter(frame["step"], frame["objective"], s=12, color=SOFT, label="evaluated")
    axes.step(frame["step"], best, where="post", color=COLOURS[0], label="best so far")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("objective" + (" (lower is better)" if lower_is_better else ""))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes | np.ndarray = figure.subplots(1, columns)
    return figure, axes


def _cycle() -> list[str]:
    return list(COLOURS) * 8
