"""`pruneval report`: the tables of a results folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pruneval.harness.errors import UserError
from pruneval.harness.records import RunRecord, read_records, write_atomically
from pruneval.reports.comparison import comparisons
from pruneval.reports.markdown import to_markdown
from pruneval.reports.samples import reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--out", "--runs", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Print every table and write it beside the results."""
    text = "\n".join(to_markdown(table) for table in comparisons(records_of(args.out), reader(args.out)))
    path = args.out / "tables" / "report.md"
    write_atomically(path, text.encode())
    print(text)
    print(f"written to {path}", file=sys.stderr)
    return 0


def records_of(out: Path) -> list[RunRecord]:
    """The records of a results folder. Raises: UserError when there are none."""
    found = read_records(out)
    if not found:
        raise UserError(f"no records in {out}; run `pruneval eval` first or say where they are with --out")
    return found
