"""A table as Markdown: footnotes below it, and every signature once."""

from __future__ import annotations

from pruneval.reports.table import BEST, SECOND, Cell, Column, Table

STYLES = {BEST: "**{}**", SECOND: "<u>{}</u>", "": "{}"}


def to_markdown(table: Table) -> str:
    """The table with its notes and signatures."""
    notes: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        text = STYLES[cell.rank].format(escaped(cell.text)) if cell.text else ""
        text += f" {cell.mark}" if cell.mark else ""
        return text + "".join(f" [{notes.setdefault(note, len(notes) + 1)}]" for note in cell.notes)

    lines: list[list[str]] = [[escaped(table.head), *(escaped(_heading(column)) for column in table.columns)]]
    section = ""
    for row in table.rows:
        if row.section != section:
            section = row.section
            lines.append([f"**{escaped(section)}**", *[""] * len(table.columns)])
        lines.append([escaped(row.label), *map(shown, row.cells)])
    left = [True, *(not column.numeric for column in table.columns)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(left))]
    text = [f"# {table.title}", ""]
    for number, line in enumerate(lines):
        padded = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ]
        text.append("| " + " | ".join(padded) + " |")
        if number == 0:
            rules = ["-" * (w + 2) if to_left else "-" * (w + 1) + ":" for w, to_left in zip(widths, left, strict=True)]
            text.append("|" + "|".join(rules) + "|")
    text += [""] + [f"[{number}] {note}  " for note, number in notes.items()] + [""] * bool(notes)
    text += [f"{note}  " for note in table.notes]
    text += ["", *(f"- `{signature}`" for signature in table.signatures)] if table.signatures else []
    return "\n".join(text) + "\n"


def escaped(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    return text.replace("|", "\\|").replace("*", "\\*") if "|" in text or "*" in text else text


def _heading(column: Column) -> str:
    return f"{column.group}: {column.whole}" if column.group else column.whole
