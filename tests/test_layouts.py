"""Every layout prints its paper's table cell by cell, and joins our records into the right places."""

from __future__ import annotations

import csv
import dataclasses
import re
from importlib.resources import files

import pytest

from pruneval.harness.errors import UserError
from pruneval.harness.records import RunRecord, RunSpec
from pruneval.reports import layout as layouts
from pruneval.reports.filled import HOLE, SHOW, fill
from pruneval.reports.markdown import to_markdown

PUBLISHED = files("pruneval.reports").joinpath("published")
OF_PAPERS = [name for name in layouts.names() if layouts.load(name).table]
TRANSCRIBED = ("abstract", "text_claims", "tableT4")
"""Claims of the text, and a table of hyperparameters: no table of results."""


def transcription(table: str) -> list[list[str]]:
    """The cells of the Markdown transcription beside a CSV: its rows without titles of blocks."""
    lines = PUBLISHED.joinpath(*f"{table}.md".split("/")).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows[2:] if any(row[1:])]


def number(text: str) -> str:
    return re.sub(r"</?u>|\(.*?\)", "", text).strip()


@pytest.mark.parametrize("name", OF_PAPERS)
def test_the_published_table_is_printed_cell_by_cell(name):
    layout = layouts.load(name)
    table = fill(layout, [], "published")
    expected = transcription(layout.table)
    assert len(table.rows) == len(expected)
    for row, theirs in zip(table.rows, expected, strict=True):
        theirs = theirs[-len(row.cells) :]
        for cell, printed in zip(row.cells, theirs, strict=True):
            if number(printed) in ("-", "100"):
                assert cell.text in (HOLE, "100"), (row.label, printed)
            else:
                assert float(cell.text) == pytest.approx(float(number(printed)), abs=1e-9), (row.label, printed)
            assert ("(?)" in printed) <= (cell.mark == layouts.DOUBT), (row.label, printed)


@pytest.mark.parametrize("name", OF_PAPERS)
def test_every_number_of_the_source_stands_in_one_cell(name):
    layout = layouts.load(name)
    with PUBLISHED.joinpath(*f"{layout.table}.csv".split("/")).open(encoding="utf-8") as lines:
        source = sorted(row["value"] for row in csv.DictReader(lines))
    shown = [cell.text for row in fill(layout, [], "published").rows for cell in row.cells if cell.text != HOLE]
    assert sorted(text.lstrip("+") for text in shown) == source


def test_every_table_of_the_sources_has_a_layout():
    tables = {
        f"{paper.name}/{path.name.removesuffix('.csv')}"
        for paper in PUBLISHED.iterdir()
        if paper.is_dir()
        for path in paper.iterdir()
        if path.name.endswith(".csv") and not path.name.startswith(TRANSCRIBED)
    }
    assert tables == {layouts.load(name).table for name in OF_PAPERS}


# Ours -----------------------------------------------------------------------------------------------------------------

SPEC = RunSpec(
    model="llava-1.5-7b", revision="0123456789ab", method="vanilla", params={}, given={}, benchmark="gqa",
    edition="full", data="", limit=None, seed=0, dtype="float16", kernel="sdpa", positions="original",
    prompt_key="pruneval", version="0.1",
)  # fmt: skip
METHODS = {
    "vanilla": ({}, 576.0),
    "fastv": ({"layer": 2, "keep": 0.0556}, 32.0),
    "visionzip": ({"keep": 1 / 18}, 32.0),
    "flowcut": ({"keep": 1 / 18}, 32.0),
    "vtw": ({"keep": 0.12, "layer": "5"}, 0.0),
}


def run(method, benchmark, value, tflops=None, **changes):
    from pruneval.tasks import benchmarks

    params, kept = METHODS[method]
    spec = dataclasses.replace(SPEC, method=method, params=params, benchmark=benchmark, **changes)
    return RunRecord(
        spec=spec,
        status="done",
        scores={benchmarks()[benchmark].metric: {"value": value, "n": 100, "stderr": 0.01}},
        budget={"avg_in": kept, "kept_after": kept, "keep": kept / 576, "visual_tokens": 576.0},
        implied={"tflops": tflops} if tflops else None,
        samples={"file": "samples.parquet", "rows": 100, "sha256": ""},
    )


def failed(method, benchmark):
    done = run(method, benchmark, 0.0)
    return dataclasses.replace(done, status="failed", scores={}, budget={}, error={"sample": "7", "message": "Boom"})


OURS = [
    *(run("vanilla", name, 0.8) for name in ("gqa", "textvqa_ocr", "vqav2", "pope", "scienceqa", "vizwiz")),
    *(run("visionzip", name, 0.6) for name in ("gqa", "textvqa_ocr", "vqav2", "pope", "scienceqa", "vizwiz")),
    run("fastv", "gqa", 0.0),
    run("fastv", "pope", 0.6),
    run("flowcut", "gqa", 0.7),
    failed("flowcut", "pope"),
]


def cells(table, label):
    return next(row.cells for row in table.rows if row.label == label)


def test_our_numbers_stand_in_the_papers_places():
    table = fill(layouts.load("flowcut-table8"), OURS)
    texts = {row.label: [cell.text for cell in row.cells] for row in table.rows}
    assert texts == {
        "LLaVA-1.5 7B (upper limit)": ["80.0"] * 6 + ["100"],
        "FastV": ["0.0", HOLE, HOLE, "60.0", HOLE, HOLE, HOLE],
        "VisionZip": ["60.0"] * 6 + ["75.0"],
        "FlowCut (Ours)": ["70.0", HOLE, HOLE, HOLE, HOLE, HOLE, HOLE],
    }
    assert {row.label: [cell.rank for cell in row.cells][:4] for row in table.rows} == {
        "LLaVA-1.5 7B (upper limit)": ["", "", "", ""],
        "FastV": ["", "", "", ""],  # POPE ties with VisionZip, and nothing is worse
        "VisionZip": ["", "", "", ""],
        "FlowCut (Ours)": ["best", "", "", ""],
    }


def test_holes_say_why():
    table = fill(layouts.load("flowcut-table8"), OURS)
    assert cells(table, "FlowCut (Ours)")[3].notes == ("failed at sample 7: Boom",)
    assert cells(table, "FastV")[1].notes == ("not run",)
    assert cells(table, "FastV")[-1].notes == ("needs textvqa_ocr, vqav2, scienceqa, vizwiz",)
    judged = fill(layouts.load("ifprune-t5"), [])
    assert cells(judged, "LLaVA-1.5")[14].notes == ("not run; a judge is needed to score it",)
    trained = fill(layouts.load("gsearch-table5"), [])
    assert cells(trained, "Train w/ reduction")[0].notes == ("unsupported: needs a model trained with reduction",)
    text = to_markdown(table)
    assert "– [1]" in text and "\n[1] not run  \n" in text


def test_a_cell_knows_its_runs():
    table = fill(layouts.load("flowcut-table8"), OURS)
    zipped = [record for record in OURS if record.spec.method == "visionzip"]
    assert cells(table, "VisionZip")[0].runs == (zipped[0].spec.hash,)
    assert cells(table, "VisionZip")[0].signatures == (zipped[0].spec.signature(32.0),)
    assert set(cells(table, "VisionZip")[-1].runs) == {r.spec.hash for r in OURS if r.spec.method != "fastv"} - {
        r.spec.hash for r in OURS if r.spec.method == "flowcut"
    }


@pytest.mark.parametrize("change", [{"edition": "pocket"}, {"limit": 8}, {"model": "llava-1.5-13b"}])
def test_other_runs_never_fill_a_papers_cell(change):
    table = fill(layouts.load("flowcut-table8"), [run("vanilla", "gqa", 0.8, **change)])
    assert {cell.text for row in table.rows for cell in row.cells} == {HOLE}


def test_another_budget_never_fills_a_papers_cell():
    record = run("visionzip", "gqa", 0.6)
    other = dataclasses.replace(record, budget={**record.budget, "kept_after": 64.0})
    assert cells(fill(layouts.load("flowcut-table8"), [other]), "VisionZip")[0].text == HOLE


def test_the_cheaper_is_the_better():
    costs = [run("vtw", "pope", 0.5, 2.5), run("flowcut", "pope", 0.5, 1.5), run("vanilla", "pope", 0.5, 9.0)]
    layout = layouts.parse("x", {**PLAIN, "columns": [{"heading": "TFLOPs", "metric": "tflops"}]})
    table = fill(layout, costs)
    assert [(row.cells[0].text, row.cells[0].rank) for row in table.rows] == [("9", ""), ("2.5", ""), ("1.5", "best")]
    assert table.columns[0].heading == "TFLOPs ↓"


PLAIN = {
    "title": "t",
    "head": "Method",
    "rows": [
        {"label": "v", "model": "llava-1.5-7b", "method": "vanilla", "ranked": False},
        {"label": "a", "model": "llava-1.5-7b", "method": "vtw"},
        {"label": "b", "model": "llava-1.5-7b", "method": "flowcut"},
    ],
}


def test_difference_rows_subtract_the_two_rows_above():
    rows = [*PLAIN["rows"], {"label": "Δ", "delta": True}]
    layout = layouts.parse("x", {**PLAIN, "rows": rows, "columns": [{"heading": "GQA", "metric": "gqa"}]})
    table = fill(layout, [run("vtw", "gqa", 0.5), run("flowcut", "gqa", 0.625)])
    assert [row.cells[0].text for row in table.rows] == [HOLE, "50.0", "62.5", "+12.5"]
    assert [row.cells[0].rank for row in table.rows] == ["", "", "best", ""]


def test_both_and_difference():
    both = fill(layouts.load("flowcut-table8"), OURS, "both")
    assert [cell.text for cell in cells(both, "VisionZip")][:2] == ["60.0 / 51.5", "60.0 / 51.7"]
    assert cells(both, "FastV")[1].text == f"{HOLE} / 51.5"
    gap = fill(layouts.load("flowcut-table8"), OURS, "difference")
    assert [cell.text for cell in cells(gap, "VisionZip")][:2] == ["+8.5", "+8.3"]
    assert not {cell.rank for table in (both, gap) for row in table.rows for cell in row.cells} - {""}


def test_every_layout_can_be_shown_in_every_way():
    for name in layouts.names():
        for show in SHOW:
            table = fill(layouts.load(name), OURS, show)
            assert table.pocket == name.startswith("pocket")
            assert ("pocket" in table.title) == table.pocket


def test_methods_and_parameters_of_layouts_exist():
    from pruneval import methods

    known = set(methods.names())
    for name in layouts.names():
        layout = layouts.load(name)
        for line in (*layout.rows, *layout.columns):
            ours = line.address.get("ours", {})
            if ours.get("method") in known:
                fields = {f.name for f in dataclasses.fields(methods.method_class(ours["method"]))}
                assert set(ours.get("params", {})) <= fields, (name, line.label)


def test_unknown_layouts_and_keys_are_one_clear_line():
    with pytest.raises(UserError, match="unknown layout 'gsearch-tabel1'; did you mean 'gsearch-table1'"):
        layouts.load("gsearch-tabel1")
    with pytest.raises(UserError, match="layout 'x': unknown key 'colour'"):
        layouts.parse("x", {**PLAIN, "columns": [], "colour": "red"})
    with pytest.raises(UserError, match="layout 'x': unknown key 'metrik'"):
        layouts.parse("x", {**PLAIN, "columns": [{"heading": "h", "metrik": "gqa"}]})
