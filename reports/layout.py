"""Layouts: what a table of a paper looks like, as data (`layouts/*.toml`), and the numbers it printed.

A cell is addressed by its row and its column together: both may say model, method, setting or metric, so tables with
methods across, settings across or models across are the same thing.

    title, head, rank = "columns" | "rows" | "", second = true | false, edition, benchmarks, notes
    visual = {model = tokens}, dtype    the prompts, and if it matters the type, of measured times and bytes
    table = "gsearch/table1"            the printed numbers, `published/<table>.csv`; none for a layout of our own
    models = {name = "title"}           every row is repeated for each, one section per model
    [[columns]] heading, group, better = "higher" | "lower" | "", and keys of the address
    [[rows]]    label, section, ranked, delta, ours, missing, and keys of the address

`ours = {method, params, budget, kernel}` says which of our runs belongs there; `missing` why none can. A row with
`delta` is the difference of the two rows above it.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from pruneval.harness.errors import UserError, unknown

ADDRESS = ("model", "method", "setting", "metric", "benchmark", "ours", "missing")
DOUBT = "(?)"
NOT_NEWS = ("difference row", "underlined in scan")
"""Notes of the transcription that say nothing about the number."""


@dataclass(frozen=True)
class Line:
    """A row or a column of a layout."""

    label: str
    group: str = ""
    """A row's section, or the heading over neighbouring columns."""
    better: str | None = None
    """"higher", "lower", "" (not ranked), or None: as its metric says."""
    ranked: bool = True
    delta: bool = False
    address: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One table's shape."""

    name: str
    title: str
    head: str
    columns: tuple[Line, ...]
    rows: tuple[Line, ...]
    table: str = ""
    edition: str = "full"
    rank: str = "columns"
    second: bool = True
    benchmarks: tuple[str, ...] = ()
    """What averages and relative scores run over."""
    notes: tuple[str, ...] = ()
    visual: Mapping[str, int] = field(default_factory=dict)
    """Visual tokens of the prompts on which a model's times were taken."""
    dtype: str = ""
    """The type of weights that its times need; "" for any."""

    @property
    def pocket(self) -> bool:
        """Whether its numbers come from pocket editions."""
        return self.edition == "pocket"

    def address(self, row: Line, column: Line) -> dict[str, Any]:
        """What the cell is about; the row's word goes over the column's."""
        return {**column.address, **row.address}


@dataclass(frozen=True)
class Printed:
    """One number of a paper."""

    text: str
    value: float
    doubtful: bool = False
    note: str = ""
    source: str = ""


def names() -> list[str]:
    """Every layout that there is."""
    found = (path.name for path in files("pruneval.reports").joinpath("layouts").iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


@cache
def load(name: str) -> Layout:
    """The layout of that name. Raises: UserError when there is none."""
    if name not in names():
        raise unknown("layout", name, names())
    text = files("pruneval.reports").joinpath("layouts", f"{name}.toml").read_text(encoding="utf-8")
    return parse(name, tomllib.loads(text))


def parse(name: str, data: Mapping[str, Any]) -> Layout:
    """A layout out of a TOML file's content. Raises: UserError for a key that no layout has."""
    data = dict(data)
    models = data.pop("models", {})
    columns = tuple(_line(name, item, "heading", "group") for item in data.pop("columns"))
    plain = [_line(name, item, "label", "section") for item in data.pop("rows")]
    rows = plain if not models else [_of_model(row, *model) for model in models.items() for row in plain]
    extra = set(data) - {item for item in Layout.__dataclass_fields__ if item not in ("name", "columns", "rows")}
    if extra:
        raise UserError(f"layout {name!r}: unknown key {sorted(extra)[0]!r}")
    for key in ("benchmarks", "notes"):
        data[key] = tuple(data.get(key, ()))
    return Layout(name=name, columns=columns, rows=tuple(rows), **data)


def printed(layout: Layout, row: Line, column: Line) -> Printed | None:
    """The number the paper prints in this cell; None where it prints none.

    Raises: UserError when the address fits several numbers.
    """
    if not layout.table:
        return None
    address = layout.address(row, column)
    key = (str(address.get("model")), str(address.get("method")), str(address.get("metric")))
    found = _numbers(layout.table).get(key, {})
    if "setting" in address:
        return found.get(str(address["setting"]))
    if len(found) > 1:
        raise UserError(f"layout {layout.name!r}: {key} is printed for the settings {', '.join(found)}; name one")
    return next(iter(found.values()), None)


@cache
def _numbers(table: str) -> dict[tuple[str, str, str], dict[str, Printed]]:
    """Printed numbers by (model, method, metric) and setting."""
    paper, short = table.split("/")
    misprints = {(r["model"], r["method"], r["metric"]): r for r in _read("misprints.csv") if r["table"] == short
                 and r["paper"] == paper}  # fmt: skip
    found: dict[tuple[str, str, str], dict[str, Printed]] = {}
    for row in _read(f"{table}.csv"):
        key = (row["model"], row["method"], row["metric"])
        doubt = misprints.get(key) if misprints.get(key, {}).get("published") == row["value"] else None
        unclear = "OCR-DOUBT" in row["note"]
        parts = [part.strip() for part in row["note"].split(";")]
        note = "; ".join(part for part in parts if part and part not in NOT_NEWS and "NOTES.md" not in part)
        if doubt:
            note = f"{doubt['kind']}: {doubt['reason']}"
        elif unclear:
            note = "; ".join(filter(None, [note, "doubtful in the scan, see published/NOTES.md"]))
        text = row["value"]
        if ("delta" in row["method"] or "delta" in row["metric"]) and float(text) > 0:
            text = f"+{text}"
        number = Printed(text, float(row["value"]), unclear or bool(doubt), note, f"published|{table}")
        found.setdefault(key, {})[row["setting_value"]] = number
    return found


@cache
def _read(path: str) -> list[dict[str, str]]:
    with files("pruneval.reports").joinpath("published", *path.split("/")).open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _line(name: str, item: Mapping[str, Any], label: str, group: str) -> Line:
    known = {label, group, "better", "ranked", "delta", *ADDRESS}
    if extra := set(item) - known:
        raise UserError(f"layout {name!r}: unknown key {sorted(extra)[0]!r}; known: {', '.join(sorted(known))}")
    address = {key: item[key] for key in ADDRESS if key in item}
    rest = {key: item[key] for key in ("better", "ranked", "delta") if key in item}
    return Line(item[label], item.get(group, ""), address=address, **rest)


def _of_model(row: Line, model: str, title: str) -> Line:
    return Line(
        row.label.replace("{model}", title), title, row.better, row.ranked, row.delta, {**row.address, "model": model}
    )
