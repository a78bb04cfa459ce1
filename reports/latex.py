"""A table as LaTeX (booktabs), and a whole document of tables. It needs booktabs and graphicx.

A wide table is set closer: upright headings, and under each row a line with what follows its numbers. A long one is
several.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

from pruneval.reports.table import BEST, SECOND, Cell, Row, Table

STYLES = {BEST: "textbf", SECOND: "underline"}
SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "°": r"$^\circ$", "≈": r"$\approx$", "–": "--",
    "—": "---", "−": "$-$", "×": r"$\times$", "Δ": r"$\Delta$", "τ": r"$\tau$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "“": "``", "”": "''", "’": "'", "…": r"\ldots{}", "\n": " ",
}  # fmt: skip
LINES = 46
"""What fits on a page besides headings and the notes to the whole table."""
UPRIGHT = 20
"""In a wide table headings with more letters, commands included, stand upright."""
PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=15mm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is; signs outside its fonts become their plain form, or a question mark."""
    return "".join(SIGNS.get(sign) or (sign if sign.isascii() else _plain(sign)) for sign in text)


def to_latex(table: Table) -> str:
    """Table environments, scaled down to the line where they are wider, notes below them."""
    return "\n".join(map(_environment, _pages(table)))


def _pages(table: Table) -> list[Table]:
    """The table in parts that fit on a page each, of about the same length; the notes are below the last."""
    count = math.ceil(_height(table) / LINES)
    if count < 2:
        return [table]
    size = math.ceil(len(table.rows) / count)
    return [
        replace(
            table,
            title=f"{table.title} ({at + 1} of {count})",
            rows=table.rows[at * size : (at + 1) * size],
            notes=table.notes if at == count - 1 else (),
        )
        for at in range(count)
    ]


def _height(table: Table) -> int:
    """In lines: of rows, of sections with the rules between them, and of footnotes."""
    rows = sum(2 if table.wide and _under(row) else 1 for row in table.rows)
    sections = len(list(groupby(table.rows, key=lambda row: row.section)))
    return rows + 2 * sections + len({note for row in table.rows for cell in row.cells for note in cell.notes})


def _environment(table: Table) -> str:
    notes: dict[str, int] = {}
    lines_of = _two_lines if table.wide else _one_line
    width = len(table.columns) + 1
    body: list[str] = []
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        body.append(r"\midrule")
        if section:
            body.append(_command("multicolumn", width, "l", _command("textit", escaped(section))) + r" \\")
        body += [" & ".join(line) + r" \\" for row in rows for line in lines_of(row, notes)]
    marked = [f"{_command('textsuperscript', number)} {escaped(note)}" for note, number in notes.items()]
    below = [f"{note}\\par" for note in [*marked, *map(escaped, table.notes)]]
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        *[r"\setlength{\tabcolsep}{2pt}"] * table.wide,
        _command("caption", escaped(table.title)),
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        _command("begin", "tabular", "l" + "".join("r" if column.numeric else "l" for column in table.columns)),
        r"\toprule",
        *_head(table),
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *([r"\begin{flushleft}\footnotesize", *below, r"\end{flushleft}"] if below else []),
        r"\end{table}",
        *(f"% {signature}" for signature in table.signatures),
    ]
    return "\n".join(lines) + "\n"


def document(tables: Iterable[Table]) -> str:
    """Something a TeX engine can be run on."""
    return PREAMBLE + "\n".join(to_latex(table) + r"\clearpage" for table in tables) + "\n\\end{document}\n"


def _command(name: str, *arguments: object) -> str:
    return f"\\{name}" + "".join(f"{{{argument}}}" for argument in arguments)


def _one_line(row: Row, notes: dict[str, int]) -> list[list[str]]:
    return [[escaped(row.label), *(_shown(cell, cell.text, notes) for cell in row.cells)]]


def _two_lines(row: Row, notes: dict[str, int]) -> list[list[str]]:
    """Name and numbers; below them parameters, errors and intervals in smaller type."""
    name, sign, parameters = row.label.partition("(")
    small = escaped(sign + parameters).replace(",", r",\allowbreak ")
    parts = [cell.parted for cell in row.cells]
    first = [_shown(cell, number, notes) for cell, (number, _) in zip(row.cells, parts, strict=True)]
    if not _under(row):
        return [[escaped(name), *first]]
    second = [rf"{{\scriptsize {escaped(rest)}}}" if rest else "" for _, rest in parts]
    return [[escaped(name), *first], [rf"\parbox[t]{{40mm}}{{\raggedright\tiny {small}}}" if small else "", *second]]


def _under(row: Row) -> bool:
    """Whether a row of a wide table has a second line."""
    return "(" in row.label or any(cell.parted[1] for cell in row.cells)


def _shown(cell: Cell, text: str, notes: dict[str, int]) -> str:
    text = escaped(text)
    text = _command(STYLES[cell.rank], text) if cell.rank else text
    text += f"~{escaped(cell.mark)}" if cell.mark else ""
    marks = ",".join(str(notes.setdefault(note, len(notes) + 1)) for note in cell.notes)
    return text + _command("textsuperscript", marks) * bool(marks)


def _head(table: Table) -> list[str]:
    """One line of headings, and one of groups above it where there are any."""
    lines = []
    if any(column.group for column in table.columns):
        at, over, rules = 2, [""], []
        for group, among in groupby(table.columns, key=lambda column: column.group):
            width = len(list(among))
            over += [_command("multicolumn", width, "c", escaped(group))] if group else [""] * width
            rules += [f"\\cmidrule(lr){{{at}-{at + width - 1}}}"] * bool(group)
            at += width
        lines = [" & ".join(over) + r" \\", "".join(rules)]
    columns = [replace(column, heading=table.name(column)) if table.wide else column for column in table.columns]
    headings = [escaped(column.whole) for column in columns]
    if any(len(heading) > UPRIGHT for heading in headings) and table.wide:
        headings = [_command("rotatebox", 90, heading) for heading in headings]
    return [*lines, " & ".join([escaped(table.head), *headings]) + r" \\"]


def _plain(sign: str) -> str:
    if "À" <= sign <= "ÿ":
        return sign
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"
