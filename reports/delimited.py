"""A table as CSV: one line per cell, at full precision, with everything the cell knows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from pruneval.reports.table import Table

FIELDS = ("table", "section", "row", "column", "text", "value", "stderr", "rank", "mark", "notes", "signatures", "runs")


def to_csv(tables: Iterable[Table]) -> str:
    """Every cell of every table, under one heading line."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(FIELDS)
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                heading = f"{column.group}: {column.whole}" if column.group else column.whole
                value = "" if cell.value is None else repr(cell.value)
                stderr = "" if cell.stderr is None else repr(cell.stderr)
                many = ("; ".join(cell.notes), " ".join(cell.signatures), " ".join(cell.runs))
                place = (table.title, row.section, row.label, heading)
                lines.writerow((*place, cell.text, value, stderr, cell.rank, cell.mark, *many))
    return out.getvalue()
