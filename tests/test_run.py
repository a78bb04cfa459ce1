"""The run loop: reuse, resume, kill, failure, damage. The evaluation is a stand-in."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fakes
import pytest

from pruneval.harness import models, records, run
from pruneval.harness.errors import UserError


def go(out: Path, evaluation, cells=None, load=fakes.load):
    show = fakes.Silent()
    found, missed = run.run_cells(cells or fakes.cells(), out, load, evaluate=evaluation, show=show)
    return found, missed, show


def comparable(out: Path) -> dict[str, dict]:
    """Every record without its timings (and the commit: somebody may be editing the checkout), and its samples."""
    found = {}
    for record in records.read_records(out):
        plain = record.to_dict()
        del plain["timing"], plain["environment"]["commit"]
        samples = records.read_samples(out / record.spec.hash, record)
        found[record.spec.hash] = (plain, samples.to_dict("list"))
    return found


def test_every_cell_gets_a_record(tmp_path):
    evaluation = fakes.Evaluation()
    found, missed, _ = go(tmp_path, evaluation)
    assert [(record.spec.benchmark, record.spec.method) for record in found] == [
        ("pocket-gqa", "vanilla"), ("pocket-gqa", "fastv"), ("pocket-pope", "vanilla"), ("pocket-pope", "fastv"),
    ]  # fmt: skip
    assert not missed and all(record.done for record in found)
    assert evaluation.answered == 80
    assert found[1].budget == {"visual_tokens": 144, "avg_in": 90}
    assert found[1].environment["batch_size"] == 8 and found[1].environment["packages"]["transformers"]
    assert not list(tmp_path.glob("*/journal.jsonl"))
    assert {record.spec.hash for record in records.read_records(tmp_path)} == {record.spec.hash for record in found}


def test_what_is_done_is_reused_without_loading(tmp_path):
    first, _, _ = go(tmp_path, fakes.Evaluation())

    def load():
        raise AssertionError("nothing is left to do")

    again = fakes.Evaluation()
    second, _, show = go(tmp_path, again, load=load)
    assert again.answered == 0 and second == first
    assert all(line.endswith("done before, reused") for line in show.lines)


def test_vanilla_is_shared_between_methods(tmp_path):
    go(tmp_path, fakes.Evaluation())
    evaluation = fakes.Evaluation()
    go(tmp_path, evaluation, fakes.cells(method="random"))
    assert evaluation.answered == 40
    go(tmp_path, evaluation, fakes.cells(limit=8))
    assert evaluation.answered == 120


def test_a_text_tower_counts_where_it_is_asked(tmp_path, monkeypatch):
    def specs(text_tower=""):
        entry = models.ModelEntry(name="fake", title="Fake", family="llava", text_tower=text_tower)
        built = [run.build_method(name) for name in ("vanilla", "trim")]
        return [cell.spec for cell in run.expand(models.Located(entry, tmp_path, "r"), built, ["pocket-gqa"])]

    monkeypatch.delenv("PRUNEVAL_MODELS", raising=False)
    vanilla, none = specs()
    assert vanilla.text_tower == none.text_tower == ""
    hub = specs("openai/clip-vit@0123456789abcdef")
    assert hub[0] == vanilla and hub[1].text_tower == "clip-vit@01234567"
    (tmp_path / "text_tower").mkdir()
    seen = {none.hash, hub[1].hash}
    for content in ("{}", '{"x": 1}'):
        (tmp_path / "text_tower" / "config.json").write_text(content)
        local = specs()
        assert local[0] == vanilla and local[1].text_tower.startswith("text_tower@")
        seen.add(local[1].hash)
    assert len(seen) == 4


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import fakes
from pruneval.harness import run
evaluation = fakes.Evaluation(pause=0.05, log=Path({log!r}))
run.run_cells(fakes.cells(), Path({out!r}), fakes.load, evaluate=evaluation, show=fakes.Silent())
"""


def test_a_killed_run_goes_on_and_ends_like_an_undisturbed_one(tmp_path):
    go(tmp_path / "undisturbed", fakes.Evaluation())
    out, log = tmp_path / "killed", tmp_path / "log"
    code = SCRIPT.format(tests=str(Path(__file__).parent), log=str(log), out=str(out))
    kills = 0
    for wanted in (8, 30, 60):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= wanted):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    evaluation = fakes.Evaluation(log=log)
    go(out, evaluation)
    answered = Counter(log.read_text().splitlines())
    # A kill may fall between the journal and this test's own log, never the other way round.
    assert set(answered.values()) == {1} and len(answered) >= 80 - 4 * kills
    assert comparable(out) == comparable(tmp_path / "undisturbed")


def test_a_failed_sample_fails_its_cell_and_is_tried_again(tmp_path):
    evaluation = fakes.Evaluation(fails=9)
    found, _, show = go(tmp_path, evaluation, fakes.cells("pocket-gqa"))
    assert [record.status for record in found] == ["failed", "failed"]
    assert found[0].error == {"sample": "gqa/9", "message": "RuntimeError: out of luck"}
    assert found[0].scores == {} and found[0].samples is None
    assert any("FAILED at sample gqa/9: RuntimeError: out of luck" in line for line in show.lines)
    again = fakes.Evaluation()
    found, _, _ = go(tmp_path, again, fakes.cells("pocket-gqa"))
    assert all(record.done for record in found)
    assert again.answered == 40 - evaluation.answered  # what was answered before the failure is kept
    assert go(tmp_path / "fresh", fakes.Evaluation(), fakes.cells("pocket-gqa"))
    assert comparable(tmp_path) == comparable(tmp_path / "fresh")


def test_a_damaged_record_is_said_and_run_again(tmp_path):
    found, _, _ = go(tmp_path, fakes.Evaluation(), fakes.cells("pocket-gqa"))
    samples = tmp_path / found[0].spec.hash / "samples.parquet"
    samples.write_bytes(b"something else")
    evaluation = fakes.Evaluation()
    again, _, show = go(tmp_path, evaluation, fakes.cells("pocket-gqa"))
    assert evaluation.answered == 20 and again[0].samples == found[0].samples
    assert any("running it again" in line for line in show.lines)


def test_an_interrupt_keeps_the_answers(tmp_path):
    def interrupted(*args, journal, **options):
        journal.append([{"key": f"gqa/{index}", "answer": f"vanilla gqa/{index}"} for index in range(4)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, interrupted)
    assert records.read_records(tmp_path) == []
    evaluation = fakes.Evaluation()
    found, _, show = go(tmp_path, evaluation)
    assert evaluation.answered == 76 and found[0].timing["resumed"] == 4
    assert any("goes on, 4 answers" in line for line in show.lines)


def test_a_cell_that_cannot_be_tried_does_not_stop_the_others(tmp_path):
    def picky(loaded, method, benchmark, **options):
        if benchmark.name == "pocket-gqa":
            raise UserError("use a larger limit")
        return fakes.Evaluation()(loaded, method, benchmark, **options)

    found, missed, _ = go(tmp_path, picky)
    assert [record.spec.benchmark for record in found] == ["pocket-pope"] * 2
    assert [(cell.spec.benchmark, cell.reason) for cell in missed] == [("pocket-gqa", "use a larger limit")] * 2


def test_a_pair_that_does_not_fit_says_why(tmp_path):
    def load():
        loaded = fakes.load()
        loaded.adapter.supports = lambda method: "it has too few layers" if method.card.name == "fastv" else None
        return loaded

    found, missed, _ = go(tmp_path, fakes.Evaluation(), fakes.cells("pocket-gqa"), load)
    assert len(found) == 1
    assert missed[0].reason == "fastv does not run on fake: it has too few layers"


def test_a_record_is_valid_json_with_every_part(tmp_path):
    found, _, _ = go(tmp_path, fakes.Evaluation(), fakes.cells("pocket-gqa"))
    data = json.loads((tmp_path / found[0].spec.hash / "record.json").read_text())
    assert set(data["timing"]) == {"started", "seconds", "resumed"}
    assert {"python", "packages", "commit", "platform", "gpu", "driver"} <= set(data["environment"])
    assert data["spec"]["data"]


def test_a_full_disk_stops_with_a_line_and_nothing_half_written(tmp_path, monkeypatch):
    from pruneval.harness import records

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = records.Journal(tmp_path / "cell")
    journal.append([{"key": "a"}])
    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(records.StorageError, match="No space left on device; what was finished is kept"):
        records.write_atomically(tmp_path / "record.json", b"{}")
    with pytest.raises(records.StorageError):
        journal.append([{"key": "b"}])
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


def default_sigint() -> None:
    """Python's own handler: a shell's background job begins with the signal ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_first_interrupt_waits_for_the_batch_and_the_second_does_not(capsys):
    from pruneval.harness import interrupt

    default_sigint()
    with interrupt.graceful():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.obey()
        interrupt.obey()  # once is enough
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.obey()
    assert "stopping behind this batch" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
