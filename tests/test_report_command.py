"""`pruneval report` on a results folder: what is written, and what bad input gets."""

from __future__ import annotations

import csv

import pytest
from study_records import study, write

from pruneval.harness.cli import main
from pruneval.tasks import suite


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    kinds = [kind for kind in study() if kind[0] in ("vanilla", "random", "fastv", "visionzip")][:9]
    assert write(folder, rows=30, kinds=kinds, names=suite("pocket")) == 45
    return folder


def call(capsys, *arguments):
    code = main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_every_format_is_written(runs, capsys):
    code, out, err = call(capsys, "report", "--out", str(runs), "--format", "all")
    assert code == 0 and err.count("written to") == 4
    written = {path.name for path in (runs / "tables").iterdir()}
    assert written == {"report.md", "report.tex", "report.html", "report.csv"}
    assert "**about 72 of 144 visual tokens (50 %)**" in out and "° not above `random`" in out
    page = (runs / "tables" / "report.html").read_text()
    assert page.count("<svg") == 4 and "accuracy against TFLOPs, pocket scores" in page
    lines = list(csv.DictReader((runs / "tables" / "report.csv").open()))
    assert len(lines) == 9 * 9 + 8 * 8  # the comparison, and the differences of all but vanilla
    latex = (runs / "tables" / "report.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2


def test_a_papers_layout_is_never_filled_with_pocket_runs(runs, capsys):
    code, out, _ = call(capsys, "report", "--runs", str(runs), "--layout", "gsearch-table1", "--show", "both")
    assert code == 0 and "– / 48.97" in out and "[1] not run" in out


def test_a_pocket_layout_takes_them(runs, capsys):
    code, out, _ = call(capsys, "report", "--out", str(runs), "--layout", "pocket-budgets")
    row = next(line for line in out.splitlines() if line.startswith("| random"))
    assert code == 0 and "(pocket)" in out.splitlines()[0] and "–" not in row


def test_published_tables_need_no_runs(tmp_path, capsys):
    missing = tmp_path / "none"
    code, out, _ = call(capsys, "report", "--out", str(missing), "--layout", "papers", "--show", "published")
    assert code == 0 and out.count("\n# ") == 23 and not missing.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layout", "gsearch-tabel1"], "unknown layout 'gsearch-tabel1'; did you mean 'gsearch-table1'?"),
        (["--show", "both"], "--show both needs a paper's table: add --layout"),
        (["--out", "/no/such/folder"], "no records in /no/such/folder"),
        (["--out", "/no/such/folder", "--format", "html"], "--out /no/such/folder is not a folder"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    code, _, err = call(capsys, "report", *arguments)
    assert code == 2 and err.startswith("pruneval: error: ") and message in err and err.count("\n") == 1
