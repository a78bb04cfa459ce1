"""What cards say of methods in, behind or beside the vision tower, against the index of their specifications."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pruneval import methods
from pruneval.harness.cli import main
from pruneval.harness.records import RunRecord, RunSpec
from pruneval.reports import layout as layouts
from pruneval.reports.comparison import comparison
from pruneval.reports.filled import fill
from pruneval.reports.markdown import to_markdown

BASELINES = ("random", "uniform", "avgpool", "cls_topk", "resize")
INDEX = {  # where tokens go, then: m merges, o leaves the order, q reads the question, c calibrated or trained
    "random": ("embed", ""),
    "uniform": ("embed", ""),
    "avgpool": ("embed", "m"),
    "resize": ("pixels", ""),
    "cls_topk": ("embed", ""),
    "flowcut": ("vision layer", "q"),  # its second stage looks from the last token
    "vflowopt": ("embed layer", "m c"),
    "ifprune": ("embed layer", "q c"),
    "sgp": ("layer", "q"),
    "visionzip": ("embed", "m o"),  # contextual tokens come last
    "fastervlm": ("embed", ""),
    "prumerge": ("embed", "m o"),
    "prumerge_plus": ("embed", "m o"),
    "hiprune": ("embed", ""),
    "tome": ("vision", "m o"),
    "divprune": ("embed", ""),
    "vispruner": ("embed", ""),
    "cdpruner": ("embed", "q"),
    "holov": ("embed", "o"),  # inside crops
    "trim": ("embed", "m q"),
    "gprune": ("embed", ""),
}
PROVISIONAL = {  # no published configuration; code not read; weights not there or not compared
    "tome": "no configuration for language models is published",
    "ifprune": "the code was not available",
    "deco": "released no weights",
    "tokenpacker": "not been compared with a released checkpoint",
}


@pytest.mark.parametrize("name", INDEX)
def test_cards_say_what_the_specification_says(name):
    card, (seam, flags) = methods.card(name), INDEX[name]
    assert card.seam == tuple(seam.split())
    found = {"m": card.merges, "o": card.reorders, "q": card.prompt_aware, "c": card.calibrated}
    assert {flag for flag, there in found.items() if there} == set(flags.split())
    assert bool(card.repository) == (name not in BASELINES)
    assert bool(card.commit) == (name not in (*BASELINES, "tome", "ifprune")), "read at a commit, where code was read"
    assert (name in PROVISIONAL) == bool(card.provisional)


def test_lists_mark_what_is_provisional(capsys):
    assert main(["list", "methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert main(["list", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for name in methods.names():
        reason = PROVISIONAL.get(name, methods.card(name).provisional)
        assert (" [provisional: " in lines[name]) == bool(reason) and reason in lines[name]
        assert reason in rows[name]["provisional"]


def test_the_readme_names_what_is_provisional():
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.replace("\n  ", " ").splitlines() if line.startswith("- Provisional"))
    titles = {methods.card(name).title for name in methods.names() if methods.card(name).provisional}
    assert set(line.partition(":")[2].rstrip(".").strip().split(", ")) == titles


SPEC = RunSpec(
    model="pocket-llava", revision="0123456789ab", method="vanilla", params={}, given={}, benchmark="pocket-mme",
    edition="pocket", data="d", limit=None, seed=0, dtype="float32", kernel="sdpa", positions="original",
    prompt_key="pruneval", version="0.1",
)  # fmt: skip
COST = {"helper_tflops": 14.5, "tflops_with_helpers": 95.92, "unpruned_tflops": 117.7, "helpers": {"helper reads": 1}}


def ran(name: str, **fields: Any) -> RunRecord:
    """A record of a method on one benchmark."""
    return RunRecord(
        spec=replace(SPEC, method=name, params={"keep": 0.25} if name != "vanilla" else {}),
        status="done",
        scores={"mme_total_score": {"value": 600.0, "n": 240, "stderr": 12.0}},
        budget={"avg_in": 36.0, "visual_tokens": 144.0},
        samples={"file": "samples.parquet", "rows": 240, "sha256": ""},
        **fields,
    )


def test_tables_say_what_is_provisional_and_what_another_model_costs():
    reason = methods.card("tome").provisional
    records = [ran("vanilla"), ran("tome", provisional=reason), ran("sgp", implied=COST), ran("uniform", implied={})]
    text = to_markdown(comparison(records))
    tome, sgp, uniform = (
        next(line for line in text.splitlines() if line.startswith(f"| {name}")) for name in ("tome", "sgp", "uniform")
    )
    notes = [line.strip().partition("] ") for line in text.splitlines() if line.startswith("[")]
    number = {note: f"{mark}]" for mark, _, note in notes}
    assert number[f"provisional: {reason}"] in tome
    assert number["besides the model (helper reads): 14.5 TFLOPs implied, 95.9 in all, 118 un-pruned"] in sgp
    assert "[1]" not in uniform and "[2]" not in uniform


def test_paper_tables_say_it_too():
    real = {"model": "llava-1.5-7b", "benchmark": "gqa", "edition": "full", "data": ""}
    notes = []
    for reason in ("", "because"):
        record = ran("flowcut", provisional=reason)
        record = replace(
            record,
            spec=replace(record.spec, **real, params={"keep": 1 / 18}),
            scores={"exact_match,none": {"value": 0.7, "n": 240, "stderr": 0.01}},
            budget={"avg_in": 32.0, "kept_after": 32.0, "keep": 1 / 18, "visual_tokens": 576.0},
        )
        (row,) = (row for row in fill(layouts.load("flowcut-table8"), [record]).rows if row.label == "FlowCut (Ours)")
        assert row.cells[0].text == "70.0"
        notes.append(row.cells[0].notes)
    assert notes == [(), ("provisional: because",)]
