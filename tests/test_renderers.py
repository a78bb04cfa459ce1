"""LaTeX, HTML and CSV of one table with everything in it: ties, zeros, holes, marks, groups, odd signs."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser

import pytest
import tex

from pruneval.reports import delimited, html, latex
from pruneval.reports import layout as layouts
from pruneval.reports.filled import SHOW, fill
from pruneval.reports.markdown import to_markdown
from pruneval.reports.table import Cell, Column, Row, Table, ranked

COLUMNS = (Column("score", True, "A & B"), Column("time_s", False, "A & B"), Column("100 % of_#{x}"))
SIGNED = {"signatures": ("pruneval|a|m@1",), "runs": ("ab12",)}
ROWS = ranked(
    COLUMNS,
    [
        Row("vanilla", (Cell("99.0", 99.0), Cell("9.0", 9.0), Cell("-")), "", ranked=False),
        Row("a_1 <b>", (Cell("50.0", 50.04, 0.5, **SIGNED), Cell("0.0", 0.0), Cell("x|y")), "half ~50 %"),
        Row("b", (Cell("50.0", 49.96), Cell("1.0", 1.0, mark="°"), Cell("±1")), "half ~50 %"),
        Row("c", (Cell("failed", notes=("Boom_1 & more",)), Cell("2.0", 2.0), Cell("")), "half ~50 %"),
        Row("d", (Cell("10.0", 10.0), Cell("–", notes=("not run", "Boom_1 & more")), Cell("")), "half ~50 %"),
    ],
)
TABLE = Table("A title: 50 % & $x_1$", "method", COLUMNS, ROWS, ("Notes {end} here.",), pocket=True)

LATEX = r"""\begin{table}[htbp]
\centering
\caption{A title: 50 \% \& \$x\_1\$}
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
\begin{tabular}{lrrr}
\toprule
 & \multicolumn{2}{c}{A \& B} &  \\
\cmidrule(lr){2-3}
method & score & time\_s & 100 \% of\_\#\{x\} \\
\midrule
vanilla & 99.0 & 9.0 & - \\
\midrule
\multicolumn{4}{l}{\textit{half \textasciitilde{}50 \%}} \\
a\_1 \textless{}b\textgreater{} & \textbf{50.0} & \textbf{0.0} & x\textbar{}y \\
b & \textbf{50.0} & \underline{1.0}~$^\circ$ & $\pm$1 \\
c & failed\textsuperscript{1} & 2.0 &  \\
d & 10.0 & --\textsuperscript{2,1} &  \\
\bottomrule
\end{tabular}}
\begin{flushleft}\footnotesize
\textsuperscript{1} Boom\_1 \& more\par
\textsuperscript{2} not run\par
Notes \{end\} here.\par
\end{flushleft}
\end{table}
% pruneval|a|m@1
"""


def test_ranks_ties_zeros_and_directions():
    ranks = [[cell.rank for cell in row.cells] for row in ROWS]
    assert ranks == [["", "", ""], ["best", "best", ""], ["best", "second", ""], ["", "", ""], ["", "", ""]]


def test_nothing_is_best_among_equals_or_alone():
    columns = (Column("x", True),)
    for values in ([5.0], [5.0, 5.0], [5.0, 5.0, 5.0]):
        rows = ranked(columns, [Row(str(at), (Cell(f"{value:.1f}", value),)) for at, value in enumerate(values)])
        assert {row.cells[0].rank for row in rows} == {""}
    rows = ranked(columns, [Row(str(v), (Cell(f"{v:.1f}", v),)) for v in (3.0, 1.0, 1.0, 2.0)])
    assert [row.cells[0].rank for row in rows] == ["best", "", "", "second"]


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="1 cells for 3 columns"):
        Table("t", "m", COLUMNS, (Row("r", (Cell("1"),)),))


def test_latex_is_the_golden_text():
    assert latex.to_latex(TABLE) == LATEX


def test_latex_sets_wide_tables_closer_and_long_ones_on_several_pages():
    columns = tuple(Column(f"A benchmark's name {at} (pocket)", unit="%") for at in range(11))
    cells = (Cell("50.0 ±1.5", 50.0), *[Cell("1.0", 1.0)] * 10)
    rows = tuple(Row(f"m{at}(keep=0.5,x=1)", cells, f"budget {at // 20}") for at in range(60))
    text = latex.to_latex(Table("Many", "method", columns, rows, ("A note.",), pocket=True))
    assert re.findall(r"\\caption\{(.*?)\}", text) == ["Many (1 of 3)", "Many (2 of 3)", "Many (3 of 3)"]
    assert text.count("A note.") == 1 and text.count(r"\rotatebox{90}{A benchmark's name 3 (\%)}") == 3
    assert re.findall(r"^m(\d+) & 50.0 & ", text, re.MULTILINE) == [str(at) for at in range(60)]
    assert text.count(r"\tiny (keep=0.5,\allowbreak x=1)} & {\scriptsize $\pm$1.5} & ") == 60
    assert [text.count(f"budget {at}") for at in range(3)] == [1, 1, 1]


def test_markdown_has_every_part():
    text = to_markdown(TABLE)
    assert "| a_1 <b>        |     **50.0** |" in text and "x\\|y" in text
    assert "<u>1.0</u> °" in text and "– [2] [1]" in text and "\n[1] Boom_1 & more  \n[2] not run  \n" in text


@pytest.mark.parametrize("show", ["published", "both"])
def test_latex_of_every_layout_is_balanced(show):
    text = latex.document([fill(layouts.load(name), [], show) for name in layouts.names()])
    assert text.isascii()
    open_now: list[str] = []
    wide = 0
    for line in text.splitlines():
        code = re.split(r"(?<!\\)%", line)[0]
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", code):
            if kind == "begin":
                open_now.append(name)
            else:
                assert open_now.pop() == name
        if code.endswith(r"\\"):
            assert (
                len(re.findall(r"(?<!\\)&", code)) + sum(int(n) - 1 for n in re.findall(r"multicolumn\{(\d+)\}", code))
                == wide
            ), code
        if found := re.match(r"\\begin\{tabular\}\{(\w+)\}", code):
            wide = len(found[1]) - 1
    assert open_now == []
    bare = re.sub(r"\\[{}]", "", "".join(re.split(r"(?<!\\)%", line)[0] for line in text.splitlines()))
    assert bare.count("{") == bare.count("}")


@pytest.mark.skipif(tex.engine() is None, reason="no TeX engine is installed")
@pytest.mark.parametrize("show", SHOW)
def test_latex_of_every_layout_compiles(show, tmp_path):
    tables = [TABLE, *(fill(layouts.load(name), [], show) for name in layouts.names())]
    text = latex.document(tables)
    pages, log = tex.compiled(text, tmp_path)
    assert pages == text.count(r"\begin{table}") >= len(tables)
    assert not [line for line in log.splitlines() if "Missing character" in line or "too large" in line]


def test_csv_holds_every_cell_at_full_precision():
    lines = list(csv.DictReader(io.StringIO(delimited.to_csv([TABLE]))))
    assert len(lines) == 15
    first = lines[3]
    assert (first["row"], first["value"], first["stderr"], first["rank"]) == ("a_1 <b>", "50.04", "0.5", "best")
    assert (first["signatures"], first["runs"]) == ("pruneval|a|m@1", "ab12")
    assert lines[4]["value"] == "0.0" and lines[9]["value"] == "" and lines[9]["notes"] == "Boom_1 & more"


# HTML -----------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Cells with their attributes, and every tag that was opened and closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "td":
            self.cells.append(attributes)
        if tag in ("script", "link", "img") and ("src" in attributes or "href" in attributes):
            self.outside.append(tag)
        if tag not in ("meta", "wbr", "br", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_the_page_stands_alone_and_carries_what_is_behind_a_number():
    text = html.page("A <page>", [TABLE])
    page = Page(text)
    assert page.open == [] and page.outside == []
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    behind = next(cell for cell in page.cells if cell.get("data-value") == "50.04")
    assert behind["title"] == "50.04 ± 0.5\npruneval|a|m@1\nruns: ab12"
    assert any(cell.get("data-value") == "0.0" for cell in page.cells)
    assert "A &lt;page&gt;" in text and "a_1 &lt;b&gt;" in text
    assert '<span class="pocket">pocket</span>' in text
