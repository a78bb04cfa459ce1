"""Which benchmarks exist. Rows are data: `image.yaml`, `video.yaml`, `pocket.yaml` and `suites.yaml` beside this file.

A row names a task of lmms-eval and where its questions come from; scoring is always lmms-eval's own. The `full` edition
is the published benchmark; the `pocket` edition has the same columns, prompts and metrics on a small drawn world, so
that the whole path can be run anywhere, offline, in seconds. Light on purpose: importing this needs PyYAML and nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pruneval.harness.errors import unknown

_HERE = Path(__file__).parent
_DEFAULTS: dict[str, Any] = {"maximum": 1, "scale": 100, "unit": "%"}
AVERAGES = ("maximum", "vanilla")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of a benchmark file."""

    name: str
    title: str
    """The name a table prints."""
    edition: str
    """"full" (the published questions) or "pocket" (the drawn world)."""
    task: str
    """The name of lmms-eval's task, whose prompts and metrics are used unchanged; `{part}` stands for each part."""
    dataset: str
    """The hub's data set id, or a folder below the data root; for a pocket edition the name of the edition."""
    split: str
    n: int
    """Questions in the whole split (of all parts)."""
    metric: str
    """The score this benchmark is known by: a key of `Outcome.scores` and of a record's scores."""
    keys: tuple[str, ...]
    """The result keys of lmms-eval that are summed into `metric`."""
    maximum: float
    """The largest value `metric` can take, before `scale`."""
    scale: float
    """printed = value * scale."""
    unit: str
    config: str = ""
    """The data set's configuration; "" where there is one only. `{part}` stands for each part."""
    revision: str = ""
    """The data set's revision; "" where none is pinned."""
    hub: bool = True
    """False where no hub has the data."""
    higher_is_better: bool = True
    judge: bool = False
    """True when scoring asks a language model."""
    parts: tuple[str, ...] = ()
    """Where the benchmark is several tasks: what `{part}` stands for. `metric` is then the plain mean."""
    folders: tuple[str, ...] = ()
    """What `{folder}` stands for in each part's `videos`."""
    only: dict[str, list[str]] = field(default_factory=dict, hash=False)
    """Column -> values of the questions that count; empty where all do."""
    group: tuple[str, ...] = ()
    """The columns whose equal values are scored together (MME: its pairs); empty where rows stand alone."""
    rotation: int = 0
    """Where a group is one question with its options rotated: the step between the values of its column."""
    images: tuple[str, str, str] | None = None
    """Where images are a table of their own: its name, the questions' column that points to it, its id column."""
    videos: str = ""
    """A question's video below the data set's folder, by its columns; "" where questions are about images."""
    questions: str = ""
    """Where no hub has the data: the file of questions below the data set's folder."""
    answers: str = ""
    """The file of answers, where they are not beside the questions: by question_id, or in the questions' order."""
    columns: tuple[str, ...] = ()
    """The columns of the questions that the task reads."""
    prompt: dict[str, Any] = field(default_factory=dict, hash=False)
    """What differs from the task's default prompt settings."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of lmms-eval's tasks: one, or one per part."""
        return tuple(self.task.format(part=part) for part in self.parts) or (self.task,)

    @property
    def configs(self) -> tuple[str, ...]:
        """The data set's configurations, one per task."""
        return tuple(self.config.format(part=part) for part in self.parts) or (self.config,)

    def video_path(self, row: Mapping[str, Any], place: int = 0) -> str:
        """The path of a question's video, which may still lack its ending, below the data set's folder."""
        return self.videos.format(**row, folder=self.folders[place] if self.folders else "")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One row of `suites.yaml`."""

    name: str
    benchmarks: tuple[str, ...]
    average: str = "maximum"
    """What its average is the mean of: scores in per cent of their "maximum", or of the "vanilla" model's score."""
    note: str = ""
    """What is known about the paper's choice, and where a stand-in is used."""


@cache
def _table() -> dict[str, Benchmark]:
    rows: dict[str, dict[str, Any]] = {}
    for file, edition in (("image.yaml", "full"), ("video.yaml", "full"), ("pocket.yaml", "pocket")):
        for name, own in yaml.safe_load((_HERE / file).read_text(encoding="utf-8")).items():
            base = rows[own.pop("of")] if "of" in own else _DEFAULTS
            # A row of its own keys is known by the first of them, whatever the row it came from is known by.
            own = {"metric": own["keys"][0], **own} if "keys" in own else own
            if isinstance(own.get("parts"), dict):
                own["folders"], own["parts"] = list(own["parts"].values()), list(own["parts"])
            rows[name] = {**base, **own, "edition": edition}
    tuples = ("keys", "parts", "folders", "group", "columns", "images")
    for row in rows.values():
        row |= {key: tuple(row[key]) for key in tuples if key in row}
    return {name: Benchmark(name=name, **row) for name, row in rows.items()}


@cache
def _suites() -> dict[str, Suite]:
    rows = yaml.safe_load((_HERE / "suites.yaml").read_text(encoding="utf-8"))
    table = {}
    for name, row in rows.items():
        row = row if isinstance(row, dict) else {"benchmarks": row}
        table[name] = Suite(name=name, **{**row, "benchmarks": tuple(row["benchmarks"])})
    return table


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name, in the files' order."""
    return dict(_table())


def suites() -> dict[str, tuple[str, ...]]:
    """Every suite: its name and the names of its benchmarks."""
    return {name: row.benchmarks for name, row in _suites().items()}


def benchmark(name: str) -> Benchmark:
    """The row of that name; raises UserError with the nearest names when there is none."""
    try:
        return _table()[name]
    except KeyError:
        raise unknown("benchmark", name, _table()) from None


def suite(name: str) -> tuple[str, ...]:
    """The benchmarks of a suite; raises UserError with the nearest names when there is none."""
    return suite_row(name).benchmarks


def pocket_suite(name: str) -> tuple[str, ...]:
    """A suite for a pocket model: its benchmarks' pocket editions. Raises UserError when there is no such suite."""
    known = _table()
    return tuple(f"pocket-{each}" if f"pocket-{each}" in known else each for each in suite(name))


def suite_row(name: str) -> Suite:
    """A suite with how its paper averages; raises UserError with the nearest names when there is none."""
    try:
        return _suites()[name]
    except KeyError:
        raise unknown("suite", name, _suites()) from None
