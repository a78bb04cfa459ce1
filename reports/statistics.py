"""Which differences are more than chance: paired tests on the same questions, question by question.

Questions about one image are not independent, so wherever images repeat the unit is the image. Tests and intervals
come from statsmodels and scipy; here they are only fed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
POWER = 0.8
RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """How much better one method answers the same questions than another, in shares of right answers."""

    mean: float
    """Mean over questions of (first - second), in [-1, 1]."""
    stderr: float
    """Standard error of `mean`, images as units where they repeat."""
    p: float
    """Two-sided; 1 where the two answered alike."""
    n: int
    """Questions both have answered."""
    units: int
    """Independent units among them: images, or questions where no image repeats."""
    test: str
    """"mcnemar" (exact), "clustered" (t test over images) or "paired t"."""

    @property
    def detectable(self) -> float:
        """The smallest true difference found 4 times out of 5 at the 5 % level, with this n and spread."""
        return detectable(self.stderr, self.units)


def paired(first: pd.DataFrame, second: pd.DataFrame) -> Difference | None:
    """Compare two methods' samples of one benchmark; None when they have fewer than two units in common.

    Args:
        first: rows with `doc_id`, `correct` and, if known, `prompt_hash` and `image`.
        second: the same of the other method. A question is the same when its number and its prompt are.
    """
    return compare(*matched(first, second))


def paired_interval(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float]:
    """`interval` of two methods' samples."""
    return interval(*matched(first, second))


def matched(first: pd.DataFrame, second: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What both answered: two arrays (n,) of correctness in one order, and each question's image where known."""
    keys = [key for key in ("doc_id", "prompt_hash") if key in first and key in second]
    if len(first) == len(second) and all((first[key].to_numpy() == second[key].to_numpy()).all() for key in keys):
        both, other = first, second["correct"]
    else:
        both = first.merge(second[[*keys, "correct"]], on=keys, suffixes=("", "_second"))
        other = both["correct_second"]
    return both["correct"].to_numpy(float), other.to_numpy(float), _images(both)


def compare(a: np.ndarray, b: np.ndarray, images: Sequence[Any] | None = None) -> Difference | None:
    """The same for two arrays (n,) in the same order; `images` (n,) names each question's image, or None.

    Exact McNemar where answers are right or wrong and no image repeats; a t test with errors clustered by image where
    one does; a paired t test where answers are worth fractions.
    """
    delta = np.asarray(a, float) - np.asarray(b, float)
    codes = np.arange(len(delta)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]
    units = int(codes.max()) + 1 if len(codes) else 0
    if units < 2:
        return None
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    test = "clustered" if units < len(delta) else "mcnemar" if binary else "paired t"
    if not delta.any():
        return Difference(0.0, 0.0, 1.0, len(delta), units, test)
    mean, stderr, p = _clustered(delta, codes)
    if test == "mcnemar":
        p = _mcnemar(int((delta > 0).sum()), int((delta < 0).sum()))
    return Difference(mean, stderr, p, len(delta), units, test)


def together(parts: Sequence[Difference]) -> Difference | None:
    """The mean over benchmarks of their differences; benchmarks are independent of each other."""
    if not parts:
        return None
    from scipy.stats import norm

    mean = float(np.mean([part.mean for part in parts]))
    stderr = math.sqrt(sum(part.stderr**2 for part in parts)) / len(parts)
    p = float(2 * norm.sf(abs(mean) / stderr)) if stderr else 1.0 if mean == 0 else 0.0
    return Difference(mean, stderr, p, sum(part.n for part in parts), sum(part.units for part in parts), "z")


def interval(a: np.ndarray, b: np.ndarray, images: Sequence[Any] | None = None) -> tuple[float, float]:
    """The 95 % interval of mean(a - b) by paired bootstrap over images (percentiles, fixed seed)."""
    from scipy.stats import bootstrap

    delta = np.asarray(a, float) - np.asarray(b, float)
    codes = np.arange(len(delta)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]
    sums, sizes = np.bincount(codes, delta), np.bincount(codes).astype(float)
    if len(sums) < 2 or not delta.any():
        return float(delta.mean()), float(delta.mean())
    found = bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for there being many of them (Holm)."""
    if not len(values):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(values), alpha=LEVEL, method="holm")[1]]


def detectable(stderr: float, units: int) -> float:
    """The smallest true difference a two-sided paired t test at 5 % finds with a power of 80 %."""
    return stderr * math.sqrt(units) * _effect(units) if stderr else 0.0


@cache
def _effect(units: int) -> float:
    from statsmodels.stats.power import TTestPower

    return float(np.squeeze(TTestPower().solve_power(nobs=units, alpha=LEVEL, power=POWER)))


def _clustered(delta: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """Mean, its standard error with images as units, and p of a t test; the usual one when no code repeats.

    What a regression on a constant gives with errors clustered by `codes`, without building one thousands of times.
    """
    from scipy.stats import t

    mean = float(delta.mean())
    sums = np.bincount(codes, delta - mean)
    units = len(sums)
    stderr = float(np.sqrt(units / (units - 1) * (sums**2).sum()) / len(delta))
    return mean, stderr, float(2 * t.sf(abs(mean) / stderr, units - 1)) if stderr else 0.0


@cache
def _mcnemar(gained: int, lost: int) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    return float(min(1.0, mcnemar([[0, gained], [lost, 0]], exact=True).pvalue))


def _images(rows: pd.DataFrame) -> np.ndarray | None:
    """Each row's image; a row without a known one stands alone."""
    if "image" not in rows or rows["image"].isna().all():
        return None
    alone = np.array([f"question {key}" for key in rows.index], dtype=object)
    return np.where(rows["image"].isna(), alone, rows["image"].astype(object))
