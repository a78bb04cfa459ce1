"""A table as LaTeX (booktabs), and a whole document of tables. It needs booktabs and graphicx."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby

from pruneval.reports.table import BEST, SECOND, Cell, Column, Table

STYLES = {BEST: "textbf", SECOND: "underline"}
SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "°": r"$^\circ$", "≈": r"$\approx$", "–": "--",
    "—": "---", "−": "$-$", "×": r"$\times$", "Δ": r"$\Delta$", "τ": r"$\tau$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "“": "``", "”": "''", "’": "'", "…": r"\ldots{}", "\n": " ",
}  # fmt: skip
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
    """One table environment, scaled down to the line where it is wider, notes below it."""
    notes: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        text = escaped(cell.text)
        text = _command(STYLES[cell.rank], text) if cell.rank else text
        text += f"~{escaped(cell.mark)}" if cell.mark else ""
        marks = ",".join(str(notes.setdefault(note, len(notes) + 1)) for note in cell.notes)
        return text + _command("textsuperscript", marks) * bool(marks)

    width = len(table.columns) + 1
    body: list[str] = []
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        body.append(r"\midrule")
        if section:
            body.append(_command("multicolumn", width, "l", _command("textit", escaped(section))) + r" \\")
        body += [" & ".join([escaped(row.label), *map(shown, row.cells)]) + r" \\" for row in rows]
    marked = [f"{_command('textsuperscript', number)} {escaped(note)}" for note, number in notes.items()]
    below = [f"{note}\\par" for note in [*marked, *map(escaped, table.notes)]]
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        _command("caption", escaped(table.title)),
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        _command("begin", "tabular", "l" + "".join("r" if column.numeric else "l" for column in table.columns)),
        r"\toprule",
        *_head(table.head, table.columns),
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


def _head(head: str, columns: Sequence[Column]) -> list[str]:
    """One line of headings, and one of groups above it where there are any."""
    lines = []
    if any(column.group for column in columns):
        at, over, rules = 2, [""], []
        for group, among in groupby(columns, key=lambda column: column.group):
            width = len(list(among))
            over += [_command("multicolumn", width, "c", escaped(group))] if group else [""] * width
            rules += [f"\\cmidrule(lr){{{at}-{at + width - 1}}}"] * bool(group)
            at += width
        lines = [" & ".join(over) + r" \\", "".join(rules)]
    return [*lines, " & ".join([escaped(head), *(escaped(column.whole) for column in columns)]) + r" \\"]


def _plain(sign: str) -> str:
    if "À" <= sign <= "ÿ":
        return sign
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"
