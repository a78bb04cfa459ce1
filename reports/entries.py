"""Records sorted into rows: one entry per method with its parameters, in groups of about equal budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from pruneval.harness.records import RunRecord, RunSpec
from pruneval.tasks import Benchmark

REFERENCE = "vanilla"
CHANCE = "random"
NEAR = math.log(1.15)
"""Budgets within 15 % of each other stand in one group."""


@dataclass(frozen=True)
class Entry:
    """What one row shows: a method with its parameters and its record of each benchmark."""

    spec: RunSpec
    records: Mapping[str, RunRecord | None]

    @property
    def name(self) -> str:
        """Method and parameters."""
        return self.spec.method_signature

    @property
    def reference(self) -> bool:
        """Whether this is the unpruned model."""
        return self.spec.method == REFERENCE

    def budget(self, key: str) -> float | None:
        """Mean of a budget over all samples of all benchmarks; None when nothing was observed."""
        return self._budgets.get(key)

    @cached_property
    def _budgets(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        totals: dict[str, int] = {}
        for record in self.records.values():
            rows = record.samples["rows"] if record and record.samples else 0
            for key, value in record.budget.items() if record and rows else ():
                if value is not None:
                    sums[key] = sums.get(key, 0.0) + value * rows
                    totals[key] = totals.get(key, 0) + rows
        return {key: total / totals[key] for key, total in sums.items()}

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What must be said of the row: why its method is provisional, and what models beside the large one cost."""
        done = [record for record in self.records.values() if record]
        remarks = [f"provisional: {record.provisional}" for record in done if record.provisional]
        costs = [record.implied for record in done if record.implied and record.implied.get("helper_tflops")]
        if costs:
            helper, whole, plain = (
                sum(cost[key] for cost in costs) / len(costs)
                for key in ("helper_tflops", "tflops_with_helpers", "unpruned_tflops")
            )
            remarks.append(
                f"besides the model ({', '.join(costs[0]['helpers'])}): {helper:.3g} TFLOPs implied, "
                f"{whole:.3g} in all, {plain:.3g} un-pruned"
            )
        return tuple(dict.fromkeys(remarks))

    @cached_property
    def runs(self) -> tuple[str, ...]:
        """The folders of its records."""
        return tuple(record.spec.hash for record in self.records.values() if record)

    @cached_property
    def signature(self) -> str:
        """What the row's numbers carry."""
        return self.spec.signature(self.budget("avg_in"))


@dataclass(frozen=True)
class Group:
    """Entries of about one budget."""

    title: str
    entries: tuple[Entry, ...]

    def chance(self, entry: Entry) -> Entry | None:
        """The group's `random` that is nearest in budget; None for `random` itself, or when there is none."""
        found = [one for one in self.entries if one.spec.method == CHANCE and one.budget("avg_in")]
        mine = entry.budget("avg_in")
        if entry.spec.method in (CHANCE, REFERENCE) or not found or not mine:
            return None
        return min(found, key=lambda one: _apart(one.budget("avg_in"), mine))


def entries(records: Iterable[RunRecord], missed: Iterable[RunSpec], names: Iterable[str]) -> list[Entry]:
    """One entry per method with parameters, vanilla first, then by name."""
    by_cell = {(record.spec.method_signature, record.spec.benchmark): record for record in records}
    specs = [*(record.spec for record in by_cell.values()), *missed]
    kinds = {spec.method_signature: spec for spec in sorted(specs, key=lambda s: (s.method_signature, s.benchmark))}
    names = list(names)
    found = [Entry(spec, {name: by_cell.get((kind, name)) for name in names}) for kind, spec in kinds.items()]
    return sorted(found, key=lambda entry: (not entry.reference, entry.spec.method, entry.name))


def grouped(found: Iterable[Entry]) -> list[Group]:
    """Entries by budget: around the `random` ones where there are any, else around the largest not yet in a group.

    One group without `random` needs no title.
    """
    found = list(found)
    whole = [entry for entry in found if entry.reference]
    rest = [entry for entry in found if not entry.reference]
    known = sorted((e for e in rest if e.budget("avg_in")), key=lambda e: (-e.budget("avg_in"), e.name))  # type: ignore[operator]
    centres: list[float] = []
    for entry in [*(e for e in known if e.spec.method == CHANCE), *(e for e in known if e.spec.method != CHANCE)]:
        budget = entry.budget("avg_in")
        if budget and all(_apart(budget, centre) > NEAR for centre in centres):
            centres.append(budget)
    centres.sort(reverse=True)
    titled = len(centres) > 1 or any(entry.spec.method == CHANCE for entry in rest)
    total = next((v for e in [*whole, *rest] if (v := e.budget("visual_tokens"))), 0.0)
    groups = [Group("all visual tokens" if titled else "", tuple(whole))] if whole else []
    for centre in centres:
        share = f" ({100 * centre / total:.0f} %)" if total else ""
        title = f"about {centre:.4g} of {total:.4g} visual tokens{share}" if titled else ""
        mine = [e for e in known if min(centres, key=lambda c: _apart(c, e.budget("avg_in"))) == centre]
        groups.append(Group(title, tuple(mine)))
    unknown = [entry for entry in rest if not entry.budget("avg_in")]
    if unknown:
        groups.append(Group("budget not observed" if titled else "", tuple(unknown)))
    return groups


def value(record: RunRecord | None, row: Benchmark) -> float | None:
    """The benchmark's score, unscaled; None without one."""
    if record is None or not record.done:
        return None
    return float(record.scores[row.metric]["value"])


def count(record: RunRecord, row: Benchmark) -> int:
    """Questions that were scored."""
    return int(record.samples["rows"]) if record.samples else int(record.scores[row.metric]["n"])


def relative(
    mine: Mapping[str, RunRecord | None], base: Mapping[str, RunRecord | None], known: Mapping[str, Benchmark]
) -> float | None:
    """Mean over benchmarks of score / vanilla's score, in per cent; None when a score is missing or vanilla's is 0."""
    shares = []
    for name, record in mine.items():
        score, reference = value(record, known[name]), value(base.get(name), known[name])
        if score is None or not reference:
            return None
        share = score / reference
        shares.append(100 * (share if known[name].higher_is_better else 1 / share if share else math.inf))
    return sum(shares) / len(shares) if shares else None


def _apart(first: float | None, second: float | None) -> float:
    return abs(math.log((first or 1e-9) / (second or 1e-9)))
