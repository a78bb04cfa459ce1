"""Sweeps on Ray: the same records as without, workers that die, and what is said when Ray is not to be had."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
import stress_kills
import yaml

from pruneval.harness import cli, cluster, interrupt, records, run, runner
from pruneval.harness.errors import UserError
from pruneval.harness.ray_engine import Engine
from pruneval.harness.waiting import Task, Waiting
from pruneval.harness.worker import CellWorker, Setup

exceptions = pytest.importorskip("ray.exceptions")


# Without Ray: who gets which cell, and what a worker asks for


def task(model: int, benchmark: str, name: str = "") -> Task:
    return Task(model, SimpleNamespace(benchmark=SimpleNamespace(name=benchmark)), name)


def test_a_worker_stays_with_its_model_and_its_benchmark():
    waiting = Waiting([task(0, "gqa", "a"), task(0, "gqa", "b"), task(0, "pope", "c"), task(1, "gqa", "d")])
    assert waiting.model([]) == 0
    first = waiting.take(0, "", ())
    assert first.title == "a"
    assert waiting.take(0, "", {"gqa"}).title == "c"  # not where the other worker's features are
    assert waiting.take(0, "pope", {"gqa"}).title == "b"
    assert waiting.take(0, "gqa", ()) is None and len(waiting) == 1
    assert waiting.model([0, 0]) == 1
    waiting.put_back(first)
    assert waiting.take(0, "pope", ()).title == "a"


def test_the_model_with_the_most_cells_per_worker_is_loaded_next():
    waiting = Waiting([*(task(0, "gqa") for _ in range(4)), *(task(1, "gqa") for _ in range(3))])
    assert [waiting.model(taken) for taken in ([], [0], [0, 1], [0, 0, 1])] == [0, 1, 0, 1]
    assert Waiting([]).model([]) is None


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [([8], 2, 4), ([4, 4, 4], 2, 4), ([4, 4, 4], 4, 2), ([2], 2, 1), ([1], 2, 0.5), ([2], 3, 0.5), ([3, 1], 2, 1)],
)
def test_every_worker_gets_a_share_that_fits_somewhere(sizes, count, expected):
    assert cluster.share(sizes, count) == expected
    assert sum(int(size / expected) for size in sizes) >= count


def test_a_gpu_is_asked_for_where_one_is_used():
    def fake(**there: float) -> Any:
        return SimpleNamespace(
            cluster_resources=lambda: there, nodes=lambda: [{"Alive": True, "Resources": there}, {"Alive": False}]
        )

    assert cluster.device_of(fake(CPU=8, GPU=2), None) == "cuda" and cluster.device_of(fake(CPU=8), None) == "cpu"
    assert cluster.resources(fake(CPU=8, GPU=2), "cuda", None) == (2, {"num_gpus": 1, "num_cpus": 1})
    assert cluster.resources(fake(CPU=8, GPU=2), "cuda", 4) == (4, {"num_gpus": 0.5, "num_cpus": 1})
    assert cluster.resources(fake(CPU=8), "cpu", None) == (2, {"num_cpus": 4})
    with pytest.raises(UserError, match="Ray sees no GPU"):
        cluster.device_of(fake(CPU=8), "cuda")
    with pytest.raises(UserError, match="--device cuda, not cuda:1"):
        cluster.device_of(fake(CPU=8, GPU=2), "cuda:1")


def test_a_cell_given_up_is_recorded_and_tried_again(tmp_path):
    cell = fakes.cells("pocket-gqa")[0]
    record = runner.give_up(cell, tmp_path, "its worker died 2 times")
    assert record == records.read_record(tmp_path / cell.spec.hash) and not record.done
    found, _ = run.run_cells([cell], tmp_path, fakes.load, evaluate=fakes.Evaluation(), show=fakes.Silent())
    assert found[0].done
    with records.claim(tmp_path / cell.spec.hash):
        taken = runner.give_up(cell, tmp_path, "its worker died 2 times")
    assert "its worker died 2 times; another process is running the cell" in taken.reason
    assert records.read_record(tmp_path / cell.spec.hash).done


class FakeRay:
    """Ray in this process: an actor does what its script says, one entry for each cell it is given.

    Attributes:
        scripts: of the actors, in the order of their starts; "dies" as an entry is a worker that is killed.
        killed: how many actors were told to go.
    """

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.killed, self.stopped = list(scripts), 0, 0
        self.exceptions = exceptions

    def remote(self, cls: type) -> Any:
        return SimpleNamespace(options=lambda **asked: SimpleNamespace(remote=self._start))

    def _start(self, setup: Any) -> Any:
        script = self.scripts.pop(0)
        dead = script == ["dead"]

        def call(work: Any) -> Any:
            return SimpleNamespace(remote=lambda *args: lambda: work(*args))

        def end(cell: Any, title: str) -> Any:
            entry = script.pop(0)
            if entry == "dies":
                raise exceptions.ActorDiedError()
            if isinstance(entry, BaseException):
                raise exceptions.RayTaskError("run", "", entry)
            return entry(cell) if callable(entry) else entry

        def look() -> Any:
            if dead:
                raise exceptions.ActorDiedError()
            return ["a line"], (1, 2)

        def stop() -> None:
            self.stopped += 1

        return SimpleNamespace(run=call(end), look=call(look), stop=SimpleNamespace(remote=stop))

    def wait(self, references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, reference: Any, **options: Any) -> Any:
        return reference()

    def kill(self, actor: Any) -> None:
        self.killed += 1


def done(cell: Any) -> runner.NotRun:
    return runner.NotRun(cell.spec, "as told")


def engine(out: Path, *scripts: list[Any], workers: int = 1) -> tuple[Engine, list[Task], fakes.Silent]:
    show = fakes.Silent()
    made = Engine(FakeRay(*scripts), [SimpleNamespace(out=out)], workers, {"num_cpus": 1}, show)
    cells = fakes.cells("pocket-gqa")
    return made, [Task(0, cell, f"cell {place}") for place, cell in enumerate(cells)], show


def test_a_cell_whose_worker_dies_is_given_to_another_one(tmp_path):
    made, tasks, show = engine(tmp_path, ["dies"], [done, done])
    ended = made.run(tasks)
    assert {one.reason for one in ended.values()} == {"as told"} and len(ended) == 2
    assert any(line.startswith("cell 0: its worker died, tried once more") for line in show.lines)
    assert not list(tmp_path.glob("*/record.json")) and made.ray.killed == 2


def test_a_cell_whose_workers_die_twice_is_recorded_as_failed_and_the_others_go_on(tmp_path):
    made, tasks, _ = engine(tmp_path, ["dies"], ["dies"], [done])
    ended = made.run(tasks)
    failed = ended[tasks[0].cell.spec.hash]
    assert failed == records.read_record(tmp_path / failed.spec.hash)
    assert failed.status == "failed" and "its worker died 2 times" in failed.error["message"]
    assert ended[tasks[1].cell.spec.hash].reason == "as told"


def test_workers_that_do_not_start_end_the_sweep(tmp_path):
    made, tasks, _ = engine(tmp_path, ["dead"], ["dead"], ["dead"], ["dead"], [done])
    with pytest.raises(UserError, match="Ray's workers die while they start"):
        made.run(tasks)


def test_a_full_disk_on_a_worker_ends_the_sweep(tmp_path):
    made, tasks, _ = engine(tmp_path, [records.StorageError("no room")], [done], workers=2)
    with pytest.raises(records.StorageError, match="no room"):
        made.run(tasks)
    assert made.ray.killed == 2


def test_an_interrupt_lets_the_batches_in_flight_end(tmp_path):
    made, tasks, _ = engine(tmp_path, [lambda cell: interrupt.ask()], [done], workers=2)
    with pytest.raises(KeyboardInterrupt):
        made.run(tasks)
    assert made.ray.stopped == 1 and made.ray.killed == 2
    interrupt.ask()
    made, tasks, _ = engine(tmp_path, [done, done])
    with pytest.raises(KeyboardInterrupt):
        made.run(tasks)
    made.run(tasks)  # once is enough


def test_a_worker_takes_over_where_it_was_started_and_stops_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEVAL_SOMETHING", "here")
    located = fakes.LOCATED
    setup = Setup(located, "cpu", "float32", "sdpa", tmp_path, 8, True)
    monkeypatch.delenv("PRUNEVAL_SOMETHING")
    worker = CellWorker(setup)
    assert os.environ.pop("PRUNEVAL_SOMETHING") == "here" and "PATH" not in setup.environment
    ended = worker.run(fakes.cells("pocket-gqa")[0], "title")
    assert "is not a name of" in ended.reason or "unknown model" in ended.reason
    assert worker.look() == (["loading fake and lmms-eval"], (0, 0)) and worker.look() == ([], (0, 0))
    monkeypatch.setattr(worker._runner, "attempt", lambda cell, title: interrupt.obey())
    worker.stop()
    assert worker.run(None, "title") is None


# What is said


def test_of_rays_long_messages_the_reason_is_kept():
    text = """The actor died unexpectedly before finishing this task.
        class_name: CellWorker
    The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
    unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was"""
    expected = "Worker unexpectedly exits with a connection error code 2. End of file."
    assert cluster.one_line(RuntimeError(text)) == expected
    assert cluster.one_line(RuntimeError("something\nelse")) == "something else"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers and --address are for --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers must be at least 1"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--engine", "ray", "--address", "somewhere"], "--address must be host:port"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(small, capsys, options, message):
    assert cli.main(["sweep", str(small), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_ray_it_is_said_how_to_get_it(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["sweep", str(small), "--engine", "ray"]) == 2
    assert "pip install 'pruneval[ray]'" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**stress_kills.STUDY, "benchmarks": ["pocket-pope"], "limit": 4}))
    return path


# On Ray


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stress_kills.Stress]:
    """An undisturbed serial sweep, and a place for others."""
    folder = tmp_path_factory.mktemp("stress")
    with stress_kills.noting(folder), pytest.MonkeyPatch.context() as patch:
        # The sweeps are forks of this process, and a fork can't use locks of data that were opened here.
        patch.setenv("PRUNEVAL_DATA", str(folder / "data"))
        stress_kills.preload()
        one = stress_kills.Stress(folder, "serial", kills=3, limit=4)
        one.measure("serial")
        yield one


@pytest.fixture(scope="module")
def ray(stress: stress_kills.Stress) -> Iterator[Any]:
    """One Ray for all: it is slow to start. After the serial sweeps, which fork."""
    stress.run()
    with cluster.connected(None) as module:
        yield module


def test_a_sweep_that_is_killed_goes_on(stress):
    if not stress.made:
        stress.run()
    assert len(stress.made) == 3


def test_a_killed_worker_is_replaced_and_records_are_the_same(stress, ray):
    on_ray = stress_kills.Stress(stress.folder, "ray", 1, 4, expected=stress.expected)
    on_ray.loading, on_ray.batch = stress.loading, stress.batch
    said = on_ray.run()  # compares with the serial sweep
    assert len(on_ray.made) == 1 and "as undisturbed" in said
