"""What an evaluation gives: scores with their standard errors, and one row per sample."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import UserError
from pruneval.harness.guards import WITHOUT_MEANING
from pruneval.harness.uncertainty import mean_error, standard_error
from pruneval.tasks import Benchmark

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_COLUMNS = (
    "doc_id", "prompt_hash", "prompt", "image", "answer", "correct", "target",
    "visual_tokens", "avg_in", "kept_after", "final", "keep", "early", "error",
)  # fmt: skip
WORTH = ("score", "correct", "true_false")
"""Where the values of a row say how right it is, from 0 to 1."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gives."""

    scores: dict[str, dict[str, Any]]
    """metric -> {"value", "n", "stderr"}, unscaled: the benchmark's own metric, then every number lmms-eval gave."""
    samples: pd.DataFrame
    """One row per request, in document order, with `SAMPLE_COLUMNS`."""
    batch_size: int | None = None
    """The largest batch there was room for, where batches had to be halved or sought their size."""


@dataclass(frozen=True)
class Part:
    """What lmms-eval says about one task."""

    task: str
    result: dict[str, Any]
    """Results by "<metric>,<filter>"."""
    logged: list[dict[str, Any]]
    """Samples in document order; the values of a metric are under its name."""
    aggregations: dict[str, Callable]
    """The task's own function from a metric's values to its number."""


def outcome(parts: list[Part], rows: dict[str, dict[str, Any]], benchmark: Benchmark) -> Outcome:
    """Scores and samples of a benchmark; of several parts the plain mean, and each part's number under its name.

    Args:
        parts: one per task of the benchmark.
        rows: what happened to each request, by "<task>/<doc id>".

    Raises:
        UserError: a part of the benchmark's metric is missing, because of a small limit.
    """
    scored = [scores_of(part, benchmark) for part in parts]
    samples = samples_of(parts, rows, benchmark)
    if len(parts) == 1:
        return Outcome(scored[0], samples)
    own = [scores[benchmark.metric] for scores in scored]
    errors = [one["stderr"] for one in own]
    mean = {
        "value": sum(one["value"] for one in own) / len(own),
        "n": sum(one["n"] for one in own),
        "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(own),
    }
    return Outcome({benchmark.metric: mean, **{part.task: one for part, one in zip(parts, own, strict=True)}}, samples)


def scores_of(part: Part, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
    """Every number among a task's results, and the benchmark's own metric first, which has a standard error.

    Raises:
        UserError: a part of the benchmark's metric is missing, because of a small limit.
    """
    missing = [key for key in benchmark.keys if not isinstance(part.result.get(key), Real)]
    if missing:
        raise UserError(
            f"benchmark {benchmark.name!r}: no question among the first {len(part.logged)} counts towards "
            f"{', '.join(missing)}; use a larger limit"
        )
    scores: dict[str, dict[str, Any]] = {}
    for key, value in part.result.items():
        metric = key.split(",")[0]
        if metric not in part.aggregations or metric in WITHOUT_MEANING or not isinstance(value, Real):
            continue
        values = [sample[metric] for sample in part.logged if metric in sample]
        scores[key] = {
            "value": float(value),
            "n": len(values),
            "stderr": _error(key, float(value), part, benchmark) if key in benchmark.keys else None,
        }
    if benchmark.metric not in scores:
        # The parts are scored on different questions, so their errors are independent.
        summed = [scores[key] for key in benchmark.keys]
        errors = [one["stderr"] for one in summed]
        total = {
            "value": sum(one["value"] for one in summed),
            "n": sum(one["n"] for one in summed),
            "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5,
        }
        return {benchmark.metric: total, **scores}
    return {benchmark.metric: scores.pop(benchmark.metric), **scores}


def samples_of(parts: list[Part], rows: dict[str, dict[str, Any]], benchmark: Benchmark) -> pd.DataFrame:
    """One row per logged sample: what was asked and answered, how right it is, the budget.

    `doc_id` counts on from part to part.
    """
    import pandas as pd

    table: list[dict[str, Any]] = []
    for part in parts:
        start = len(table)
        for sample in part.logged:
            row = rows[f"{part.task}/{sample['doc_id']}"]
            table.append(
                {
                    **{column: row.get(column) for column in SAMPLE_COLUMNS},
                    "doc_id": start + sample["doc_id"],
                    "correct": _worths(sample, part, benchmark),
                    "target": _target(sample),
                }
            )
    return pd.DataFrame(table, columns=list(SAMPLE_COLUMNS))


def _error(key: str, value: float, part: Part, benchmark: Benchmark) -> float | None:
    """The standard error of a score: the usual one where it is the mean of what its rows (or groups) are worth."""
    metric = key.split(",")[0]
    counted = [sample for sample in part.logged if metric in sample]
    values = [sample[metric] for sample in counted]
    if benchmark.group and benchmark.rotation:
        groups: dict[int, list[float]] = {}
        for one in values:
            groups.setdefault(one["index"] % benchmark.rotation, []).append(float(one["score"]))
        worths = [min(group) for group in groups.values()]
    else:
        worths = [_worth(one, part.aggregations[metric], benchmark) for one in values]
    largest = benchmark.maximum
    if math.isclose(sum(worths) / len(worths) * largest, value, abs_tol=0.006 if largest > 1 else 6e-6):
        error = mean_error(worths)
        return None if error is None else error * largest
    if "args" in inspect.signature(part.aggregations[metric]).parameters:
        return None
    return standard_error(values, part.aggregations[metric])


def _worths(sample: dict[str, Any], part: Part, benchmark: Benchmark) -> float:
    metric = next(key.split(",")[0] for key in benchmark.keys if key.split(",")[0] in sample)
    return _worth(sample[metric], part.aggregations[metric], benchmark)


def _worth(value: Any, aggregate: Callable, benchmark: Benchmark) -> float:
    """How right one row is: said in its values, or its score as if it were the only row, over the largest one."""
    if not isinstance(value, dict):
        return float(value)
    for name in WORTH:
        if name in value:
            return float(value[name])
    return float(aggregate([value])) / benchmark.maximum


def _target(sample: dict[str, Any]) -> str:
    """The gold answer; of several people's answers (TextVQA) the most frequent, as the task itself logs none."""
    people = sample["doc"].get("answers")
    if isinstance(people, list) and people:
        said = [one["answer"] if isinstance(one, dict) else one for one in people]
        return Counter(map(str, said)).most_common(1)[0][0]
    return str(sample["target"])
