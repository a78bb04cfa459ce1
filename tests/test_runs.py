"""`pruneval runs`: cells as they are, differences between two, and what can go."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest

from pruneval.harness import cli, runs
from pruneval.harness.errors import UserError
from pruneval.harness.records import Journal, RunRecord, claim, write_record
from pruneval.harness.spec import RunSpec

SPEC = RunSpec.from_dict(
    {
        **{item.name: None for item in dataclasses.fields(RunSpec)},
        "model": "m",
        "revision": "r",
        "method": "fastv",
        "params": {"keep": 0.5},
        "given": {},
        "benchmark": "b",
        "edition": "pocket",
        "data": "d",
        "seed": 0,
        "dtype": "float32",
        "kernel": "sdpa",
        "positions": "original",
        "prompt_key": "pruneval",
        "version": "0.1",
    }
)


def cell(out, answers, **changes):
    spec = dataclasses.replace(SPEC, **changes)
    table = pd.DataFrame(
        {"doc_id": range(len(answers)), "prompt_hash": "h", "answer": answers, "target": ["yes"] * len(answers)}
    )
    record = RunRecord(spec=spec, status="done", scores={"acc": {"value": answers.count("yes"), "n": 3, "stderr": 0}})
    write_record(out / spec.hash, record, table)
    return spec.hash


@pytest.fixture
def out(tmp_path):
    one = cell(tmp_path, ["yes", "no", "yes"])
    other = cell(tmp_path, ["yes", "yes", "no"], params={"keep": 0.25})
    failed = dataclasses.replace(SPEC, seed=5)
    write_record(
        tmp_path / failed.hash, RunRecord(spec=failed, status="failed", error={"sample": "b/0", "message": "x"})
    )
    Journal(tmp_path / ("0" * 16)).append([{"key": "a"}])
    return tmp_path, one, other


def test_every_state_is_listed(out, capsys):
    folder, *_ = out
    assert cli.main(["runs", "list", "--out", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["state"] for row in rows) == ["done", "done", "failed", "unfinished"]
    assert {row["score"] for row in rows} == {"acc 2", ""}
    assert cli.main(["runs", "list", "--out", str(folder)]) == 0
    assert "4 cells" in capsys.readouterr().out


def test_differences_are_in_spec_and_answers(out, capsys):
    folder, one, other = out
    assert cli.main(["runs", "diff", one, other, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "params: {'keep': 0.5} | {'keep': 0.25}" in said and "2 of 3 common questions" in said
    assert "1: 'no' | 'yes'  (yes)" in said
    assert cli.main(["runs", "diff", one, one, "--out", str(folder)]) == 0
    assert capsys.readouterr().out == "0 of 3 common questions are answered differently\n"


def test_what_is_not_done_can_go_unless_it_runs(out, capsys):
    folder, one, other = out
    argv = ["runs", "gc", "--out", str(folder)]
    assert cli.main([*argv, "--dry-run"]) == 0 and len(list(folder.iterdir())) == 4
    with claim(folder / ("0" * 16)):
        assert cli.main(argv) == 0
    assert "kept 0000000000000000: it is running" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {one, other, "0" * 16}


def test_names_may_be_cut_short_but_not_too_short(out, capsys):
    folder, one, _ = out
    assert runs.find(folder, one[:8]).name == one
    with pytest.raises(UserError, match="4 cells in"):
        runs.find(folder, "")
    assert cli.main(["runs", "show", "zz", "--out", str(folder)]) == 2
    assert cli.main(["runs", "list", "--out", str(folder / "nowhere")]) == 2
    assert cli.main(["runs", "diff", one, "--out", str(folder)]) == 2
    assert "takes 2 cells, not 1" in capsys.readouterr().err
