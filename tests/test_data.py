"""A mirror folder of the hub's data sets: found, checked before a model is loaded, never served from a stale cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_llava
from fakes import Evaluation, Silent, cells

from pruneval import tasks
from pruneval.harness import cli, data, data_check, run
from pruneval.harness.errors import UserError
from pruneval.harness.evaluate import build_task, evaluate
from pruneval.harness.lmms_task import whole_groups
from pruneval.tasks.pocket import editions

CARD = """---
configs:
- config_name: {config}
  data_files:
  - split: {split}
    path: "{config}/{split}-*.parquet"
---
"""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lay out pocket rows as a published data set, in two shards; `n` of the row is theirs."""

    def lay(name: str, rows=None) -> Path:
        row, pocket = tasks.benchmark(name), tasks.benchmark(f"pocket-{name}")
        table = pq.read_table(editions.ensure(pocket.dataset) / f"{pocket.split}.parquet")
        table = table if rows is None else table.take(rows)
        folder = tmp_path / "root" / row.dataset
        config = row.config or "default"
        (folder / config).mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(CARD.format(config=config, split=row.split))
        half = table.num_rows // 2
        for shard, part in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(part, folder / config / f"{row.split}-{shard:05d}-of-00002.parquet")
        full = {**tasks.benchmarks(), name: _counted(row, table.num_rows)}
        monkeypatch.setattr(tasks, "_table", lambda: full)
        monkeypatch.setenv("PRUNEVAL_DATA", str(tmp_path / "root"))
        return folder

    return lay


def _counted(row, number: int):
    from dataclasses import replace

    return replace(row, n=number)


def test_a_full_edition_is_read_from_its_mirror(mirror):
    mirror("scienceqa")
    row = tasks.benchmark("scienceqa")
    assert list(data_check.problems(row)) == []
    task = build_task(row)
    assert len(task.eval_docs) == 240 and task.doc_to_visual(task.eval_docs[3])[0].size == (96, 96)
    assert data.revision(row) == "local"
    note = data.root() / row.dataset / ".cache" / "huggingface" / "download" / "x.parquet.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("0123456789abcdef0123456789abcdef01234567\netag\n1.0\n")
    assert data.revision(row) == "0123456789abcdef0123456789abcdef01234567"


def test_rows_made_anew_are_not_served_from_a_stale_cache(mirror):
    mirror("chartqa")
    before = build_task(tasks.benchmark("chartqa")).eval_docs["question"]
    mirror("chartqa", list(range(119, -1, -1)))
    after = build_task(tasks.benchmark("chartqa")).eval_docs["question"]
    assert list(after) == list(before)[::-1] != list(before)


def test_rotations_that_lie_apart_are_brought_together(mirror):
    table = pq.read_table(editions.ensure("mmbench_en") / "dev.parquet")
    bases = [value % 1_000_000 for value in table.column("index").to_pylist()]
    turns = [value // 1_000_000 for value in table.column("index").to_pylist()]
    mirror("mmbench_en", sorted(range(table.num_rows), key=lambda i: (turns[i], bases[i])))
    row = tasks.benchmark("mmbench_en")
    task = build_task(row)
    assert [value % 1_000_000 for value in task.eval_docs["index"]] == bases
    assert whole_groups(task, row, 9) in (7, 8)


def test_only_the_questions_that_count_are_asked(mirror, monkeypatch: pytest.MonkeyPatch):
    mirror("seedbench")
    full = {**tasks.benchmarks(), "seedbench_image": _counted(tasks.benchmark("seedbench_image"), 90)}
    monkeypatch.setattr(tasks, "_table", lambda: full)
    row = tasks.benchmark("seedbench_image")
    assert list(data_check.problems(row)) == []
    assert set(build_task(row).eval_docs["data_type"]) == {"image"} and len(build_task(row).eval_docs) == 90


def _cut(folder: Path) -> None:
    shard = next(folder.rglob("*-00001-of-00002.parquet"))
    shard.write_bytes(shard.read_bytes()[:2000])


def _unlink(folder: Path) -> None:
    next(folder.rglob("*-00001-of-00002.parquet")).unlink()


def _drop(folder: Path) -> None:
    for shard in folder.rglob("*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns(["type"]), shard)


def _shorten(folder: Path) -> None:
    shard = next(folder.rglob("*-00001-of-00002.parquet"))
    pq.write_table(pq.read_table(shard).slice(0, 10), shard)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "is not on this machine; run `pruneval data fetch chartqa`"),
        (_unlink, "lacks test-00001-of-00002"),
        (_cut, "is damaged"),
        (_drop, "has no column type"),
        (_shorten, "70 questions in .*, not 120"),
    ],
)
def test_missing_data_stop_the_run_before_the_model_is_loaded(harm, message: str, mirror, tmp_path):
    harm(mirror("chartqa"))

    def load():
        raise AssertionError("the model was loaded")

    with pytest.raises(UserError, match=message) as failure:
        run.run_cells(cells("pocket-gqa", "chartqa"), tmp_path / "out", load, evaluate=Evaluation(4), show=Silent())
    assert "\n" not in str(failure.value) and "'chartqa'" in str(failure.value)


def test_a_missing_video_stops_the_run_and_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    source = editions.ensure("video_qa")
    folder = tmp_path / "GPT_Zero_Shot_QA" / "TGIF_Zero_Shot_QA"
    (folder / "mp4").mkdir(parents=True)
    rows = pq.read_table(source / "test.parquet").to_pylist()[:6]
    (folder / "test_q.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "answer"} for row in rows]))
    # Answers in another order: they are paired by question_id.
    answers = [{"answer": row["answer"], "question_id": row["question_id"]} for row in rows[::-1]]
    (folder / "test_a.json").write_text(json.dumps(answers))
    for row in rows:
        shutil.copy(source / "videos" / f"{row['video_name']}.mp4", folder / "mp4")
    monkeypatch.setenv("PRUNEVAL_DATA", str(tmp_path))
    full = {**tasks.benchmarks(), "tgif_qa_exact": _counted(tasks.benchmark("tgif_qa_exact"), 6)}
    monkeypatch.setattr(tasks, "_table", lambda: full)
    row = tasks.benchmark("tgif_qa_exact")
    assert list(data_check.problems(row)) == []
    task = build_task(row)
    assert list(task.eval_docs["answer"]) == [one["answer"] for one in rows]
    lost = folder / "mp4" / f"{rows[4]['video_name']}.mp4"
    lost.unlink()
    with pytest.raises(UserError, match=f"1 of 6 videos are missing or empty, as .*{lost.stem}"):
        data_check.demand(row)
    data_check.demand(row, limit=4)
    (folder / "test_a.json").unlink()
    with pytest.raises(UserError, match=r"test_a.json cannot be read"):
        data_check.demand(row)


def test_a_row_of_a_mirror_is_scored_as_the_same_row_of_the_pocket_edition(mirror):
    mirror("ai2d")
    loaded = tiny_llava.loaded()
    ours = evaluate(loaded, None, tasks.benchmark("pocket-ai2d"), limit=6)
    theirs = evaluate(loaded, None, tasks.benchmark("ai2d"), limit=6)
    assert theirs.samples.equals(ours.samples) and theirs.scores == ours.scores


def test_the_command_lists_checks_and_says_what_to_do(mirror, capsys):
    folder = mirror("chartqa")
    assert cli.main(["data", "list", "--json"]) == 0
    states = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert states["chartqa"]["here"] and not states["mme"]["here"] and states["pocket-mme"]["here"]
    assert states["chartqa"]["folder"] == str(folder)
    assert cli.main(["data", "check", "chartqa"]) == 0
    assert capsys.readouterr().out == "chartqa: complete, 120 questions, revision local\n"
    _unlink(folder)
    assert cli.main(["data", "check", "chartqa", "mme"]) == 1
    first, second = capsys.readouterr().out.strip().split("\n")
    assert "lacks test-00001-of-00002" in first and "pruneval data fetch mme" in second
    assert cli.main(["data", "fetch", "mme"]) == 2
    assert "could not be fetched (HF_HUB_OFFLINE is set)" in capsys.readouterr().err
    assert cli.main(["data", "check", "mmee", "--data-root", str(folder / "README.md")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run_and_loads_nothing(mirror, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    mirror("chartqa")
    monkeypatch.delenv("PRUNEVAL_JUDGE_URL", raising=False)
    options = [f"--benchmark={name}" for name in ("chartqa", "mme", "pocket-mmvet", "pocket-videomme")]
    assert cli.main(["eval", "--method", "fastv", *options, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "chartqa: lmms-lab-encoder/ChartQA at local, complete"
    assert lines[1].startswith("  vanilla on pocket-llava: 120 questions, to run (")
    assert lines[3].startswith("mme: not runnable: benchmark 'mme': the data set")
    assert "not runnable: pocket-mmvet is scored by a language model" in lines[6]
    assert "frames linspace:8" in lines[9] and len(lines) == 12
    assert not (tmp_path / "out").exists()


def test_the_list_of_benchmarks_is_plain_data(capsys):
    assert cli.main(["list", "benchmarks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mme"]["keys"] == ["mme_perception_score,none", "mme_cognition_score,none"]
    assert rows["mmvet"]["judge"] and rows["textvqa_ocr"]["prompt"] == {"ocr": True}
