"""The comparison table, against a golden file worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from pruneval.harness.records import RunRecord
from pruneval.harness.spec import RunSpec
from pruneval.reports.comparison import comparison, comparisons
from pruneval.reports.markdown import to_markdown

SPEC = RunSpec(
    model="pocket-llava", revision="0123456789ab", method="vanilla", params={}, given={}, benchmark="pocket-mme",
    edition="pocket", data="d", limit=None, seed=0, dtype="float32", kernel="sdpa", positions="original",
    prompt_key="pruneval", version="0.1",
)  # fmt: skip
FASTV = {"method": "fastv", "params": {"layer": 2, "keep": 0.5}}
METRIC = {"pocket-mme": "mme_total_score", "pocket-gqa": "exact_match,none", "mme": "mme_total_score"}


def record(value, stderr=None, rows=240, avg_in=144.0, **changes):
    spec = dataclasses.replace(SPEC, **changes)
    return RunRecord(
        spec=spec,
        status="done",
        scores={METRIC[spec.benchmark]: {"value": value, "n": rows, "stderr": stderr}},
        budget={"avg_in": avg_in, "visual_tokens": 144.0},
        samples={"file": "samples.parquet", "rows": rows, "sha256": ""},
    )


def failed(**changes):
    error = {"sample": "gqa/17", "message": "RuntimeError: no | luck"}
    return RunRecord(spec=dataclasses.replace(SPEC, **changes), status="failed", error=error)


DONE = [
    record(600, 12.4),
    record(0.8, 0.0258, benchmark="pocket-gqa"),
    record(540, 13.6, avg_in=80.0, **FASTV),
    record(0.76, None, avg_in=100.0, benchmark="pocket-gqa", **FASTV),
]

GOLDEN = """\
# pocket-llava: pocket scores, 2 benchmarks

| method                  | MME (pocket) [of 1200, n=240] | GQA (pocket) [%, n=240] | average, pocket (% of maximum) | relative to vanilla (%) | visual tokens (avg_in) |
|-------------------------|------------------------------:|------------------------:|-------------------------------:|------------------------:|-----------------------:|
| vanilla                 |                       600 ±12 |               80.0 ±2.6 |                           65.0 |                   100.0 |  144.0 of 144 (100.0%) |
| fastv(layer=2,keep=0.5) |                       540 ±14 |                    76.0 |                           60.5 |                    92.5 |    90.0 of 144 (62.5%) |
"""  # noqa: E501


def body(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_table_is_what_one_works_out_by_hand():
    text = to_markdown(comparison(DONE))
    assert text.startswith(GOLDEN + "\n± is one standard error.")
    assert text.endswith(
        "- `pruneval|vanilla|pocket-llava@01234567|pos:original|kernel:sdpa|budget:avg_in=144|v:0.1`\n"
        "- `pruneval|fastv(layer=2,keep=0.5)|pocket-llava@01234567|pos:original|kernel:sdpa|budget:avg_in=90|v:0.1`\n"
    )
    assert "not scores of the published benchmarks" in text


def test_the_order_of_the_records_does_not_matter():
    assert comparison(DONE[::-1]) == comparison(DONE)


def test_a_failed_cell_has_no_score_and_a_footnote():
    text = to_markdown(comparison([*DONE[:3], failed(benchmark="pocket-gqa", **FASTV)]))
    assert body(text)[1] == ["fastv(layer=2,keep=0.5)", "540 ±14", "failed [1]", "-", "-", "80.0 of 144 (55.6%)"]
    assert "\n[1] failed at sample gqa/17: RuntimeError: no | luck" in text


def test_cells_that_were_not_run_say_why():
    missed = [(dataclasses.replace(SPEC, benchmark="pocket-gqa"), "use a larger limit")]
    text = to_markdown(comparison([DONE[0], DONE[2], DONE[3]], missed))
    assert body(text)[0][2] == "not run [1]" and "\n[1] use a larger limit" in text
    assert body(text)[1][-2] == "-"  # nothing to be relative to
    only = to_markdown(comparison([DONE[0], DONE[3]]))
    assert [row[1:3] for row in body(only)] == [["600 ±12", "not run [1]"], ["not run [1]", "76.0"]]


def test_a_zero_is_a_score():
    text = to_markdown(
        comparison([record(0.0, 0.0, benchmark="pocket-gqa"), record(0.0, benchmark="pocket-gqa", **FASTV)])
    )
    assert [row[1] for row in body(text)] == ["0.0 ±0.0", "0.0"]
    assert [row[2:4] for row in body(text)] == [["0.0", "-"], ["0.0", "-"]]


def test_numbers_of_questions_that_differ_stand_in_the_cells():
    text = to_markdown(comparison([record(600), record(500, rows=238, **FASTV)]))
    assert [row[1] for row in body(text)] == ["600 (n=240)", "500 (n=238)"]


@pytest.mark.parametrize(
    "change", [{"limit": 8}, {"revision": "x"}, {"kernel": "eager"}, {"dtype": "float16"}, {"seed": 1}, {"data": "x"}]
)
def test_what_may_not_be_compared_stands_in_two_tables(change):
    other = record(600, **change)
    tables = comparisons([DONE[0], DONE[2], other])
    assert sorted(len(table.rows) for table in tables) == [1, 2]


def test_published_benchmarks_are_never_called_pocket():
    text = to_markdown(comparison([record(1800, benchmark="mme", edition="full", limit=20, model="llava-1.5-7b")]))
    assert "pocket" not in text and "MME (of 2800, n=240)" in text and "the first 20 questions" in text


def test_nothing_is_no_table():
    with pytest.raises(ValueError, match="at least one"):
        comparison([])
    assert comparisons([]) == []
