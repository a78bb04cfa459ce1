"""Records as data frames for the figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pruneval.harness.records import RunRecord
from pruneval.reports.entries import Entry, entries, relative
from pruneval.tasks import benchmarks

if TYPE_CHECKING:
    import pandas as pd

PARTS = {
    "vision tower": ("patch_embedding", "vision_linear"),
    "projector": ("projector",),
    "helper models": ("helpers",),
    "scores": ("scoring",),
    "LLM, linear": ("llm_linear",),
    "LLM, attention": ("llm_attention_square",),
    "output layer": ("head_all",),
}
"""Parts of the default convention (2 x MAC, full attention square, output layer on all tokens)."""
SHOWN = 12
"""Lines in a figure that are still told apart."""


def found(records: Iterable[RunRecord]) -> list[Entry]:
    """The entries of records of one model in one setting."""
    records = list(records)
    seen = {record.spec.benchmark for record in records}
    names = [name for name in benchmarks() if name in seen]
    return entries(records, [], names)


def short(lines: Iterable[Entry]) -> dict[str, str]:
    """Names for figures, by the whole name: only those parameters that tell a method's rows apart."""
    lines = list(lines)
    values: dict[tuple[str, str], set[str]] = {}
    for entry in lines:
        for key, value in entry.spec.params.items():
            values.setdefault((entry.spec.method, key), set()).add(repr(value))
    told = {}
    for entry in lines:
        kept = {key: value for key, value in entry.spec.params.items() if len(values[entry.spec.method, key]) > 1}
        told[entry.name] = replace(entry.spec, params=kept).method_signature
    return told


def points(records: Iterable[RunRecord]) -> pd.DataFrame:
    """label, method, avg_in, tflops, relative: one row per method with parameters."""
    import pandas as pd

    known = benchmarks()
    lines = found(records)
    base = next((entry.records for entry in lines if entry.reference), {})
    rows = [
        {
            "label": entry.name,
            "method": entry.spec.method,
            "avg_in": entry.budget("avg_in"),
            "tflops": _tflops(entry),
            "relative": relative(entry.records, base, known),
        }
        for entry in lines
    ]
    return pd.DataFrame(rows).astype({"avg_in": float, "tflops": float, "relative": float})


def rates(records: Iterable[RunRecord]) -> pd.DataFrame:
    """label, layer, keep: methods that prune inside the language model, from their declared schedules."""
    import pandas as pd

    rows = []
    lines = found(records)
    names = short(lines)
    for entry in lines:
        implied = next((record.implied for record in entry.records.values() if record and record.implied), None)
        counts = (implied or {}).get("per_layer") or []
        if len(set(counts)) > 1:
            keep = [count / implied["visual"] for count in counts]  # type: ignore[index]
            rows += [{"label": names[entry.name], "layer": layer, "keep": share} for layer, share in enumerate(keep)]
    frame = pd.DataFrame(rows, columns=["label", "layer", "keep"])
    return frame[frame["label"].isin(frame["label"].unique()[:SHOWN])]


def spent(records: Iterable[RunRecord]) -> pd.DataFrame:
    """place, part, tflops: what each method spends on each part, the dearest first."""
    import pandas as pd

    rows = []
    lines = found(records)
    names = short(lines)
    for entry in lines:
        implied = next((record.implied for record in entry.records.values() if record and record.implied), None)
        macs = (implied or {}).get("macs")
        if macs:
            total = {part: 2e-12 * sum(macs.get(key, 0) for key in keys) for part, keys in PARTS.items()}
            rows += [{"place": names[entry.name], "part": part, "tflops": value} for part, value in total.items()]
    frame = pd.DataFrame(rows, columns=["place", "part", "tflops"])
    order = frame.groupby("place")["tflops"].transform("sum").sort_values(ascending=False, kind="stable").index
    return frame.loc[order]


def drawings(records: Iterable[RunRecord]) -> dict[str, str]:
    """The figures that records of one setting can feed, as SVG by caption."""
    from pruneval.reports import figures

    records = list(records)
    pocket = ", pocket scores" if records[0].spec.edition == "pocket" else ""
    model = records[0].spec.model
    frame = points(records)
    made = {}
    for cost, word in (("tflops", "TFLOPs"), ("avg_in", "visual tokens")):
        if frame.dropna(subset=[cost, "relative"])["method"].nunique() > 1:
            made[f"{model}: accuracy against {word}{pocket}"] = figures.svg(figures.quality(frame, cost))
    if len(kept := rates(records)):
        made[f"{model}: keep rate over layers, declared; dashed the fitted sigmoid"] = figures.svg(
            figures.keep_rates(kept)
        )
    if len(cost := spent(records)) and cost["place"].nunique() <= 4 * SHOWN:
        made[f"{model}: implied cost by part (2 × MAC)"] = figures.svg(figures.cost_breakdown(cost))
    return made


def _tflops(entry: Entry) -> float | None:
    """Mean over benchmarks of the implied prefill."""
    known = [record.implied["tflops"] for record in entry.records.values() if record and record.implied]
    return sum(known) / len(known) if known else None
