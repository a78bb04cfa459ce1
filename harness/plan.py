"""What `pruneval eval --dry-run` prints: every cell with what it would need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pruneval.harness import data, judge
from pruneval.harness.data_check import demand
from pruneval.harness.errors import UserError
from pruneval.harness.run import Cell


def plan(cells: Iterable[Cell], out: Path) -> list[str]:
    """One line per cell, and per benchmark one on its data and judge. Nothing is loaded or written."""
    lines, seen = [], set()
    for cell in cells:
        row, spec = cell.benchmark, cell.spec
        if row.name not in seen:
            seen.add(row.name)
            lines.append(f"{row.name}: {_needs(cell)}")
        asked = min(spec.limit * len(row.tasks), row.n) if spec.limit else row.n  # a limit holds for every part
        done = "done before" if (out / spec.hash / "record.json").exists() else "to run"
        lines.append(f"  {spec.method_signature} on {spec.model}: {asked} questions, {done} ({spec.hash})")
    return lines


def _needs(cell: Cell) -> str:
    row = cell.benchmark
    if row.edition == "pocket":
        parts = [f"drawn here, {data.revision(row)}"]
    else:
        try:
            demand(row, cell.spec.limit)
            parts = [f"{row.dataset} at {data.revision(row)}, complete"]
        except UserError as error:
            parts = [f"not runnable: {error}"]
    if row.videos:
        parts.append(f"frames {cell.spec.frames}")
    if row.judge:
        parts.append(f"judge {cell.spec.judge}" if cell.spec.judge else f"not runnable: {judge.lacking(row)}")
    return "; ".join(parts)
