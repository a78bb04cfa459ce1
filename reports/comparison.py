"""The generic comparison: methods against vanilla and against chance, one column per benchmark.

A pure function of records; `samples` gives it the questions behind a score, for the paired tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from pruneval.harness.records import RunRecord, RunSpec
from pruneval.reports import statistics
from pruneval.reports.entries import Entry, Group, count, entries, grouped, relative, value
from pruneval.reports.table import Cell, Column, Row, Table, ranked
from pruneval.tasks import Benchmark, benchmarks

Samples = Callable[[RunRecord], statistics.Answers | None]
Tests = Mapping[tuple[str, str], statistics.Difference]
NOT_ABOVE = "°"
MORE = 1.02
"""A method that keeps over 2 % more tokens than the `random` it is compared with says so."""


def settings(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Records by edition, model and setting: numbers that may not be compared never stand in one table."""
    records = list(records)
    revisions: dict[str, set[str]] = {}
    for record in records:
        revisions.setdefault(record.spec.benchmark, set()).add(record.spec.data)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        spec = record.spec
        data = spec.data if len(revisions[spec.benchmark]) > 1 else ""
        key = (spec.edition, spec.model, spec.revision, spec.dtype, spec.kernel, spec.limit or 0, spec.seed)
        more = (spec.num_beams or 0, spec.frames, spec.judge, data, spec.version)
        groups.setdefault((*key, *more), []).append(record)
    return [group for _, group in sorted(groups.items())]


def comparisons(records: Iterable[RunRecord], samples: Samples | None = None) -> list[Table]:
    """One table per setting."""
    return [comparison(group, samples=samples) for group in settings(records)]


def comparison(
    records: Iterable[RunRecord], missed: Iterable[tuple[RunSpec, str]] = (), samples: Samples | None = None
) -> Table:
    """The table of records of one model in one setting, rows grouped by budget, the best of a group first.

    Args:
        records: done and failed ones, in any order.
        missed: cells that could not be tried, each with the reason.
        samples: gives a record's answers; without it nothing is tested.
    """
    records = list(records)
    reasons = {(spec.method_signature, spec.benchmark): reason for spec, reason in missed}
    specs = [*(record.spec for record in records), *(spec for spec, _ in missed)]
    if not specs:
        raise ValueError("a table needs at least one record")
    table = benchmarks()
    seen = {spec.benchmark for spec in specs}
    known = {name: table[name] for name in table if name in seen}
    found = entries(records, [spec for spec, _ in missed], known)
    base = next((entry.records for entry in found if entry.reference), {})
    counts = {name: {count(r, known[name]) for e in found if (r := e.records[name]) and r.done} for name in known}
    groups = grouped(found)
    above = above_chance(groups, samples) if samples else {}
    tested = bool(above)
    rows = []
    for group in groups:
        lines = []
        for entry in group.entries:
            cells = [
                _score(entry, name, known[name], reasons.get((entry.name, name), ""), counts[name], above)
                for name in known
            ]
            share = relative(entry.records, base, known)
            cells += [_average(entry, known), _relative(entry, share)]
            cells += [_over_chance(entry, group, above)] * tested
            lines.append((share, Row(entry.name, (*cells, _budget(entry, group)), group.title, not entry.reference)))
        lines.sort(key=lambda line: (-(line[0] if line[0] is not None else float("-inf")), line[1].label))
        rows += [line for _, line in lines]
    one = specs[0]
    pocket = one.edition == "pocket"
    title = f"{one.model}: {'pocket scores, ' if pocket else ''}{len(known)} benchmark{'s' * (len(known) > 1)}"
    if one.limit:
        title += f", the first {one.limit} questions of each"
    columns = [_column(row, counts[name]) for name, row in known.items()]
    columns.append(Column("average, pocket" if pocket else "average", True, unit="% of maximum"))
    columns.append(Column("relative to vanilla", True, unit="%"))
    columns += [Column("right answers over random", True, unit="points")] * tested
    columns.append(Column("visual tokens", unit="avg_in"))
    return Table(title, "method", tuple(columns), ranked(columns, rows), _notes(pocket, tested), pocket)


def above_chance(groups: Iterable[Group], samples: Samples) -> dict[tuple[str, str], statistics.Difference]:
    """Every method against the `random` of its budget, by (method, benchmark) and, over all benchmarks, (method, "").

    p values are corrected for their number, apart for single benchmarks and for whole rows.
    """
    single: dict[tuple[str, str], statistics.Difference] = {}
    whole: dict[tuple[str, str], statistics.Difference] = {}
    for group in groups:
        for entry in group.entries:
            rival = group.chance(entry)
            if rival is None:
                continue
            for name in entry.records:
                if found := between(entry, rival, name, samples):
                    single[entry.name, name] = found
            parts = [single[entry.name, name] for name in entry.records if (entry.name, name) in single]
            if len(parts) == len(entry.records) and (both := statistics.together(parts)):
                whole[entry.name, ""] = both
    return {**corrected(single), **corrected(whole)}


def between(entry: Entry, rival: Entry, name: str, samples: Samples) -> statistics.Difference | None:
    """Two methods on one benchmark's questions; None when one of them has no answers."""
    first, second = entry.records.get(name), rival.records.get(name)
    if not (first and second and first.done and second.done):
        return None
    mine, theirs = samples(first), samples(second)
    return None if mine is None or theirs is None else statistics.paired(mine, theirs)


def corrected(found: Tests) -> dict[tuple[str, str], statistics.Difference]:
    """The same differences with Holm's p values over all of them."""
    return {
        key: replace(one, p=p)
        for (key, one), p in zip(found.items(), statistics.holm([one.p for one in found.values()]), strict=True)
    }


def _notes(pocket: bool, tested: bool) -> tuple[str, ...]:
    notes = [
        "± is one standard error. The average is the mean of the scores as percent of their maximum; relative to "
        "vanilla is the mean of score / vanilla's score. avg_in is the mean over layers of the visual tokens that "
        "enter a layer, observed while running."
    ]
    if tested:
        notes.append(
            f"{NOT_ABOVE} not above `random` at about the same budget: paired on the same questions (exact McNemar; "
            "where questions share an image, a t test clustered by image; over all benchmarks, z), two-sided at 5 %, "
            "Holm's correction over the table. It compares right answers, which MME's pairs and F1 count differently."
        )
    if pocket:
        notes.append("Pocket scores come from a small drawn world; they are not scores of the published benchmarks.")
    return tuple(notes)


def _column(row: Benchmark, counts: set[int]) -> Column:
    parts = [row.unit, *["lower is better"] * (not row.higher_is_better)]
    parts += [f"n={min(counts)}"] if len(counts) == 1 else []
    return Column(row.title, row.higher_is_better, unit=", ".join(parts))


def _score(entry: Entry, name: str, row: Benchmark, reason: str, counts: set[int], above: Tests) -> Cell:
    record = entry.records[name]
    if record is None:
        return Cell("not run", notes=(reason or "not run yet",))
    if not record.done:
        error = record.error or {}
        sample = f" at sample {error['sample']}" if error.get("sample") else ""
        note = f"failed{sample}: {error.get('message', 'no reason recorded')}"
        return Cell("failed", notes=(note,), runs=(record.spec.hash,))
    score = record.scores[row.metric]
    digits = 1 if row.scale != 1 or row.maximum <= 100 else 0
    text = f"{score['value'] * row.scale:.{digits}f}"
    if score.get("stderr") is not None:
        text += f" ±{score['stderr'] * row.scale:.{digits}f}"
    if len(counts) > 1:
        text += f" (n={count(record, row)})"
    mark = _mark(above.get((entry.name, name)))
    return Cell(text, score["value"] * row.scale, mark=mark, signatures=(entry.signature,), runs=(record.spec.hash,))


def _mark(found: statistics.Difference | None) -> str:
    return NOT_ABOVE if found and not (found.mean > 0 and found.p < statistics.LEVEL) else ""


def _average(entry: Entry, known: Mapping[str, Benchmark]) -> Cell:
    scores = {name: value(record, known[name]) for name, record in entry.records.items()}
    shares = [100 * score / known[name].maximum for name, score in scores.items() if score is not None]
    if len(shares) < len(known):
        return Cell("-")
    mean = sum(shares) / len(shares)
    return Cell(f"{mean:.1f}", mean, signatures=(entry.signature,), runs=entry.runs)


def _relative(entry: Entry, share: float | None) -> Cell:
    return Cell("-") if share is None else Cell(f"{share:.1f}", share, signatures=(entry.signature,), runs=entry.runs)


def _over_chance(entry: Entry, group: Group, above: Tests) -> Cell:
    found, rival = above.get((entry.name, "")), group.chance(entry)
    if found is None or rival is None:
        return Cell("-")
    text = f"{100 * found.mean:+.1f} ±{100 * found.stderr:.1f}"
    both = (entry.signature, rival.signature)
    return Cell(text, 100 * found.mean, mark=_mark(found), signatures=both, runs=entry.runs + rival.runs)


def _budget(entry: Entry, group: Group) -> Cell:
    kept, whole = entry.budget("avg_in"), entry.budget("visual_tokens")
    if kept is None or not whole:
        return Cell("-", notes=entry.remarks)
    rival = group.chance(entry)
    more = kept / rival.budget("avg_in") if rival else 1.0  # type: ignore[operator]
    note = (f"{100 * more - 100:.0f} % more visual tokens than the `random` it is compared with",)
    text = (
        f"{kept:.1f} of {whole:g} ({100 * kept / whole:.1f}%)"
        if round(whole) == whole
        else f"{kept:.1f} of {whole:.1f}"
    )
    notes = (*note * (more > MORE), *entry.remarks)
    return Cell(text, kept, notes=notes, signatures=(entry.signature,), runs=entry.runs)
