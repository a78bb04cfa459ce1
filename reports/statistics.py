"""Which differences are more than chance: paired tests on the same questions, question by question.

Questions about one image are not independent, so wherever images repeat the unit is the image. Distributions are
scipy.special's: statsmodels and scipy.stats, which the tests hold these functions against, take longer to import than
a report takes to make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

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
        if not self.stderr:
            return 0.0
        from scipy.special import nctdtrinc, stdtrit

        free = self.units - 1
        return float(self.stderr * nctdtrinc(free, 1 - POWER, stdtrit(free, 1 - LEVEL / 2)))


@dataclass(frozen=True)
class Answers:
    """How a method answered a benchmark's questions; everything (n,), in one order."""

    number: np.ndarray
    prompt: np.ndarray
    """A question is the same when its number and its prompt (a digest) are."""
    correct: np.ndarray
    """In [0, 1]."""
    image: np.ndarray | None = None
    """Numbers; equal where questions are about one image. None: every question stands alone."""


def answers(rows: Mapping[str, Any]) -> Answers:
    """A record's samples as arrays.

    Args:
        rows: a data frame or a mapping with `doc_id`, `correct` and, if known, `prompt_hash` and `image` (texts; a row
            without one stands alone).
    """
    number = np.asarray(rows["doc_id"])
    prompt = np.asarray(rows["prompt_hash"] if "prompt_hash" in rows else [""] * len(number), dtype=str)
    image = None
    if "image" in rows:
        places: dict[str, int] = {}
        names = (name if isinstance(name, str) else "" for name in rows["image"])
        codes = np.array([places.setdefault(name, len(places)) if name else -1 for name in names], dtype=int)
        alone = codes < 0
        if not alone.all():
            image = np.where(alone, len(places) - 1 + np.cumsum(alone), codes)
    return Answers(number, prompt, np.asarray(rows["correct"], dtype=float), image)


def paired(first: Answers, second: Answers) -> Difference | None:
    """Compare two methods on one benchmark; None when they have fewer than two units in common."""
    return compare(*matched(first, second))


def paired_interval(first: Answers, second: Answers) -> tuple[float, float]:
    """`interval` of two methods' answers."""
    return interval(*matched(first, second))


def matched(first: Answers, second: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What both answered: correctness in one order, and each question's image where known."""
    if np.array_equal(first.number, second.number) and np.array_equal(first.prompt, second.prompt):
        return first.correct, second.correct, first.image
    place = {key: at for at, key in enumerate(zip(second.number.tolist(), second.prompt.tolist(), strict=True))}
    keys = list(zip(first.number.tolist(), first.prompt.tolist(), strict=True))
    mine = [at for at, key in enumerate(keys) if key in place]
    theirs = [place[keys[at]] for at in mine]
    return first.correct[mine], second.correct[theirs], None if first.image is None else first.image[mine]


def compare(a: np.ndarray, b: np.ndarray, images: Sequence[Any] | np.ndarray | None = None) -> Difference | None:
    """The same for two arrays (n,) in the same order; `images` (n,) names each question's image, or None.

    Exact McNemar where answers are right or wrong and no image repeats; a t test with errors clustered by image where
    one does; a paired t test where answers are worth fractions.
    """
    delta = np.asarray(a, float) - np.asarray(b, float)
    codes = _codes(delta, images)
    units = int(codes.max(initial=-1)) + 1
    if units < 2:
        return None
    binary = _binary(a) and _binary(b)
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
    from scipy.special import ndtr

    mean = float(np.mean([part.mean for part in parts]))
    stderr = math.sqrt(sum(part.stderr**2 for part in parts)) / len(parts)
    p = float(2 * ndtr(-abs(mean) / stderr)) if stderr else 1.0 if mean == 0 else 0.0
    return Difference(mean, stderr, p, sum(part.n for part in parts), sum(part.units for part in parts), "z")


def interval(a: np.ndarray, b: np.ndarray, images: Sequence[Any] | np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of mean(a - b) by paired bootstrap over images (percentiles, fixed seed).

    The draws are shared by all comparisons with as many images, so that thousands take seconds.
    """
    delta = np.asarray(a, float) - np.asarray(b, float)
    codes = _codes(delta, images)
    sums, sizes = np.bincount(codes, delta), np.bincount(codes).astype(float)
    if len(sums) < 2 or not delta.any():
        return float(delta.mean()), float(delta.mean())
    times = _draws(len(sums))
    low, high = np.quantile((times @ sums) / (times @ sizes), [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _draws(units: int) -> np.ndarray:
    """(RESAMPLES, units) how often each unit is drawn."""
    return np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), RESAMPLES).astype(float)


def _codes(delta: np.ndarray, images: Sequence[Any] | np.ndarray | None) -> np.ndarray:
    """Each question's unit, numbered without gaps."""
    if images is None:
        return np.arange(len(delta))
    codes = np.asarray(images)
    if codes.dtype.kind == "i" and codes.min(initial=0) >= 0 and np.bincount(codes).all():
        return codes
    return np.unique(codes, return_inverse=True)[1]


def _binary(correct: np.ndarray) -> bool:
    return bool(((correct == 0) | (correct == 1)).all())


def holm(values: Sequence[float]) -> list[float]:
    """P values corrected for there being many of them (Holm), in the order they came in."""
    order = np.argsort(values, kind="stable")
    raised = np.asarray(values, float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return [float(p) for p in corrected]


def _clustered(delta: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """Mean, its standard error with images as units, and p of a t test; the usual one when no code repeats.

    What a regression on a constant gives with errors clustered by `codes`, without building one thousands of times.
    """
    from scipy.special import stdtr

    mean = float(delta.mean())
    sums = np.bincount(codes, delta - mean)
    units = len(sums)
    stderr = float(np.sqrt(units / (units - 1) * (sums**2).sum()) / len(delta))
    return mean, stderr, float(2 * stdtr(units - 1, -abs(mean) / stderr)) if stderr else 0.0


def _mcnemar(gained: int, lost: int) -> float:
    from scipy.special import bdtr

    return float(min(1.0, 2 * bdtr(min(gained, lost), gained + lost, 0.5)))
