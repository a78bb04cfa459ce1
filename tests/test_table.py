"""The comparison table, against a golden file worked out by hand."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from pruneval.harness.records import RunRecord
from pruneval.harness.spec import RunSpec
from pruneval.reports.comparison import comparison, comparisons
from pruneval.reports.differences import differences
from pruneval.reports.markdown import to_markdown
from pruneval.reports.statistics import answers

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


# Budgets and chance ---------------------------------------------------------------------------------------------------


def answered(method, right, avg_in, n=240, benchmark="pocket-gqa", **params):
    """A record and its samples: `right` lists the numbers of the questions answered rightly."""
    one = record(len(right) / n, benchmark=benchmark, method=method, params=params, avg_in=avg_in)
    correct = [float(number in right) for number in range(n)]
    return one, answers(pd.DataFrame({"doc_id": range(n), "prompt_hash": "p", "correct": correct, "image": None}))


def judged(*pairs):
    frames = {one.spec.hash: frame for one, frame in pairs}
    return comparison([one for one, _ in pairs], samples=lambda one: frames[one.spec.hash])


CONTEST = [
    answered("vanilla", range(220), 144.0),
    answered("random", range(100), 72.0, keep=0.5),
    answered("good", range(180), 72.0, keep=0.5),
    answered("same", range(100), 72.0, keep=0.5),
    answered("lucky", range(104), 74.0, keep=0.5),
    answered("worse", range(60), 70.0, keep=0.5),
    answered("random", range(60), 36.0, keep=0.25),
    answered("good", range(160), 36.0, keep=0.25),
    answered("alone", range(200), 110.0),
]


def test_rows_stand_by_budget_and_the_best_first():
    rows = judged(*CONTEST).rows
    assert [(row.section, row.label) for row in rows] == [
        ("all visual tokens", "vanilla"),
        ("about 110 of 144 visual tokens (76 %)", "alone"),
        ("about 72 of 144 visual tokens (50 %)", "good(keep=0.5)"),
        ("about 72 of 144 visual tokens (50 %)", "lucky(keep=0.5)"),
        ("about 72 of 144 visual tokens (50 %)", "random(keep=0.5)"),
        ("about 72 of 144 visual tokens (50 %)", "same(keep=0.5)"),
        ("about 72 of 144 visual tokens (50 %)", "worse(keep=0.5)"),
        ("about 36 of 144 visual tokens (25 %)", "good(keep=0.25)"),
        ("about 36 of 144 visual tokens (25 %)", "random(keep=0.25)"),
    ]


def test_what_is_not_above_random_is_marked():
    marks = {row.label: (row.cells[0].mark, row.cells[3].mark, row.cells[3].text) for row in judged(*CONTEST).rows}
    assert marks == {
        "vanilla": ("", "", "-"),
        "alone": ("", "", "-"),  # no random at its budget
        "good(keep=0.5)": ("", "", "+33.3 ±3.0"),
        "lucky(keep=0.5)": ("°", "°", "+1.7 ±0.8"),  # p = 0.125, and four comparisons
        "random(keep=0.5)": ("", "", "-"),
        "same(keep=0.5)": ("°", "°", "+0.0 ±0.0"),
        "worse(keep=0.5)": ("°", "°", "-16.7 ±2.4"),
        "good(keep=0.25)": ("", "", "+41.7 ±3.2"),
        "random(keep=0.25)": ("", "", "-"),
    }


def test_more_tokens_than_random_are_said():
    rows = {row.label: row.cells[-1] for row in judged(*CONTEST).rows}
    assert rows["lucky(keep=0.5)"].notes == ("3 % more visual tokens than the `random` it is compared with",)
    assert rows["good(keep=0.5)"].notes == () and rows["worse(keep=0.5)"].notes == ()


def test_the_best_and_the_second_of_a_budget():
    rows = [row for row in judged(*CONTEST).rows if "(50 %)" in row.section]
    assert [row.cells[0].rank for row in rows] == ["best", "second", "", "", ""]


def test_differences_tell_what_is_more_than_chance():
    frames = {one.spec.hash: frame for one, frame in CONTEST}
    table = differences([one for one, _ in CONTEST], lambda one: frames[one.spec.hash])
    rows = {row.label: row.cells for row in table.rows}
    assert rows["good(keep=0.5)"][0].text.startswith("-16.7 [") and rows["good(keep=0.5)"][0].mark == ""
    assert rows["good(keep=0.5)"][2].text == "best"
    assert rows["lucky(keep=0.5)"][2].text == "-31.7 ±3.0" and rows["lucky(keep=0.5)"][2].mark == ""
    assert rows["random(keep=0.5)"][3].value == pytest.approx(9.05, abs=0.1)
    twins = differences([one for one, _ in CONTEST[:1]] + [CONTEST[1][0], CONTEST[3][0]], lambda o: frames[o.spec.hash])
    assert {row.label: row.cells[2].mark for row in twins.rows} == {"random(keep=0.5)": "", "same(keep=0.5)": "≈"}
    assert differences([CONTEST[1][0]], lambda one: frames[one.spec.hash]) is None


def test_failed_and_pocket_runs_in_a_whole_report(tmp_path):
    broken = failed(benchmark="pocket-gqa", method="random", params={"keep": 0.5})
    frames = {one.spec.hash: frame for one, frame in CONTEST}
    records = [CONTEST[0][0], CONTEST[2][0], broken]
    table = comparison(records, samples=lambda one: frames.get(one.spec.hash))
    assert table.pocket and "right answers over random (points)" not in [column.whole for column in table.columns]
    assert {row.label: row.cells[0].text for row in table.rows}["random(keep=0.5)"] == "failed"
