"""What an evaluation gives: scores with their standard errors, and one row per sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import UserError
from pruneval.harness.uncertainty import standard_error
from pruneval.tasks import Benchmark

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_COLUMNS = (
    "doc_id", "prompt_hash", "prompt", "image", "answer", "correct", "target",
    "visual_tokens", "avg_in", "kept_after", "final", "keep", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gives."""

    scores: dict[str, dict[str, Any]]
    """metric -> {"value", "n", "stderr"}, unscaled: the benchmark's own metric, then every number lmms-eval gave."""
    samples: pd.DataFrame
    """One row per request, in document order, with `SAMPLE_COLUMNS`."""


def scores_of(
    result: dict[str, Any], logged: list[dict], aggregations: dict[str, Callable], benchmark: Benchmark
) -> dict[str, dict[str, Any]]:
    """Every number among a task's results, and the benchmark's own metric first, which has a standard error.

    Args:
        result: lmms-eval's results of the task, by "<metric>,<filter>".
        logged: lmms-eval's logged samples; the values of a metric are under its name.
        aggregations: the task's own function from a metric's values to its number.

    Raises:
        UserError: a part of the benchmark's metric is missing, because of a small limit.
    """
    missing = [key for key in benchmark.keys if not isinstance(result.get(key), Real)]
    if missing:
        raise UserError(
            f"benchmark {benchmark.name!r}: no question among the first {len(logged)} counts towards "
            f"{', '.join(missing)}; use a larger limit"
        )
    scores: dict[str, dict[str, Any]] = {}
    for key, value in result.items():
        metric = key.split(",")[0]
        if metric not in aggregations or not isinstance(value, Real):
            continue
        values = [sample[metric] for sample in logged if metric in sample]
        scores[key] = {
            "value": float(value),
            "n": len(values),
            "stderr": standard_error(values, aggregations[metric]) if key in benchmark.keys else None,
        }
    if benchmark.metric not in scores:
        # The parts are scored on different questions, so their errors are independent.
        parts = [scores[key] for key in benchmark.keys]
        errors = [part["stderr"] for part in parts]
        total = {
            "value": sum(part["value"] for part in parts),
            "n": sum(part["n"] for part in parts),
            "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5,
        }
        return {benchmark.metric: total, **scores}
    return {benchmark.metric: scores.pop(benchmark.metric), **scores}


def samples_of(logged: list[dict], rows: dict[str, dict[str, Any]], benchmark: Benchmark) -> pd.DataFrame:
    """One row per logged sample: what was asked and answered, the value of the benchmark's metric, the budget."""
    import pandas as pd

    metrics = [key.split(",")[0] for key in benchmark.keys]
    table = []
    for sample in logged:
        row = rows[f"{benchmark.task}/{sample['doc_id']}"]
        value = next(sample[metric] for metric in metrics if metric in sample)
        table.append(
            {
                **{column: row.get(column) for column in SAMPLE_COLUMNS},
                "correct": float(value["score"] if isinstance(value, dict) else value),
                "target": _target(sample),
            }
        )
    return pd.DataFrame(table, columns=list(SAMPLE_COLUMNS))


def _target(sample: dict[str, Any]) -> str:
    """The gold answer; of several people's answers (TextVQA) the most frequent, as the task itself logs none."""
    people = sample["doc"].get("answers")
    if isinstance(people, list) and people:
        return Counter(map(str, people)).most_common(1)[0][0]
    return str(sample["target"])
