"""Our numbers in the places of a layout: records joined by spec, and a reason for every hole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pruneval.harness.records import RunRecord
from pruneval.reports.benched import METRICS, Benched
from pruneval.reports.entries import REFERENCE
from pruneval.reports.fitting import Found, fits, model_of, wanted
from pruneval.reports.layout import Layout, Line
from pruneval.tasks import Benchmark, benchmarks

BENCHMARKS = {"scienceqa_img": "scienceqa"}
COSTS = {
    "tflops": ("tflops", 1.0),
    "tmacs": ("tmacs", 1.0),
    "kv_ratio": ("kv_ratio", 1.0),
    "params_b": ("params_b", 1.0),
    "kv_cache_mb": ("kv_bytes_full_heads", 1e-6),
}
"""metric -> the key of the record's implied cost, and the factor to the printed unit. Costs: lower is better."""
AVERAGE, RELATIVE, SHARE, CHANGE = "avg_acc", "relative_pct", "_relative_pct", "_delta_pct"


class Join:
    """A layout, and the records and bench documents that may fill it."""

    def __init__(self, layout: Layout, records: Iterable[RunRecord], benches: Iterable[Mapping[str, Any]] = ()) -> None:
        self.layout = layout
        self.benched = Benched(layout, benches)
        self.known = benchmarks()
        self.records = [r for r in records if r.spec.edition == layout.edition and r.spec.limit is None]
        self.rows = list(layout.rows)

    def found(self, row: Line, column: Line) -> Found:
        """Our number for one cell."""
        if row.delta:
            return self._difference(row, column)
        address = self.layout.address(row, column)
        return self._number(address, str(address.get("metric", "")))

    def higher_is_better(self, address: Mapping[str, Any]) -> bool | None:
        """The direction of a metric; None where more is neither better nor worse."""
        metric = str(address.get("metric", ""))
        if metric == "params_b" or metric.endswith(CHANGE):
            return None
        if metric in COSTS or metric in METRICS:
            return False
        benchmark = self.known.get(self._benchmark(address, metric))
        return benchmark.higher_is_better if benchmark else True

    # One number -------------------------------------------------------------------------------------------------------

    def _number(self, address: Mapping[str, Any], metric: str) -> Found:
        if "missing" in address:
            return Found(reason=f"unsupported: {address['missing']}")
        if metric == AVERAGE:
            return self._over_benchmarks(address, "maximum")
        if metric == RELATIVE:
            return self._over_benchmarks(address, REFERENCE)
        if metric.endswith(SHARE):
            return self._against_vanilla(address, metric.removesuffix(SHARE), lambda mine, base: 100 * mine / base)
        if metric.endswith(CHANGE):
            if (of := metric.removesuffix(CHANGE)) in METRICS and (of not in COSTS or self.benched.documents):
                found = self.benched.change(address, of)
                if found.value is not None or of not in COSTS:
                    return found
            change = lambda mine, base: 100 * (mine / base - 1)  # noqa: E731
            return self._against_vanilla(address, metric.removesuffix(CHANGE), change)
        if metric in COSTS:
            implied = self._cost(address, metric)
            measurable = implied.value is None and metric in METRICS and self.benched.documents
            return self.benched.found(address, metric) if measurable else implied
        if metric in METRICS:
            return self.benched.found(address, metric)
        return self._score(address, self._benchmark(address, metric))

    def _score(self, address: Mapping[str, Any], name: str) -> Found:
        if name not in self.known:
            return Found(reason=f"unsupported: there is no benchmark {name!r} here")
        benchmark = self.known[name]
        found = [record for record in self._runs(address) if record.spec.benchmark == name]
        done = [record for record in found if record.done]
        if not done:
            return Found(reason=_hole(found, benchmark), runs=tuple(record.spec.hash for record in found))
        record, score = done[0], done[0].scores[benchmark.metric]
        stderr = None if score.get("stderr") is None else score["stderr"] * benchmark.scale
        return Found(
            score["value"] * benchmark.scale,
            notes=(*_several(done), *[f"provisional: {record.provisional}"] * bool(record.provisional)),
            stderr=stderr,
            digits=1 if benchmark.scale != 1 or benchmark.maximum <= 100 else 0,
            signatures=(record.spec.signature(record.budget.get("avg_in")),),
            runs=(record.spec.hash,),
        )

    def _over_benchmarks(self, address: Mapping[str, Any], of: str) -> Found:
        parts, bases = [], []
        for name in self.layout.benchmarks:
            parts.append(self._score(address, name))
            bases.append(self._score(_vanilla(address), name) if of == REFERENCE else None)
        holes = [
            name
            for name, part, base in zip(self.layout.benchmarks, parts, bases, strict=True)
            if part.value is None or (base is not None and not base.value)
        ]
        if holes or not parts:
            reasons = {part.reason.partition(";")[0] for part in parts}
            return Found(reason=reasons.pop() if len(reasons) == 1 else f"needs {', '.join(holes)}")
        shares = [
            100 * part.value / (base.value if base else self.known[name].maximum * self.known[name].scale)  # type: ignore[operator]
            for name, part, base in zip(self.layout.benchmarks, parts, bases, strict=True)
        ]
        return Found(
            sum(shares) / len(shares), digits=1 if of == REFERENCE else 2, **_behind([*parts, *filter(None, bases)])
        )

    def _against_vanilla(self, address: Mapping[str, Any], metric: str, how: Any) -> Found:
        mine, base = self._number(address, metric), self._number(_vanilla(address), metric)
        if mine.value is None:
            return Found(reason=mine.reason)
        if not base.value:
            return Found(reason=f"the unpruned model: {base.reason or 'its score is 0'}")
        return Found(how(mine.value, base.value), digits=1, **_behind([mine, base]))

    def _cost(self, address: Mapping[str, Any], metric: str) -> Found:
        key, factor = COSTS[metric]
        runs = [record for record in self._runs(address) if record.done]
        known = [(record, (record.implied or {}).get(key)) for record in runs]
        values = [(record, value) for record, value in known if value is not None]
        if not values:
            return Found(reason="not implied" if runs else "not run")
        return Found(
            factor * math.fsum(value for _, value in values) / len(values),
            notes=("implied for the median question, mean over benchmarks",),
            signatures=tuple(dict.fromkeys(r.spec.signature(r.budget.get("avg_in")) for r, _ in values)),
            runs=tuple(record.spec.hash for record, _ in values),
        )

    def _difference(self, row: Line, column: Line) -> Found:
        at = self.rows.index(row)
        first, second = (self.found(self.rows[at - back], column) for back in (1, 2))
        if first.value is None or second.value is None:
            return Found(reason=first.reason or second.reason)
        return Found(first.value - second.value, digits=first.digits, **_behind([first, second]))

    # Which runs -------------------------------------------------------------------------------------------------------

    def _runs(self, address: Mapping[str, Any]) -> list[RunRecord]:
        """Records of this model and method, in a fixed order."""
        model, ours = model_of(address), wanted(address)
        found = [
            r
            for r in self.records
            if r.spec.model == model and fits(ours, r.spec.method, r.spec.params, r.budget, r.spec.kernel)
        ]
        return sorted(found, key=lambda record: (record.spec.benchmark, record.spec.seed, record.spec.signature()))

    def _benchmark(self, address: Mapping[str, Any], metric: str) -> str:
        return str(address.get("benchmark") or BENCHMARKS.get(metric, metric))


def _vanilla(address: Mapping[str, Any]) -> dict[str, Any]:
    return {**address, "ours": {"method": REFERENCE}}


def _hole(found: list[RunRecord], benchmark: Benchmark) -> str:
    if found:
        error = found[0].error or {}
        sample = f" at sample {error['sample']}" if error.get("sample") else ""
        return f"failed{sample}: {error.get('message', 'no reason recorded')}"
    return "not run; a judge is needed to score it" if benchmark.judge else "not run"


def _several(done: list[RunRecord]) -> tuple[str, ...]:
    return (f"the first of {len(done)} runs that fit here",) if len(done) > 1 else ()


def _behind(parts: Iterable[Found]) -> dict[str, Any]:
    """Everything behind several numbers, once each."""
    parts = list(parts)
    return {
        key: tuple(dict.fromkeys(item for part in parts for item in getattr(part, key)))
        for key in ("notes", "signatures", "runs")
    }
