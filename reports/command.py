"""`pruneval report`: the tables of a results folder, in the generic form or in a paper's layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pruneval.harness.errors import UserError
from pruneval.harness.records import RunRecord, read_records, write_atomically
from pruneval.reports.comparison import comparison, settings
from pruneval.reports.filled import SHOW
from pruneval.reports.table import Table

FORMATS = {"markdown": "md", "latex": "tex", "html": "html", "csv": "csv"}
EVERY = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--out", "--runs", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")
    add("--layout", metavar="L", help="a table of a paper (`pruneval list layouts`), or `papers` for all of them")
    add("--format", choices=(*FORMATS, EVERY), default="markdown", help="html has the figures too (default: markdown)")
    add("--show", choices=SHOW, default="ours", help="with --layout: whose numbers (default: ours)")
    add(
        "--bench", action="append", type=Path, default=[], metavar="FILE",
        help="with --layout: times and bytes of a document that `pruneval bench` wrote; may be repeated",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Print the tables and write them beside the results."""
    if args.layout is None and args.show != "ours":
        raise UserError(f"--show {args.show} needs a paper's table: add --layout (see `pruneval list layouts`)")
    if args.bench and args.layout is None:
        raise UserError("--bench needs a paper's table: add --layout (see `pruneval list layouts`)")
    name = "report" if args.layout is None else f"{args.layout}_{args.show}"
    forms = tuple(FORMATS) if args.format == EVERY else (args.format,)
    if "html" in forms and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder; an HTML page is written into it")
    tables, figures = _layouts(args) if args.layout else _comparisons(args.out, "html" in forms)
    for form in forms:
        text = render(tables, form, figures)
        if form == forms[0] != "html":
            print(text)
        if args.out.is_dir():
            path = args.out / "tables" / f"{name}.{FORMATS[form]}"
            write_atomically(path, text.encode())
            print(f"written to {path}", file=sys.stderr)
    return 0


def render(tables: Sequence[Table], form: str, figures: dict[str, str] | None = None) -> str:
    """Tables in one of `FORMATS`."""
    from pruneval.reports import delimited, html, latex, markdown

    if form == "html":
        return html.page("pruneval: " + (tables[0].title if len(tables) == 1 else "report"), tables, figures)
    as_text: dict[str, Callable[[Sequence[Table]], str]] = {
        "markdown": lambda found: "\n".join(map(markdown.to_markdown, found)),
        "latex": latex.document,
        "csv": delimited.to_csv,
    }
    return as_text[form](tables)


def records_of(out: Path) -> list[RunRecord]:
    """The records of a results folder. Raises: UserError when there are none."""
    found = read_records(out)
    if not found:
        raise UserError(f"no records in {out}; run `pruneval eval` first or say where they are with --out")
    return found


def _comparisons(out: Path, drawn: bool) -> tuple[list[Table], dict[str, str]]:
    """One table per setting, then what is more than chance; with the figures where they can be shown."""
    from pruneval.reports.differences import differences
    from pruneval.reports.samples import reader

    samples = reader(out)
    groups = settings(records_of(out))
    tables = [comparison(group, samples=samples) for group in groups]
    tables += [table for group in groups if (table := differences(group, samples))]
    if not drawn:
        return tables, {}
    from pruneval.reports.points import drawings

    return tables, {caption: svg for group in groups for caption, svg in drawings(group).items()}


def _layouts(args: argparse.Namespace) -> tuple[list[Table], dict[str, str]]:
    from pruneval.reports import benched
    from pruneval.reports import layout as layouts
    from pruneval.reports.filled import fill

    names = [args.layout]
    if args.layout == "papers":
        names = [name for name in layouts.names() if layouts.load(name).table]
    chosen = [layouts.load(name) for name in names]
    benches = [benched.read(path) for path in args.bench]
    records = [] if args.show == "published" else read_records(args.out) if benches else records_of(args.out)
    return [fill(layout, records, args.show, benches) for layout in chosen], {}
