"""Which benchmarks exist. Rows are data: `benchmarks.yaml` and `suites.yaml` beside this file.

A row names a task of lmms-eval and where its questions come from; scoring is always lmms-eval's own. The `full` edition
is the published benchmark; the `pocket` edition has the same columns, prompts and metrics on a small drawn world, so
that the whole path can be run anywhere, offline, in seconds. Light on purpose: importing this needs PyYAML and nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from pruneval.harness.errors import unknown

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of `benchmarks.yaml`."""

    name: str
    title: str
    """The name a table prints."""
    edition: str
    """"full" (the published questions) or "pocket" (the drawn world)."""
    task: str
    """The name of lmms-eval's task, whose prompts and metrics are used unchanged."""
    dataset: str
    """The hub's data set id; for a pocket edition the name of the edition."""
    revision: str
    """The data set's revision; "" where none is pinned."""
    split: str
    n: int
    """Questions in the whole split."""
    metric: str
    """The score this benchmark is known by: a key of `Outcome.scores` and of a record's scores."""
    keys: tuple[str, ...]
    """The result keys of lmms-eval that are summed into `metric`."""
    maximum: float
    """The largest value `metric` can take, before `scale`."""
    scale: float
    """printed = value * scale."""
    unit: str
    higher_is_better: bool
    judge: bool
    """True when scoring asks a language model."""
    group: str
    """The column whose equal values are scored together, such as MME's question pairs; "" where rows stand alone."""
    images: tuple[str, str, str] | None
    """Where images are a table of their own: its name, the questions' column that points to it, its id column."""


@cache
def _table() -> dict[str, Benchmark]:
    rows = yaml.safe_load((_HERE / "benchmarks.yaml").read_text(encoding="utf-8"))
    table = {}
    for name, row in rows.items():
        keys = tuple(row.pop("keys"))
        images = tuple(row.pop("images", ())) or None
        row = {"metric": keys[0], "revision": "", "judge": False, "group": "", **row}
        table[name] = Benchmark(name=name, keys=keys, images=images, **row)
    return table


@cache
def _suites() -> dict[str, tuple[str, ...]]:
    rows = yaml.safe_load((_HERE / "suites.yaml").read_text(encoding="utf-8"))
    return {name: tuple(members) for name, members in rows.items()}


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name, in the file's order."""
    return dict(_table())


def suites() -> dict[str, tuple[str, ...]]:
    """Every suite: its name and the names of its benchmarks."""
    return dict(_suites())


def benchmark(name: str) -> Benchmark:
    """The row of that name; raises UserError with the nearest names when there is none."""
    try:
        return _table()[name]
    except KeyError:
        raise unknown("benchmark", name, _table()) from None


def suite(name: str) -> tuple[str, ...]:
    """The benchmarks of a suite; raises UserError with the nearest names when there is none."""
    try:
        return _suites()[name]
    except KeyError:
        raise unknown("suite", name, _suites()) from None
