"""A layout as a table: ours, published, both, or the difference of the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pruneval.harness.records import RunRecord
from pruneval.reports.fitting import Found
from pruneval.reports.join import Join
from pruneval.reports.layout import DOUBT, Layout, Line, Printed, printed
from pruneval.reports.table import SECOND, Cell, Column, Row, Table, ranked

SHOW = ("ours", "published", "both", "difference")
HOLE = "–"
POCKET = "Pocket scores come from a small drawn world; they are not scores of the published benchmarks."


def fill(
    layout: Layout, records: Iterable[RunRecord], show: str = "ours", benches: Iterable[Mapping[str, Any]] = ()
) -> Table:
    """The table of a layout.

    Args:
        layout: its shape, and where its printed numbers are.
        records: those of other editions and those with a limit are left aside.
        show: one of `SHOW`.
        benches: documents of `pruneval bench`, for measured times and bytes.
    """
    join = Join(layout, records, benches)
    ranking = show in ("ours", "published")
    columns = []
    for column in layout.columns:
        higher = join.higher_is_better(column.address) if column.better is None else _direction(column.better)
        columns.append(Column(column.label, higher if ranking and layout.rank == "columns" else None, column.group))
    rows = []
    for row in layout.rows:
        cells = tuple(
            _cell(
                join.found(row, column), printed(layout, row, column), show, row.delta or _signed(layout, row, column)
            )
            for column in layout.columns
        )
        rows.append(Row(row.label, cells, row.group, row.ranked and not row.delta))
    if ranking and layout.rank == "rows":
        rows = [_ranked_across(join, layout, at, row) for at, row in enumerate(rows)]
    rows = list(ranked(columns, rows))
    if not layout.second:
        rows = [replace(row, cells=tuple(_without_second(cell) for cell in row.cells)) for row in rows]
    arrows = [
        replace(column, heading=column.heading + ("" if higher is None else " ↑" if higher else " ↓"))
        for column, higher in zip(columns, (_arrow(join, layout, at) for at in range(len(columns))), strict=True)
    ]
    notes = [*layout.notes, *_notes(layout, show)]
    return Table(layout.title, layout.head, tuple(arrows), tuple(rows), tuple(notes), layout.pocket)


def _notes(layout: Layout, show: str) -> list[str]:
    words = {
        "ours": "Numbers of this project's own runs.",
        "published": "Numbers as the paper printed them; (?) marks what is doubtful in the source or a known misprint.",
        "both": "Ours / published. (?) marks a printed number that is doubtful in the source or a known misprint.",
        "difference": "Ours minus published. (?) marks a printed number that is doubtful in the source or a misprint.",
    }
    notes = [words[show]] if layout.table else []
    return notes + [POCKET] * layout.pocket


def _cell(ours: Found, theirs: Printed | None, show: str, signed: bool) -> Cell:
    if show == "published":
        return _published(theirs)
    mine = _ours(ours, theirs, signed)
    if show == "ours":
        return mine
    other = _published(theirs)
    behind: dict[str, Any] = {
        "notes": tuple(dict.fromkeys(mine.notes + other.notes)),
        "mark": other.mark,
        "signatures": mine.signatures + other.signatures,
        "runs": mine.runs,
    }
    if show == "both":
        return Cell(f"{mine.text} / {other.text}", ours.value, **behind)
    if ours.value is None or theirs is None:
        return Cell(HOLE, **behind)
    gap = ours.value - theirs.value
    return Cell(_text(gap, theirs, ours, signed=True), gap, **behind)


def _ours(found: Found, theirs: Printed | None, signed: bool) -> Cell:
    if found.value is None:
        return Cell(HOLE, notes=(found.reason,), runs=found.runs)
    text = _text(found.value, theirs, found, signed)
    return Cell(text, found.value, found.stderr, found.notes, signatures=found.signatures, runs=found.runs)


def _published(theirs: Printed | None) -> Cell:
    if theirs is None:
        return Cell(HOLE)
    mark = DOUBT if theirs.doubtful else ""
    notes = (theirs.note,) if theirs.note else ()
    return Cell(theirs.text, theirs.value, notes=notes, mark=mark, signatures=(theirs.source,))


def _text(value: float, theirs: Printed | None, ours: Found, signed: bool) -> str:
    """With the decimals of the printed number, else those its kind has."""
    sign = "+" if signed and value > 0 else ""
    if theirs is not None:
        digits = len(theirs.text.partition(".")[2])
        return f"{sign}{value:.{digits}f}"
    return f"{sign}{value:.3g}" if ours.digits is None else f"{sign}{value:.{ours.digits}f}"


def _signed(layout: Layout, row: Line, column: Line) -> bool:
    return str(layout.address(row, column).get("metric", "")).endswith("_delta_pct")


def _direction(better: str) -> bool | None:
    return {"higher": True, "lower": False}.get(better)


def _arrow(join: Join, layout: Layout, at: int) -> bool | None:
    column = layout.columns[at]
    if layout.rank != "columns" or not (column.address or layout.rows[0].address).get("metric"):
        return None
    return join.higher_is_better(column.address) if column.better is None else _direction(column.better)


def _ranked_across(join: Join, layout: Layout, at: int, row: Row) -> Row:
    """The row with its best cell marked, by its own metric's direction."""
    higher = join.higher_is_better(layout.address(layout.rows[at], layout.columns[0]))
    turned = [Row(column.label, (cell,)) for column, cell in zip(layout.columns, row.cells, strict=True)]
    marked = ranked([Column(row.label, higher)], turned)
    return replace(row, cells=tuple(one.cells[0] for one in marked))


def _without_second(cell: Cell) -> Cell:
    return replace(cell, rank="") if cell.rank == SECOND else cell
