"""Specs, records and journals: identity, whole files, damage that is noticed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pruneval.harness import records
from pruneval.harness.errors import UserError
from pruneval.harness.records import Journal, RecordError, RunRecord, claim, read_record, read_records, write_record
from pruneval.harness.spec import SOMETIMES, RunSpec, signature_of

SPEC = RunSpec(
    model="pocket-llava",
    revision="0123456789ab",
    method="fastv",
    params={"layer": 2, "keep": 0.5},
    given={"keep": 0.5},
    benchmark="pocket-gqa",
    edition="pocket",
    data="abc",
    limit=None,
    seed=0,
    dtype="float32",
    kernel="sdpa",
    positions="original",
    prompt_key="pruneval",
    version="0.1",
)
SAMPLES = pd.DataFrame({"doc_id": [0, 1], "answer": ["yes", "ja | \n"], "keep": [0.1 + 0.2, 1 / 3]})
SCORES = {"exact_match,none": {"value": 1 / 3, "n": 2, "stderr": None}}


def written(folder: Path, spec: RunSpec = SPEC) -> Path:
    record = RunRecord(spec=spec, status="done", scores=SCORES, budget={"avg_in": 306.25})
    write_record(folder / spec.hash, record, SAMPLES)
    return folder / spec.hash


def test_the_identity_is_what_decides_the_answers():
    assert dataclasses.replace(SPEC, given={}).hash == SPEC.hash
    others = {
        "model": "x", "revision": "x", "method": "x", "params": {"layer": 2, "keep": 0.25}, "benchmark": "x",
        "edition": "full", "data": "x", "limit": 3, "seed": 1, "dtype": "float16", "kernel": "eager",
        "num_beams": 3, "positions": "compact", "prompt_key": "x", "version": "0.2",
        "frames": "linspace:4", "judge": "x", "text_tower": "x",
    }  # fmt: skip
    assert set(others) | {"given"} == {item.name for item in dataclasses.fields(RunSpec)}
    hashes = {dataclasses.replace(SPEC, **{name: value}).hash for name, value in others.items()}
    assert len(hashes | {SPEC.hash}) == len(others) + 1
    assert dataclasses.replace(SPEC, params={"keep": 0.5, "layer": 2}).hash == SPEC.hash


def test_the_hash_is_the_same_in_every_process():
    code = f"from pruneval.harness.spec import RunSpec; print(RunSpec(**{SPEC.to_dict()!r}).hash)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == SPEC.hash


def test_a_number_carries_its_signature():
    assert SPEC.signature(306.0) == (
        "pruneval|fastv(layer=2,keep=0.5)|pocket-llava@01234567|pos:original|kernel:sdpa|budget:avg_in=306|v:0.1"
    )
    other = dataclasses.replace(SPEC, limit=8, seed=3, dtype="float16", method="vanilla", params={})
    assert other.signature() == (
        "pruneval|vanilla|pocket-llava@01234567|pos:original|kernel:sdpa|dtype:float16|limit:8|seed:3|v:0.1"
    )
    judged = dataclasses.replace(SPEC, frames="linspace:8", judge="gpt-4@api.example.org", text_tower="clip@01234567")
    assert judged.signature(306.0) == (
        "pruneval|fastv(layer=2,keep=0.5)|pocket-llava@01234567|pos:original|kernel:sdpa|frames:linspace:8"
        "|judge:gpt-4@api.example.org|text_tower:clip@01234567|budget:avg_in=306|v:0.1"
    )


def test_records_from_before_a_field_keep_their_identity():
    old = {key: value for key, value in SPEC.to_dict().items() if key not in SOMETIMES}
    assert RunSpec.from_dict(old) == SPEC and RunSpec.from_dict(old).hash == SPEC.hash == "5932b565667f932f"


def test_signatures_agree_with_the_methods():
    from pruneval import methods

    for name in methods.names():
        built = methods.build(name)
        assert signature_of(name, built.params) == built.signature


def test_a_record_comes_back_at_full_precision(tmp_path):
    folder = written(tmp_path)
    record = read_record(folder)
    assert record is not None and record.done
    assert record.spec == SPEC and record.scores == SCORES
    pd.testing.assert_frame_equal(records.read_samples(folder, record), SAMPLES)
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "samples.parquet"]
    assert [found.spec for found in read_records(tmp_path)] == [SPEC]


def test_reading_needs_no_torch(tmp_path):
    written(tmp_path)
    code = f"import sys; from pruneval.harness.records import read_records; read_records({str(tmp_path)!r})"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_an_unfinished_cell_has_no_record(tmp_path):
    assert read_record(tmp_path / "nothing") is None
    assert read_records(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("samples.parquet", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "not the ones"),
        ("samples.parquet", lambda path: path.unlink(), "cannot be read"),
        ("record.json", lambda path: path.write_text(path.read_text()[:100]), "cannot be read"),
        ("record.json", lambda path: path.write_text("[]"), "schema"),
        (
            "record.json",
            lambda path: path.write_text(path.read_text().replace('"schema": 1', '"schema": 9')),
            "schema 9",
        ),
        (
            "record.json",
            lambda path: path.write_text(path.read_text().replace('"layer": 2', '"layer": 3')),
            "was changed",
        ),
        (
            "record.json",
            lambda path: path.write_text(path.read_text().replace('"value": 0', '"value": 1')),
            "was changed",
        ),
        ("record.json", lambda path: path.write_text(path.read_text().replace('"dtype"', '"type"')), "was changed"),
        ("record.json", lambda path: path.parent.rename(path.parent.with_name("f" * 16)), "belongs"),
    ],
)
def test_damage_is_noticed(tmp_path, name, damage, words):
    folder = written(tmp_path)
    damage(folder / name)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(RecordError, match=words):
        read_record(folder)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    records.write_atomically(path, b"old")

    def fails(handle):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", fails)
    with pytest.raises(records.StorageError, match="disk full"):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_journal_keeps_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "cell")
    assert journal.answers() == {}
    journal.append([{"key": "a/0", "answer": "one\ntwo ✓"}, {"key": "a/1", "answer": ""}])
    journal.append([{"key": "a/0", "answer": "later"}])
    assert Journal(tmp_path / "cell").answers() == {
        "a/0": {"key": "a/0", "answer": "later"},
        "a/1": {"key": "a/1", "answer": ""},
    }
    journal.remove()
    journal.remove()
    assert journal.answers() == {}


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_line_costs_one_answer_and_no_other(tmp_path, cut):
    journal = Journal(tmp_path)
    journal.append([{"key": "a/0", "answer": "é"}])
    journal.append([{"key": "a/1", "answer": "yes no yes no yes no"}])
    journal.path.write_bytes(journal.path.read_bytes()[:-cut])
    assert set(journal.answers()) == {"a/0"}
    journal.append([{"key": "a/2", "answer": "x"}])
    assert set(journal.answers()) - {"a/1"} == {"a/0", "a/2"}
    assert all(row["key"] == key for key, row in journal.answers().items())


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(
        b'[1]\n{"answer": 1}\n\xff\xfe\n"key"\n' + json.dumps({"key": "k"}).encode() + b"\n"
    )
    assert Journal(tmp_path).answers() == {"k": {"key": "k"}}


def _hold(folder: str, ready, release) -> None:
    with claim(Path(folder)):
        ready.set()
        release.wait(20)


def test_two_processes_never_run_the_same_cell(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready, release))
    other.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match="another process"), claim(tmp_path):
        pass
    other.kill()
    other.join()
    with claim(tmp_path):
        pass


def test_a_results_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write results"), claim(tmp_path / "file" / "cell"):
        pass
