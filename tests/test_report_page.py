"""The report of a whole study: how long it takes, and its page in a real browser."""

from __future__ import annotations

import csv
import os
import time

import pytest
import tex
from browser import browsing, missing
from PIL import Image
from study_records import study, write

from pruneval.harness.cli import main
from pruneval.tasks import suite

FEW = ("vanilla", "random", "fastv", "visionzip", "sparsevlm")


def report(folder, form):
    assert main(["report", "--out", str(folder), "--format", form]) == 0
    return folder / "tables" / "report.html"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Records of a whole study, and of a few methods on five benchmarks."""
    whole, small = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # thousands of files that need not survive a power cut
        assert write(whole, rows=50) >= 2000  # so 100,000 rows
        write(small, rows=30, kinds=[kind for kind in study() if kind[0] in FEW], names=suite("pocket"))
    return whole, small


@pytest.fixture(scope="module")
def pages(written):
    """The pages of both, and what the study's took in processor seconds, libraries loaded before."""
    whole, small = written
    narrow = report(small, "html")
    start = time.process_time()
    wide = report(whole, "all")
    return wide, narrow, time.process_time() - start


def test_two_thousand_records_are_rendered_within_ten_seconds(pages):
    wide, _, seconds = pages
    assert seconds < 10
    assert {path.suffix for path in wide.parent.iterdir()} == {".md", ".tex", ".html", ".csv"}


@pytest.mark.skipif(tex.engine() is None, reason="no TeX engine is installed")
def test_the_tables_of_a_study_compile(pages, tmp_path):
    text = pages[0].with_suffix(".tex").read_text(encoding="utf-8")
    found, log = tex.compiled(text, tmp_path)
    assert found == text.count(r"\begin{table}") > 2 and "too large" not in log


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if reason := missing():
        pytest.skip(reason)
    with browsing() as found:
        yield found


WIDTH = "return [innerWidth, document.documentElement.scrollWidth]"
SPILLED = """return [...document.querySelectorAll("td, th")]
  .filter((cell) => cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent)"""
SMALLEST = """return Math.min(...[...document.querySelectorAll("td, td *, th, th *")]
  .map((part) => parseFloat(getComputedStyle(part).fontSize)))"""


@pytest.mark.parametrize("which", [0, 1], ids=["19 benchmarks", "5 benchmarks"])
def test_a_page_is_read_without_scrolling_sideways(browser, pages, tmp_path, which):
    browser.resize(1280, 900)
    browser.open(pages[which].as_uri())
    inner, whole = browser.run(WIDTH)
    assert inner == 1280 and whole <= 1280
    assert browser.run(SPILLED) == [] and browser.run(SMALLEST) >= 9
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (1280, 900)
        assert len(shot.convert("L").getcolors()) > 50


COLUMN = """const [heading, section] = arguments;
const at = document.querySelector(heading).cellIndex;
const rows = [...document.querySelector(heading).closest("table").tBodies[section].rows].slice(1);
return rows.map((row) => [row.cells[0].textContent, Number(row.cells[at].dataset.value)])"""
GQA = '#table-0 th[title^="GQA"]'


def test_a_click_on_a_heading_sorts_the_rows_of_each_budget(browser, pages):
    browser.resize(1280, 900)
    browser.open(pages[0].as_uri())
    with pages[0].with_suffix(".csv").open(encoding="utf-8") as lines:
        known = [line for line in csv.DictReader(lines) if line["column"] == "GQA (pocket) [%, n=50]"]
    section = known[1]["section"]
    assert "about 72 of 144" in section
    values = {line["row"]: float(line["value"]) for line in known if line["section"] == section}
    before = browser.run(COLUMN, GQA, 1)
    assert dict(before) == values and [value for _, value in before] != sorted(values.values(), reverse=True)
    browser.click(GQA)
    assert [value for _, value in browser.run(COLUMN, GQA, 1)] == sorted(values.values(), reverse=True)
    browser.run("scrollTo(0, 1500)")
    browser.click(GQA)  # the headings have stayed in sight
    assert browser.run("return scrollY") == 1500
    after = browser.run(COLUMN, GQA, 1)
    assert [value for _, value in after] == sorted(values.values()) and dict(after) == values


HOVERED = """const cell = [...document.querySelectorAll("#table-0 tbody tr")]
  .find((row) => row.cells[0].textContent.startsWith(arguments[0])).cells[2];
cell.scrollIntoView({block: "center"});
const box = cell.getBoundingClientRect();
const under = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
return [cell.dataset.value, under.closest("[title]").title]"""


def test_a_number_says_on_hover_what_was_run(browser, pages):
    browser.open(pages[0].as_uri())
    value, title = browser.run(HOVERED, "fastv(")
    first, signature, runs = title.split("\n")
    assert float(first) == pytest.approx(float(value))
    assert signature.startswith("pruneval|fastv(layer=2,keep=0.5,rows=last)|pocket-llava@01234567|pos:original|")
    assert (pages[0].parents[1] / runs.removeprefix("runs: ") / "record.json").is_file()


def test_names_stay_in_sight_on_a_narrow_screen(browser, pages):
    browser.resize(600, 900)
    browser.open(pages[1].as_uri())
    browser.run("scrollTo(200, 400)")
    label = browser.run("return document.querySelector('#table-0 tbody th.label').getBoundingClientRect().left")
    assert browser.run("return scrollX") == 200 and label >= 0
