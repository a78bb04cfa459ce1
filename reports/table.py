"""The comparison table: methods against vanilla, one column per benchmark. A pure function of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pruneval.harness.records import RunRecord, RunSpec
from pruneval.tasks import Benchmark, benchmarks

REFERENCE = "vanilla"


@dataclass(frozen=True)
class Cell:
    """One printed cell; `note` becomes a footnote."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One method on one model."""

    method: str
    cells: tuple[Cell, ...]
    signature: str


@dataclass(frozen=True)
class Table:
    """What a renderer needs, rounded and worded already."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def comparisons(records: Iterable[RunRecord]) -> list[Table]:
    """One table per edition, model and setting: numbers that may not be compared never stand in one table."""
    records = list(records)
    revisions: dict[str, set[str]] = {}
    for record in records:
        revisions.setdefault(record.spec.benchmark, set()).add(record.spec.data)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        spec = record.spec
        data = spec.data if len(revisions[spec.benchmark]) > 1 else ""
        key = (spec.edition, spec.model, spec.revision, spec.dtype, spec.kernel, spec.limit or 0, spec.seed)
        groups.setdefault((*key, data, spec.version), []).append(record)
    return [comparison(group) for _, group in sorted(groups.items())]


def comparison(records: Iterable[RunRecord], missed: Iterable[tuple[RunSpec, str]] = ()) -> Table:
    """The table of records of one model in one setting.

    Args:
        records: done and failed ones, in any order.
        missed: cells that could not be tried, each with the reason.
    """
    found = {(record.spec.method_signature, record.spec.benchmark): record for record in records}
    reasons = {(spec.method_signature, spec.benchmark): reason for spec, reason in missed}
    specs = [record.spec for record in found.values()] + [spec for spec, _ in missed]
    if not specs:
        raise ValueError("a table needs at least one record")
    known = benchmarks()
    names = [name for name in known if any(spec.benchmark == name for spec in specs)]
    kinds = {spec.method_signature: spec for spec in sorted(specs, key=_order)}
    base = {name: found.get((_reference(kinds), name)) for name in names}
    counts = {
        name: {_count(record, known[name]) for (_, b), record in found.items() if b == name and record.done}
        for name in names
    }
    rows = []
    for kind, spec in kinds.items():
        mine = {name: found.get((kind, name)) for name in names}
        cells = [_score(mine[name], known[name], reasons.get((kind, name), ""), counts[name]) for name in names]
        rows.append(
            Row(
                kind,
                (*cells, _average(mine, known), _relative(mine, base, known), _budget(mine)),
                _signature(spec, mine),
            )
        )
    one = specs[0]
    pocket = one.edition == "pocket"
    title = f"{one.model}: {'pocket scores, ' if pocket else ''}{len(names)} benchmark{'s' * (len(names) > 1)}"
    if one.limit:
        title += f", the first {one.limit} questions of each"
    columns = [_heading(known[name], counts[name]) for name in names]
    average = "average, pocket (% of maximum)" if pocket else "average (% of maximum)"
    return Table(
        title,
        ("method", *columns, average, "relative to vanilla (%)", "visual tokens (avg_in)"),
        tuple(rows),
        _notes(pocket),
    )


def _order(spec: RunSpec) -> tuple[bool, str, str]:
    return (spec.method != REFERENCE, spec.method, spec.method_signature)


def _reference(kinds: Mapping[str, RunSpec]) -> str:
    return next((kind for kind, spec in kinds.items() if spec.method == REFERENCE), "")


def _notes(pocket: bool) -> tuple[str, ...]:
    notes = [
        "± is one standard error. The average is the mean of the scores as percent of their maximum; relative to "
        "vanilla is the mean of score / vanilla's score. avg_in is the mean over layers of the visual tokens that "
        "enter a layer, observed while running."
    ]
    if pocket:
        notes.append("Pocket scores come from a small drawn world; they are not scores of the published benchmarks.")
    return tuple(notes)


def _value(record: RunRecord | None, row: Benchmark) -> float | None:
    if record is None or not record.done:
        return None
    return float(record.scores[row.metric]["value"])


def _count(record: RunRecord, row: Benchmark) -> int:
    return int(record.samples["rows"]) if record.samples else int(record.scores[row.metric]["n"])


def _heading(row: Benchmark, counts: set[int]) -> str:
    arrow = "" if row.higher_is_better else ", lower is better"
    n = f", n={min(counts)}" if len(counts) == 1 else ""
    return f"{row.title} ({row.unit}{arrow}{n})" if "(" not in row.title else f"{row.title} [{row.unit}{arrow}{n}]"


def _score(record: RunRecord | None, row: Benchmark, reason: str, counts: set[int]) -> Cell:
    if record is None:
        return Cell("not run", reason or "not run yet")
    if not record.done:
        error = record.error or {}
        return Cell(
            "failed", f"failed at sample {error.get('sample', '?')}: {error.get('message', 'no reason recorded')}"
        )
    score = record.scores[row.metric]
    digits = 1 if row.scale != 1 or row.maximum <= 100 else 0
    text = f"{score['value'] * row.scale:.{digits}f}"
    if score.get("stderr") is not None:
        text += f" ±{score['stderr'] * row.scale:.{digits}f}"
    if len(counts) > 1:
        text += f" (n={_count(record, row)})"
    return Cell(text)


def _average(mine: Mapping[str, RunRecord | None], known: Mapping[str, Benchmark]) -> Cell:
    shares = [
        100 * value / known[name].maximum
        for name, record in mine.items()
        if (value := _value(record, known[name])) is not None
    ]
    return Cell(f"{sum(shares) / len(shares):.1f}") if len(shares) == len(mine) else Cell("-")


def _relative(
    mine: Mapping[str, RunRecord | None], base: Mapping[str, RunRecord | None], known: Mapping[str, Benchmark]
) -> Cell:
    shares = []
    for name, record in mine.items():
        value, reference = _value(record, known[name]), _value(base[name], known[name])
        if value is None or not reference:
            return Cell("-")
        shares.append(100 * value / reference)
    return Cell(f"{sum(shares) / len(shares):.1f}")


def _mean(mine: Mapping[str, RunRecord | None], key: str) -> float | None:
    """Mean over all samples of all benchmarks."""
    weighted = [
        (record.budget[key], record.samples["rows"])
        for record in mine.values()
        if record and record.samples and key in record.budget
    ]
    total = sum(rows for _, rows in weighted)
    return sum(value * rows for value, rows in weighted) / total if total else None


def _budget(mine: Mapping[str, RunRecord | None]) -> Cell:
    kept, whole = _mean(mine, "avg_in"), _mean(mine, "visual_tokens")
    if kept is None or not whole:
        return Cell("-")
    return Cell(
        f"{kept:.1f} of {whole:g} ({100 * kept / whole:.1f}%)"
        if round(whole) == whole
        else f"{kept:.1f} of {whole:.1f}"
    )


def _signature(spec: RunSpec, mine: Mapping[str, RunRecord | None]) -> str:
    return spec.signature(_mean(mine, "avg_in"))


def to_markdown(table: Table) -> str:
    """The table as Markdown, its footnotes and every row's signature below it."""
    notes: dict[str, int] = {}

    def shown(cell: Cell) -> str:
        text = cell.text.replace("|", "\\|")
        return f"{text} [{notes.setdefault(cell.note, len(notes) + 1)}]" if cell.note else text

    body = [[row.method.replace("|", "\\|"), *map(shown, row.cells)] for row in table.rows]
    widths = [max(len(line[column]) for line in [list(table.columns), *body]) for column in range(len(table.columns))]
    lines = [f"# {table.title}", ""]
    for number, line in enumerate([list(table.columns), *body]):
        padded = [
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
        if number == 0:
            lines.append(
                "|"
                + "|".join("-" * (width + 2) if at == 0 else "-" * (width + 1) + ":" for at, width in enumerate(widths))
                + "|"
            )
    lines += [""] + [f"[{number}] {note}  " for note, number in notes.items()] + [""] * bool(notes)
    lines += [f"{note}  " for note in table.notes]
    lines += ["", *(f"- `{row.signature}`" for row in table.rows)]
    return "\n".join(lines) + "\n"
