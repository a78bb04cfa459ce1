"""`pruneval runs`: what a results folder holds, what differs between two runs, and what can go."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.harness.records import Journal, RecordError, RunRecord, claim, read_record, read_samples

DESCRIPTION = """\
list: every cell of a results folder, with its state and score. show: one cell in full. diff: what differs between two
cells, in spec and answers. gc: removes cells that failed or are damaged, and answers of cells nobody finished.
"""
EXAMPLES = """\
examples:
  pruneval runs list --out runs
  pruneval runs show 3b12b2634cdc7bf7
  pruneval runs diff 3b12b2634cdc7bf7 107d546d3f66b060     a name may be cut short
  pruneval runs gc --dry-run
"""
SHOWN = 10
"""Answers that differ, as `diff` prints them."""


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("what", choices=("list", "show", "diff", "gc"))
    add("cells", nargs="*", metavar="CELL", help="show: one cell; diff: two; by the first letters of its name")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")
    add("--json", action="store_true", help="list: a list of objects, for programs")
    add("--dry-run", action="store_true", help="gc: say what would go and leave it")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not args.out.is_dir():
        raise UserError(f"there is no results folder {args.out}; say where it is with --out")
    expected = {"list": 0, "show": 1, "diff": 2, "gc": 0}[args.what]
    if len(args.cells) != expected:
        raise UserError(f"runs {args.what} takes {expected} cells, not {len(args.cells)}")
    return {"list": _list, "show": _show, "diff": _diff, "gc": _gc}[args.what](args)


def states(out: Path) -> Iterator[tuple[Path, str, RunRecord | None]]:
    """Every cell's folder, its state (done, failed, damaged, unfinished) and its record, if it can be read."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and len(path.name) == 16):
        try:
            record = read_record(folder)
        except RecordError:
            yield folder, "damaged", None
            continue
        if record is not None:
            yield folder, record.status, record
        elif Journal(folder).files():
            yield folder, "unfinished", None


def _list(args: argparse.Namespace) -> int:
    rows = [_row(folder, state, record) for folder, state, record in states(args.out)]
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    for row in rows:
        text = f"{row['cell']}  {row['state']:<10}"
        if row["benchmark"]:
            text += f"  {row['model']}  {row['benchmark']}  {row['method']}  {row['score']}"
        print(text)
    counts = {state: sum(row["state"] == state for row in rows) for state in dict.fromkeys(r["state"] for r in rows)}
    print(f"{len(rows)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def _row(folder: Path, state: str, record: RunRecord | None) -> dict[str, Any]:
    spec = record.spec if record else None
    first = next(iter(record.scores.items()), None) if record else None
    return {
        "cell": folder.name,
        "state": state,
        "model": spec.model if spec else "",
        "benchmark": spec.benchmark if spec else "",
        "method": spec.method_signature if spec else "",
        "limit": spec.limit if spec else None,
        "score": f"{first[0]} {first[1]['value']:.4g}" if first else "",
    }


def _show(args: argparse.Namespace) -> int:
    folder = find(args.out, args.cells[0])
    record = read_record(folder)
    if record is None:
        raise UserError(f"the cell {folder.name} has not ended")
    print(json.dumps(record.to_dict(), indent=1, ensure_ascii=False))
    return 0


def _diff(args: argparse.Namespace) -> int:
    first, second = (find(args.out, name) for name in args.cells)
    one, other = (read_record(folder) for folder in (first, second))
    if one is None or other is None:
        raise UserError(f"the cell {(first if one is None else second).name} has not ended")
    left, right = one.spec.to_dict(), other.spec.to_dict()
    for key in left:
        if left[key] != right[key]:
            print(f"{key}: {left[key]} | {right[key]}")
    for metric in one.scores.keys() & other.scores.keys():
        values = one.scores[metric]["value"], other.scores[metric]["value"]
        if values[0] != values[1]:
            print(f"score {metric}: {values[0]:.6g} | {values[1]:.6g}")
    if one.samples is None or other.samples is None:
        print("one of them has no answers")
        return 0
    _answers(read_samples(first, one), read_samples(second, other))
    return 0


def _answers(one: Any, other: Any) -> None:
    both = one.merge(other, on=["doc_id", "prompt_hash"], suffixes=("", "_other"))
    changed = both[both["answer"] != both["answer_other"]]
    print(f"{len(changed)} of {len(both)} common questions are answered differently")
    if len(both) < max(len(one), len(other)):
        print(f"{max(len(one), len(other)) - len(both)} questions are in one of them only")
    for row in changed.head(SHOWN).itertuples():
        print(f"  {row.doc_id}: {row.answer!r} | {row.answer_other!r}" + (f"  ({row.target})" if row.target else ""))
    if len(changed) > SHOWN:
        print(f"  and {len(changed) - SHOWN} more")


def _gc(args: argparse.Namespace) -> int:
    gone = 0
    for folder, state, _ in states(args.out):
        if state == "done":
            continue
        try:
            with claim(folder):
                gone += 1
                print(f"{'would remove' if args.dry_run else 'removed'} {folder.name}: {state}")
                if not args.dry_run:
                    shutil.rmtree(folder)
        except UserError:
            print(f"kept {folder.name}: it is running")
    print(f"{gone} cells")
    return 0


def find(out: Path, name: str) -> Path:
    """The folder of a cell by the first letters of its name. Raises: UserError when there is none, or several."""
    found = [folder for folder, _, _ in states(out) if folder.name.startswith(name)]
    if len(found) != 1:
        raise UserError(
            f"{len(found) or 'no'} cells in {out} have a name that begins with {name}; see `pruneval runs list`"
        )
    return found[0]
