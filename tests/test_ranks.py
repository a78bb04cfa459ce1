"""Several processes that share a cell: the same records as one alone, errors and deaths of one known to all."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pruneval.harness import cli, ranks
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.ranks import Ranks
from pruneval.harness.records import Journal, read_record, read_records

EVAL = [
    "eval",
    "--method",
    "fastv",
    "--benchmark",
    "pocket-mme",
    "--limit",
    "14",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]


def test_alone_nothing_is_exchanged():
    alone = Ranks()
    assert alone.first and alone.all(3, "a") == [3] and alone.share("abc") == ["a", "b", "c"]
    assert alone.agree(lambda: 4, "b") == alone.once(lambda: 4, "c") == alone.in_turn(lambda: 4, "d") == 4
    with pytest.raises(UserError, match=r"^no$"):
        alone.agree(_refuse, "e")


def test_shares_are_even_and_leave_nothing_out():
    parts = [Ranks(number, 3).share(range(10)) for number in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def _refuse() -> None:
    raise UserError("no")


class _Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def _exchange(number: int, arguments: list[str], count: int, port: int) -> None:
    """What two processes find out about each other, as a file each."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    me, found = ranks.here(), {}

    def raised(work: Any) -> str:
        try:
            work()
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def fail(error: BaseException, where: int) -> Any:
        def work() -> int:
            if me.number == where:
                raise error
            return 1

        return lambda: me.agree(work, "fail")

    found["who"] = [me.number, me.count, me.local, me.first]
    found["hidden"] = not any(name in os.environ for name in ranks.VARIABLES)
    found["all"] = me.all(me.number, "all")
    found["agree"] = me.agree(lambda: me.number + 10, "agree")
    found["sample"] = raised(fail(SampleFailure("task/3", "broken"), 1))
    found["unpicklable"] = raised(fail(_Unpicklable("a", "b"), 1))
    found["stopped"] = raised(lambda: me.agree(_refuse if me.first else functools.partial(_stop), "stop"))
    found["once"] = me.once(lambda: f"made by {me.number}", "once")
    found["once failed"] = raised(lambda: me.once(_refuse, "once failed"))
    path = Path(arguments[0]) / "made"
    found["in turn"] = me.in_turn(lambda: (path.exists(), path.touch())[0], "turn")
    found["step"] = raised(lambda: me.all(0, f"step of {me.number}"))
    (Path(arguments[0]) / str(number)).write_text(json.dumps(found))
    ranks.leave(me, 0)


def _stop() -> None:
    raise KeyboardInterrupt


def test_two_processes_agree(tmp_path):
    assert ranks.launch([str(tmp_path)], 2, _exchange) == 0
    one, other = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert one.pop("who") == [0, 2, 0, True] and other.pop("who") == [1, 2, 1, False]
    assert (one.pop("agree"), other.pop("agree")) == (10, 11)
    assert (one.pop("in turn"), other.pop("in turn")) == (False, True)
    for step, found in ((one.pop("step"), 0), (other.pop("step"), 1)):
        assert step == f"OutOfStep: process {found} is at 'step of {found}', others at ['step of 0', 'step of 1']"
    assert one == other == {
        "hidden": True,
        "all": [0, 1],
        "sample": "SampleFailure: sample task/3: broken",
        "unpicklable": "RuntimeError: _Unpicklable: a",
        "stopped": "KeyboardInterrupt: ",
        "once": "made by 0",
        "once failed": "UserError: no",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert cli.main([*EVAL, "--out", str(out)]) == 0
    return out


def same(out: Path, alone: Path) -> list[Any]:
    """Compares records and answers; gives the records."""
    made, expected = read_records(out), read_records(alone)
    assert [record.spec for record in made] == [record.spec for record in expected]
    for one, other in zip(made, expected, strict=True):
        assert one.done and one.scores == other.scores and one.budget == pytest.approx(other.budget)
        assert one.implied == other.implied
        left, right = (pd.read_parquet(root / one.spec.hash / "samples.parquet") for root in (out, alone))
        pd.testing.assert_frame_equal(left, right)
    return made


def test_records_are_those_of_one_process(alone, tmp_path, capfd):
    assert cli.main([*EVAL, "--processes", "2", "--out", str(tmp_path)]) == 0
    records = same(tmp_path, alone)
    assert [record.environment["processes"] for record in records] == [2, 2]
    assert not list(tmp_path.glob("*/journal*"))
    printed, said = capfd.readouterr()
    assert printed.count("# pocket-llava: pocket scores") == 1 and said.count("loading pocket-llava") == 1
    assert said.count("14 of 14 answers") == 2


def _dies(number: int, arguments: list[str], count: int, port: int) -> None:
    """The second process is killed with its second batch."""
    if number == 1:
        from pruneval.harness.records import Journal

        append, calls = Journal.append, []

        def once(self: Journal, rows: Any) -> None:
            if calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(append(self, rows))

        Journal.append = once  # type: ignore[method-assign]
    ranks.join(number, arguments, count, port)


def test_a_process_that_dies_ends_all_and_answers_are_kept(alone, tmp_path):
    arguments = [*EVAL, "--processes", "2", "--out", str(tmp_path)]
    with pytest.raises(UserError, match=r"^process 1 died \(signal 9\); answers are kept"):
        ranks.launch(arguments, 2, _dies)
    folder = next(path for path in tmp_path.iterdir() if list(path.glob("journal*")))
    kept = Journal(folder).answers()
    assert 2 <= len(kept) < 14 and folder.joinpath("journal.1.jsonl").exists()
    assert cli.main([*EVAL, "--out", str(tmp_path)]) == 0  # one process goes on with what two have left
    same(tmp_path, alone)
    assert read_record(folder).timing["resumed"] == len(kept)


def _fails(number: int, arguments: list[str], count: int, port: int) -> None:
    """The second process can't answer one of its questions."""
    if number == 1:
        from pruneval.harness.lmms_model import PrunevalModel

        def fail(self: PrunevalModel, batch: list[Any], session: Any) -> None:
            raise RuntimeError("no such luck")

        PrunevalModel._generate = fail  # type: ignore[assignment,method-assign]
    ranks.join(number, arguments, count, port)


def test_a_sample_that_fails_in_one_process_fails_the_cell(tmp_path):
    assert ranks.launch([*EVAL, "--out", str(tmp_path)], 2, _fails) == 1
    records = read_records(tmp_path)
    assert len(records) == 2 and not any(record.done or record.scores for record in records)
    assert all("no such luck" in record.error["message"] for record in records)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["eval", "--method", "fastv", "--processes", "0"], "--processes must be a whole number of at least 1"),
        (["eval", "--method", "fastw", "--processes", "2"], "unknown method 'fastw'; did you mean 'fastv'?"),
        (["eval", "--method", "fastv", "--processes", "2", "--device", "cuda:1"], "several processes take a GPU each"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(given, message, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("processes were started"))
    assert cli.main(given) == 2
    assert capsys.readouterr().err.startswith(f"pruneval: error: {message}")


@pytest.mark.parametrize(("gpus", "count", "found"), [(0, 2, None), (2, 2, "cuda:0"), (1, 2, UserError)])
def test_every_process_has_a_gpu(gpus, count, found, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert ranks.device("cpu", count) == "cpu"
    if found is UserError:
        with pytest.raises(UserError, match="2 processes take a GPU each, and torch sees 1"):
            ranks.device(None, count)
        return
    assert ranks.device(None, count) == found
    monkeypatch.setattr(ranks, "here", lambda: Ranks(1, 2, 1))
    assert ranks.device(None, count) == (found and "cuda:1")


def test_ray_and_processes_exclude_each_other(tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text("models: [pocket-llava]\nmethods: [random]\nbudgets: [{keep: 0.5}]\nsuites: [smoke]\n")
    assert cli.main(["sweep", str(study), "--engine", "ray", "--processes", "2"]) == 2
    assert "--processes is for the serial engine; ray has --workers" in capsys.readouterr().err
