"""What a renderer gets: a table of cells that know their value, the runs behind it and how it ranks.

Every renderer (`markdown`, `latex`, `html`, `delimited`) is a pure function of a `Table`; nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

BEST, SECOND = "best", "second"
WIDE = 10
"""Tables with more columns are set closer: what follows a number stands below it, long headings stand upright."""


@dataclass(frozen=True)
class Cell:
    """One printed cell."""

    text: str
    value: float | None = None
    """The number behind the text at full precision; None where there is none, which is not the same as 0."""
    stderr: float | None = None
    """Its standard error, where it is known and not in the text."""
    notes: tuple[str, ...] = ()
    """Each becomes a footnote."""
    mark: str = ""
    """A sign behind the text that a note of the table explains, such as "°" or "(?)"."""
    rank: str = ""
    """"best" or "second" among the rows it is compared with."""
    signatures: tuple[str, ...] = ()
    """What was run, for all of these numbers; for a published number its source."""
    runs: tuple[str, ...] = ()
    """The folders of the records this number was worked out from."""

    @property
    def parted(self) -> tuple[str, str]:
        """The number, and what follows it: its error, its interval, "of 144", "/ 61.9"."""
        if self.value is None and " / " not in self.text:
            return self.text, ""
        number, _, rest = self.text.partition(" ")
        return number, rest


@dataclass(frozen=True)
class Column:
    """One column behind the first."""

    heading: str
    higher_is_better: bool | None = None
    """None where cells are not ranked."""
    group: str = ""
    """Neighbours with the same group stand under one heading."""
    numeric: bool = True
    unit: str = ""
    """What its numbers are, in a few words."""

    @property
    def whole(self) -> str:
        """The heading with its unit, in one line."""
        if not self.unit:
            return self.heading
        return f"{self.heading} [{self.unit}]" if "(" in self.heading else f"{self.heading} ({self.unit})"


@dataclass(frozen=True)
class Row:
    """One line: a label and as many cells as the table has columns."""

    label: str
    cells: tuple[Cell, ...]
    section: str = ""
    """Rows of a section stand together under its title."""
    ranked: bool = True
    """False for the unpruned model, for differences, and for whatever else no row competes with."""


@dataclass(frozen=True)
class Table:
    """A whole table, rounded and worded already."""

    title: str
    head: str
    """The heading of the labels."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    pocket: bool = False
    """True when its numbers come from pocket editions."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.label!r} has {len(row.cells)} cells for {len(self.columns)} columns")

    @property
    def wide(self) -> bool:
        """Whether it has to be set closer."""
        return len(self.columns) > WIDE

    def name(self, column: Column) -> str:
        """A column's heading without "pocket", for where the whole table is marked with it."""
        return column.heading.replace(" (pocket)", "").replace(", pocket", "") if self.pocket else column.heading

    @property
    def signatures(self) -> tuple[str, ...]:
        """Every signature once, in the order of the rows."""
        return tuple(dict.fromkeys(name for row in self.rows for cell in row.cells for name in cell.signatures))


def ranked(columns: Sequence[Column], rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with best and second best marked per column and section.

    Equal printed numbers share a rank; two that share the first leave no second. A lone number has no rank, and of two
    only the better has one.
    """
    rows = list(rows)
    for at, column in enumerate(columns):
        if column.higher_is_better is None:
            continue
        for section in dict.fromkeys(row.section for row in rows):
            among = [i for i, row in enumerate(rows) if row.ranked and row.section == section]
            for i, rank in _ranks([rows[i].cells[at] for i in among], column.higher_is_better, among):
                cells = list(rows[i].cells)
                cells[at] = replace(cells[at], rank=rank)
                rows[i] = replace(rows[i], cells=tuple(cells))
    return tuple(rows)


def _ranks(cells: Sequence[Cell], higher: bool, places: Sequence[int]) -> list[tuple[int, str]]:
    printed = [(places[i], number) for i, cell in enumerate(cells) if (number := _printed(cell)) is not None]
    order = sorted((number for _, number in printed), reverse=higher)
    if len(order) < 2 or order[0] == order[-1]:
        return []
    second = order[1] if len(order) > 2 and order[1] != order[0] else None
    return [
        (place, BEST if number == order[0] else SECOND)
        for place, number in printed
        if number == order[0] or number == second
    ]


def _printed(cell: Cell) -> float | None:
    """The number as printed, so that cells that look equal are equal; None when there is none."""
    if cell.value is None:
        return None
    try:
        return float(cell.text.split()[0].replace(",", "").replace("−", "-").rstrip("%"))
    except (ValueError, IndexError):
        return cell.value
