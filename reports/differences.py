"""Which differences are more than chance: every method against vanilla, and against the best of its budget."""

from __future__ import annotations

from collections.abc import Iterable

from pruneval.harness.records import RunRecord
from pruneval.reports import statistics
from pruneval.reports.comparison import Samples, between, corrected
from pruneval.reports.entries import Entry, entries, grouped
from pruneval.reports.table import Cell, Column, Row, Table
from pruneval.tasks import benchmarks

ALIKE = "≈"
ALL = ""
"""Stands for all benchmarks together."""


def differences(records: Iterable[RunRecord], samples: Samples) -> Table | None:
    """Paired differences in right answers, in points; None when there is nothing to compare.

    Args:
        records: of one model in one setting, as one table of `comparisons` has them.
        samples: gives a record's answers.
    """
    records = list(records)
    table = benchmarks()
    seen = {record.spec.benchmark for record in records}
    names = [name for name in table if name in seen]
    found = entries(records, [], names)
    base = next((entry for entry in found if entry.reference), None)
    if base is None or len(found) < 2:
        return None
    groups = grouped(found)
    to_base, to_best = {}, {}
    best_of: dict[str, Entry] = {}
    for group in groups:
        others = [entry for entry in group.entries if not entry.reference]
        for entry in others:
            to_base.update(
                _all({(entry.name, name): between(entry, base, name, samples) for name in names}, entry, names)
            )
        best = _best(others, to_base)
        for entry in others:
            if best is not None and entry is not best:
                best_of[entry.name] = best
                parts = {(entry.name, name): between(entry, best, name, samples) for name in names}
                to_best.update(_all(parts, entry, names))
    whole = {key: one for key, one in to_best.items() if key[1] == ALL}
    to_base, whole = corrected(to_base), corrected(whole)
    if not to_base:
        return None
    rows = []
    for group in groups:
        for entry in group.entries:
            if entry.reference:
                continue
            cells = [_cell(entry, base, name, to_base.get((entry.name, name)), samples) for name in names]
            overall = to_base.get((entry.name, ALL))
            cells.append(_cell(entry, base, ALL, overall, samples))
            cells.append(_against_best(entry, best_of.get(entry.name), whole.get((entry.name, ALL))))
            cells.append(_detectable(overall))
            rows.append(Row(entry.name, tuple(cells), group.title))
    short = [Column(table[name].title, group="right answers, points over vanilla") for name in names]
    total = Column("all benchmarks", group="right answers, points over vanilla")
    columns = (*short, total, Column("to the best of its budget"), Column("smallest detectable (80 %)"))
    pocket = records[0].spec.edition == "pocket"
    title = f"{records[0].spec.model}: which differences are more than chance{' (pocket)' if pocket else ''}"
    return Table(title, "method", columns, tuple(rows), _notes(to_base), pocket)


def _all(
    parts: dict[tuple[str, str], statistics.Difference | None], entry: Entry, names: list[str]
) -> dict[tuple[str, str], statistics.Difference]:
    """The parts that exist and, when all do, what they are together."""
    known = {key: one for key, one in parts.items() if one is not None}
    if len(known) == len(names) and (both := statistics.together(list(known.values()))):
        known[entry.name, ALL] = both
    return known


def _best(others: list[Entry], found: dict[tuple[str, str], statistics.Difference]) -> Entry | None:
    """The method that loses least to vanilla over all benchmarks; the first by name of equals."""
    complete = [entry for entry in others if (entry.name, ALL) in found]
    return max(complete, key=lambda entry: found[entry.name, ALL].mean, default=None)


def _cell(entry: Entry, base: Entry, name: str, found: statistics.Difference | None, samples: Samples) -> Cell:
    if found is None:
        return Cell("–")
    mark = "" if found.p < statistics.LEVEL else ALIKE
    text = f"{100 * found.mean:+.1f}"
    if name == ALL:
        low, high = found.mean - 1.96 * found.stderr, found.mean + 1.96 * found.stderr
        runs = (*entry.runs, *base.runs)
    else:
        mine, theirs = entry.records[name], base.records[name]
        assert mine is not None and theirs is not None
        first, second = samples(mine), samples(theirs)
        assert first is not None and second is not None
        low, high = statistics.paired_interval(first, second)
        runs = (mine.spec.hash, theirs.spec.hash)
    text += f" [{100 * low:+.1f}, {100 * high:+.1f}]" if found.stderr else ""
    signatures = (entry.signature, base.signature)
    return Cell(text, 100 * found.mean, 100 * found.stderr, mark=mark, signatures=signatures, runs=runs)


def _against_best(entry: Entry, best: Entry | None, found: statistics.Difference | None) -> Cell:
    if best is None:
        return Cell("best")
    if found is None:
        return Cell("–")
    mark = "" if found.p < statistics.LEVEL else ALIKE
    text = f"{100 * found.mean:+.1f} ±{100 * found.stderr:.1f}"
    signatures = (entry.signature, best.signature)
    return Cell(text, 100 * found.mean, 100 * found.stderr, mark=mark, signatures=signatures)


def _detectable(found: statistics.Difference | None) -> Cell:
    if found is None or not found.stderr:
        return Cell("–")
    return Cell(f"{100 * found.detectable:.1f}", 100 * found.detectable)


def _notes(found: dict[tuple[str, str], statistics.Difference]) -> tuple[str, ...]:
    tests = sorted({one.test for key, one in found.items() if key[1] != ALL})
    return (
        f"{ALIKE} cannot be told apart: p ≥ 5 % after Holm's correction over the table. In brackets the 95 % interval: "
        "paired bootstrap over images for one benchmark, normal for all together.",
        f"Tests on the same questions: {', '.join(tests)} (questions about one image are one unit); z over all "
        "benchmarks. Right answers are counted one by one, which MME's pairs and F1 count differently.",
        "Smallest detectable: the true difference to vanilla, over all benchmarks, that a test at 5 % finds in 80 % of "
        "repetitions with as many questions and as much disagreement.",
    )
