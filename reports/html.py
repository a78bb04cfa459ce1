"""One self-contained page: sortable tables, the figures, and behind every number its signature and runs on hover."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from pruneval.reports.table import BEST, SECOND, Cell, Column, Row, Table

STYLES = {BEST: "<b>{}</b>", SECOND: "<u>{}</u>", "": "{}"}
BREAKS = ",|/=("
"""A long name may go on in the next line behind these signs."""
LONG = 8
"""In a wide table headings of more letters stand upright."""

HALF = 520
"""Points: what half a page has room for without making a figure's letters much smaller."""


def page(title: str, tables: Sequence[Table], figures: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        title: what stands at the top.
        tables: in their order.
        figures: caption -> SVG.
    """
    figures = figures or {}
    found = {"style": _asset("page.css"), "script": _asset("page.js")}
    links = [f'<a href="#table-{at}">{escape(table.title)}</a>' for at, table in enumerate(tables)]
    links += [f'<a href="#figure-{at}">{escape(caption)}</a>' for at, caption in enumerate(figures)]
    body = [_table(at, table) for at, table in enumerate(tables)]
    drawn = [_figure(at, caption, svg) for at, (caption, svg) in enumerate(figures.items())]
    body += ['<div class="figures">', *drawn, "</div>"] if drawn else []
    hint = "Click a heading to sort; point at a number for what was run to get it."
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{found['style']}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>\n<p>{hint}</p>",
            f"<nav>{''.join(links)}</nav>" if len(links) > 1 else "",
            *body,
            f"<script>\n{found['script']}</script>\n</body>\n</html>\n",
        ]
    )


def _table(at: int, table: Table) -> str:
    notes: dict[str, int] = {}
    bodies = []
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        lines = [_row(row, notes, at) for row in rows]
        over = f'<tr class="section"><th colspan="{len(table.columns) + 1}">{escape(section)}</th></tr>\n'
        bodies.append(f"<tbody>\n{over * bool(section)}{''.join(lines)}</tbody>")
    badge = ' <span class="pocket">pocket</span>' if table.pocket else ""
    marked = [f'<li id="note-{at}-{number}" value="{number}">{escape(note)}</li>\n' for note, number in notes.items()]
    parts = [
        f'<section id="table-{at}">\n<h2>{escape(table.title)}{badge}</h2>',
        f"<table{_shape(table)}>\n<thead>\n{_head(table, badge)}</thead>",
        *bodies,
        "</table>",
        f'<ol class="notes">\n{"".join(marked)}</ol>' if marked else "",
        *(f'<p class="note">{escape(note)}</p>' for note in table.notes),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _shape(table: Table) -> str:
    if not table.wide:
        return ""
    upright = any(len(column.heading) > LONG or column.unit for column in table.columns)
    return f' class="wide{" upright" * upright}"'


def _head(table: Table, badge: str) -> str:
    over = ""
    if any(column.group for column in table.columns):
        groups = [(group, len(list(among))) for group, among in groupby(table.columns, key=lambda column: column.group)]
        cells = "".join(f'<th colspan="{width}" class="group">{escape(group)}</th>' for group, width in groups)
        over = f"<tr><td></td>{cells}</tr>\n"
    names = "".join(_heading(table.name(column), column) for column in table.columns)
    return f'{over}<tr><th scope="col" class="label" data-sort>{escape(table.head)}{badge}</th>{names}</tr>\n'


def _heading(name: str, column: Column) -> str:
    unit = f"<small>{escape(column.unit)}</small>" if column.unit else ""
    return f'<th scope="col" title="{escape(column.whole)}" data-sort><span>{escape(name)}{unit}</span></th>'


def _row(row: Row, notes: dict[str, int], at: int) -> str:
    cells = "".join(_cell(cell, notes, at) for cell in row.cells)
    kind = "" if row.ranked else ' class="apart"'
    return f'<tr{kind}><th scope="row" class="label">{_label(row.label)}</th>{cells}</tr>\n'


def _label(text: str) -> str:
    """A method's name, and its parameters in smaller type."""
    name, sign, parameters = text.partition("(")
    if not sign or name.endswith(" "):
        return _breakable(text)
    return f"{escape(name)}<small>{_breakable(sign + parameters)}</small>"


def _cell(cell: Cell, notes: dict[str, int], at: int) -> str:
    number, rest = cell.parted
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    behind = _behind(cell)
    hover = f' title="{escape(behind)}"' if behind else ""
    text = STYLES[cell.rank].format(escape(number))
    mark = f'<span class="mark">{escape(cell.mark)}</span>' if cell.mark else ""
    interval = ' class="interval"' if rest.startswith("[") else ""
    more = f" <small{interval}>{escape(rest)}</small>" if rest else ""
    if rest.startswith("/"):  # what is marked is the other number
        mark, more = "", more + mark
    numbers = [notes.setdefault(note, len(notes) + 1) for note in cell.notes]
    links = ",".join(f'<a href="#note-{at}-{number}">{number}</a>' for number in numbers)
    return f"<td{value}{hover}>{text}{mark}{f'<sup>{links}</sup>' if links else ''}{more}</td>"


def _behind(cell: Cell) -> str:
    """What a reader sees who points at the number."""
    lines = [] if cell.value is None else [f"{cell.value:.10g}" + (f" ± {cell.stderr:.3g}" if cell.stderr else "")]
    lines += cell.signatures
    if cell.runs:
        lines.append(f"runs: {' '.join(cell.runs[:8])}" + (f" and {len(cell.runs) - 8} more" * (len(cell.runs) > 8)))
    return "\n".join(lines)


def _breakable(text: str) -> str:
    return "".join(escape(sign) + ("<wbr>" if sign in BREAKS else "") for sign in text)


def _figure(at: int, caption: str, svg: str) -> str:
    """The drawing without its XML head; two stand side by side where neither is too wide for that."""
    svg = svg[svg.index("<svg") :]
    width = re.match(r'<svg[^>]* width="([\d.]+)pt"', svg, re.DOTALL)
    broad = ' class="broad"' if width and float(width[1]) > HALF else ""
    return f'<figure id="figure-{at}"{broad}>{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _asset(name: str) -> str:
    return files("pruneval.reports").joinpath("assets", name).read_text(encoding="utf-8")
