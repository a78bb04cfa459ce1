"""Printed costs beside the ledger's: published / implied here / difference.

The numbers are read from `reports/published/`, the schedules behind them are written here. A schedule that a paper
did not publish is not guessed: its cost is given as the range that its printed memory ratio leaves open.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from pruneval.harness.conventions import CONVENTIONS
from pruneval.harness.dimensions import Dimensions, load
from pruneval.harness.errors import unknown
from pruneval.harness.flops import Lengths, ledger, lengths_of
from pruneval.harness.kv_cache import kv_bytes, kv_bytes_full_heads, kv_ratio

TABLES = tuple(f"gsearch/table{n}" for n in (1, 8, 9, 10, 11)) + ("vflowopt/table1",)
CONVENTIONS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "tflops": {"gsearch": ("gsearch",), "vflowopt": ("gsearch", "true-eager", "true")},
    "tmacs": {"gsearch": ("macs",)},
    "kv_ratio": {"gsearch": ("visual tokens",)},
    "params_b": {"gsearch": ("as printed",)},
    "kv_cache_mb": {"vflowopt": ("full heads, 16 bit, 10^6", "true heads, 16 bit, 10^6")},
}
"""The conventions each metric is recomputed in, first the one that the table is printed in."""
ALIASES = {"llava-onevision-7b": "llava-ov-7b"}
VFLOWOPT_RATES = (0.72332, 0.74875, 0.487)
"""Keep rates before layers 0, 9 and 18 of the released 50 % setting of VFlowOpt (LLaVA-OneVision-7B)."""


@dataclass(frozen=True)
class Row:
    """One printed number and what the ledger says to it."""

    model: str
    method: str
    setting: str
    metric: str
    convention: str
    published: float
    low: float
    high: float
    """Equal to `low` unless the paper leaves the schedule open."""
    note: str = ""

    @property
    def implied(self) -> float:
        """The ledger's number; the middle where it is a range."""
        return (self.low + self.high) / 2

    @property
    def difference(self) -> float:
        """Implied against published, in per cent; against the nearest end where it is a range, 0 inside."""
        nearest = min(max(self.published, self.low), self.high)
        return 100 * (nearest / self.published - 1)

    @property
    def shown(self) -> str:
        """The number, or the two ends of a range, to four digits."""
        low, high = f"{self.low:.4g}", f"{self.high:.4g}"
        return low if low == high else f"{low} to {high}"

    def as_dict(self) -> dict[str, str | float]:
        """The row for JSON."""
        return {**asdict(self), "implied": self.implied, "difference_pct": self.difference}


def compare(table: str) -> list[Row]:
    """Every cost of one published table, once per convention it is recomputed in."""
    if table not in TABLES:
        raise unknown("published table", table, TABLES)
    paper, name = table.split("/")
    printed = [row for row in _read(f"{table}.csv") if row["metric"] in CONVENTIONS_OF and "delta" not in row["method"]]
    ratios = {_key(row): float(row["value"]) for row in printed if row["metric"] == "kv_ratio"}
    if name == "table10":  # prints no ratios: the same searched schedules as Table 8
        ratios = {_key(row): float(row["value"]) for row in _read("gsearch/table8.csv") if row["metric"] == "kv_ratio"}
    video = 8 if name == "table11" else None
    rows = []
    for row in printed:
        model = load(ALIASES.get(row["model"], row["model"]))
        found = list(_lengths(model, row, ratios.get(_key(row)), video))
        for convention in CONVENTIONS_OF[row["metric"]].get(paper, ()):
            if row["method"] == "flashattention2":
                convention = {"gsearch": "calflops-flash", "macs": "macs of calflops-flash"}.get(convention, convention)
            values = [
                _value(row["metric"], model, lengths, convention, row["method"] == "flashattention2")
                for lengths in found
            ]
            setting = f"{row['setting']}={row['setting_value']}" if row["setting_value"] else ""
            note = _note(paper, name, row) or _kind(row)
            rows.append(
                Row(
                    model.name,
                    row["method"],
                    setting,
                    row["metric"],
                    convention,
                    float(row["value"]),
                    min(values),
                    max(values),
                    note,
                )
            )
    return rows


def schedule(method: str, setting: str, visual: int, layers: int) -> list[int]:
    """Visual tokens that enter each layer, as the papers ran their baselines.

    FastV prunes once after two layers, VTW drops everything at half depth (G-Search's setting). PDrop halves before
    layers 8, 16 and 24; with 24 layers G-Search left that list as it is, deeper models got four equal stages.
    """
    if method in ("vanilla", "flashattention2"):
        return [visual] * layers
    if method == "fastv":
        return [visual] * 2 + [int(visual * (1 - float(setting)))] * (layers - 2)
    if method == "vtw":
        return [visual] * (layers // 2) + [0] * (layers - layers // 2)
    if method == "pdrop":
        stages = [8, 16] if layers == 24 else [layers // 4, layers // 2, 3 * layers // 4]
        return [int(visual * 0.5 ** sum(layer >= stage for stage in stages)) for layer in range(layers)]
    raise unknown("schedule", method, ("vanilla", "fastv", "vtw", "pdrop"))


def sigmoid(visual: int, layers: int, budget: float, slope: float) -> list[int]:
    """P-Sigmoid: keep rate 2b / (1 + exp(k (i - a))) before layer i = 3..L (1-based), a midway; two full layers."""
    middle = (3 + layers) / 2
    rates = [2 * budget / (1 + math.exp(slope * (i - middle))) for i in range(3, layers + 1)]
    return [visual] * 2 + [round(visual * rate) for rate in rates]


def extremes(model: Dimensions, visual: int, ratio: float) -> Iterator[list[int]]:
    """Non-increasing schedules with this memory ratio, the cheapest and the dearest among them; two full layers first.

    Cost is convex in the counts, with the output layer on top of the last. So the dearest is a mixture of two step
    functions, and in the cheapest all layers but the last are equal.
    """
    layers = model.decoder.layers
    rest, budget = layers - 2, (ratio * layers - 2) * visual
    for last in range(21):
        tail = budget / rest * last / 20
        yield [visual] * 2 + [round((budget - tail) / (rest - 1))] * (rest - 1) + [round(tail)]
    for early in range(rest + 1):
        for late in range(early + 1, rest + 1):
            share = (budget / visual - early) / (late - early)
            if 0 <= share <= 1:
                yield [visual] * (2 + early) + [round(share * visual)] * (late - early) + [0] * (rest - late)


def _lengths(model: Dimensions, row: dict[str, str], ratio: float | None, frames: int | None) -> Iterator[Lengths]:
    """The lengths a printed row stands for; several where the paper leaves the schedule open."""
    visual = lengths_of(model, frames=frames).given
    layers = model.decoder.layers
    ratio = 1.0 if ratio is None else ratio
    if row["paper"] == "vflowopt":
        plans = [_half(row["method"], visual, layers)]
    elif row["method"] == "gsearch":
        plans = list(extremes(model, visual, ratio))
    elif row["method"] == "psigmoid":
        plans = [sigmoid(visual, layers, (ratio * layers - 2) / (layers - 2), slope / 100) for slope in range(101)]
    else:
        plans = [schedule(row["method"], row["setting_value"], visual, layers)]
    return (lengths_of(model, plan, frames=frames) for plan in plans)


def _half(method: str, visual: int, layers: int) -> list[int]:
    """VFlowOpt's Table 1: every method at half of the visual tokens, averaged over layers."""
    if method == "vanilla":
        return [visual] * layers
    if method == "fastv":
        return [visual] * 2 + [round(visual * (layers / 2 - 2) / (layers - 2))] * (layers - 2)
    if method == "vflowopt":
        first, second, third = (math.prod(VFLOWOPT_RATES[: stage + 1]) for stage in range(3))
        return [round(visual * rate) for rate in [first] * 9 + [second] * 9 + [third] * (layers - 18)]
    return [visual // 2] * layers


def _value(metric: str, model: Dimensions, lengths: Lengths, convention: str, flash: bool) -> float:
    if metric == "kv_ratio":
        return kv_ratio(lengths.visual, lengths.given)
    if metric == "params_b":
        return sum(model.params[part] for part in model.published_params) / 1e9
    if metric == "kv_cache_mb":
        count = kv_bytes_full_heads if convention.startswith("full") else kv_bytes
        return count(model.decoder, lengths.llm) / 1e6
    named = CONVENTIONS["calflops-flash" if flash else "gsearch" if metric == "tmacs" else convention]
    macs = named.macs(model, lengths, ledger(model, lengths))
    return (macs if metric == "tmacs" else named.factor * macs) / 1e12


def _note(paper: str, table: str, row: dict[str, str]) -> str:
    for known in _read("misprints.csv"):
        if (known["paper"], known["table"], *(known[key] for key in ("model", "method", "metric"))) == (
            paper,
            table,
            *(row[key] for key in ("model", "method", "metric")),
        ):
            return f"{known['kind']}: {known['reason']}"
    return ""


def _kind(row: dict[str, str]) -> str:
    """What is fitted in a row, so that nobody takes it for a prediction."""
    if row["paper"] == "vflowopt":
        return "fitted: length from the printed cache, 8 tiles from 71.4 TFLOPs" if row["method"] == "vanilla" else ""
    if row["method"] not in ("gsearch", "psigmoid") or row["metric"] == "params_b":
        return ""
    if row["metric"] == "kv_ratio":
        return "given: the schedules are drawn from it"
    if row["method"] == "gsearch":
        return "range over every non-increasing schedule with the printed memory ratio"
    return "range over slopes 0 to 1, budget from the printed memory ratio"


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["model"], row["method"], row["setting_value"]


@cache
def _read(path: str) -> list[dict[str, str]]:
    with files("pruneval.reports").joinpath("published", *path.split("/")).open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
