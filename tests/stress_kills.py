"""Kills sweeps, or the workers of sweeps on Ray, with SIGKILL at seeded random moments, and goes on each time.

    python tests/stress_kills.py --engine serial --kills 50
    python tests/stress_kills.py --engine ray --kills 50

At the end records and answers must be those of an undisturbed sweep, no answer may have been asked for twice once it
was kept, and nothing kept may be gone. When a sweep has ended before enough kills, another one starts in a new folder.

A serial sweep is started by forking a process that has imported the libraries and nothing else; the model and the data
are loaded anew every time. Workers of Ray start from nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from pruneval.harness import cli, records
from pruneval.harness.cluster import connected

STUDY = {
    "models": ["pocket-llava"],
    "methods": ["random", "fastv"],
    "budgets": [{"keep": 0.5}],
    "benchmarks": ["pocket-gqa", "pocket-pope"],
}
BATCH = 2
AUDIT = "STRESS_AUDIT"
"""The variable that names the file to which kept answers are noted."""
NOTES = """
import os, time
from pruneval.harness import records

keep = records.Journal.append

def append(self, rows):
    keep(self, rows)
    lines = "".join(f"{time.time()} {self.path.parent.name} {row['key']}\\n" for row in rows)
    with open(os.environ["STRESS_AUDIT"], "a") as file:
        file.write(lines)

if "STRESS_AUDIT" in os.environ:
    records.Journal.append = append
"""
"""Read by every Python at its start: notes an answer behind its way to the journal, never before."""


@dataclass
class Stress:
    """One engine under kills.

    Attributes:
        folder: where everything is written.
        kills: how many to make.
        limit: questions of each benchmark.
    """

    folder: Path
    engine: str
    kills: int
    limit: int
    seed: int = 0
    say: Callable[[str], None] = lambda text: None
    made: list[tuple[float, int]] = field(default_factory=list)
    """Of every kill: seconds since the start before it, and batches kept in between."""
    rounds: int = 0
    expected: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.study = self.folder / "study.yaml"
        self.study.write_text(yaml.safe_dump({**STUDY, "limit": self.limit}))
        self.audit = self.folder / "audit"

    def measure(self, engine: str) -> None:
        """An undisturbed sweep: what must come out, and how long it takes to begin and to answer a batch."""
        self._into(self.folder / f"undisturbed-{engine}")
        started = time.time()
        assert self._sweep(engine) == 0
        self.expected = self.expected or comparable(self.out)
        self._check()
        moments = [when for when, _, _ in self.notes()]
        self.loading, self.batch = moments[0] - started, (moments[-1] - moments[0]) / (len(moments) / BATCH)
        self.say(
            f"undisturbed, {engine}: {len(self.expected)} cells, {len(moments)} answers, the first after "
            f"{self.loading:.1f} s, then a batch of {BATCH} every {self.batch:.1f} s"
        )

    def run(self) -> str:
        """Kill until there are enough; returns a line of numbers. Raises: AssertionError."""
        while len(self.made) < self.kills:
            self.rounds += 1
            self._into(self.folder / f"killed-{self.engine}-{self.rounds}")
            self._round()
            self._check()
            self.say(f"sweep {self.rounds}: as undisturbed, after {len(self.made)} kills in all")
        loading = sum(batches == 0 for _, batches in self.made)
        return (
            f"{self.engine}: {len(self.made)} kills ({loading} before an answer was kept) in {self.rounds} sweeps of "
            f"{len(self.expected)} cells: records and answers as undisturbed, nothing kept was lost or asked for again"
        )

    def _into(self, out: Path) -> None:
        self.out, self.kept = out, set()
        self.audit.unlink(missing_ok=True)
        self.audit.touch()

    def _round(self) -> None:
        """Sweep, killed and started again, until every cell is done."""
        while True:
            over = threading.Event()
            killer = threading.Thread(target=self._kill_workers, args=(over,)) if self.engine == "ray" else None
            if killer is not None:
                killer.start()
            try:
                code = self._sweep(self.engine)
            finally:
                over.set()
                if killer is not None:
                    killer.join()
            if code == 0:
                return

    def _sweep(self, engine: str) -> int:
        """The exit code of a sweep, or minus the signal that killed it."""
        argv = ["sweep", str(self.study), "--out", str(self.out), "--batch-size", str(BATCH), "--device", "cpu"]
        if engine == "ray":
            return cli.main([*argv, "--engine", "ray", "--workers", "2"])
        child = os.fork()
        if not child:
            os._exit(cli.main(argv))
        if self.rounds and len(self.made) < self.kills:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            self._wait_and_kill(lambda: [child], lambda: os.waitid(os.P_PID, child, flags))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _kill_workers(self, over: threading.Event) -> None:
        while len(self.made) < self.kills and not over.is_set():
            if ray_workers():
                self._wait_and_kill(ray_workers, over.is_set)
            time.sleep(0.05)

    def _wait_and_kill(self, processes: Callable[[], list[int]], ended: Callable[[], Any]) -> None:
        """Kill one of the processes: a third of the times while it starts, else around a batch or an end of a cell."""
        started, before = time.time(), len(self.notes())
        early, wanted = self.chance.random() < 1 / 3, self.chance.randrange(1, 4)
        while not early and (len(self.notes()) - before) // BATCH < wanted:
            if ended():
                return
            time.sleep(0.005)
        due = time.time() + self.chance.uniform(0, self.loading if early else 2 * self.batch)
        while time.time() < due:
            if ended():
                return
            time.sleep(0.005)
        try:
            os.kill(self.chance.choice(processes()), signal.SIGKILL)
        except (ProcessLookupError, IndexError):
            return
        time.sleep(0.2)
        self.made.append((time.time() - started, (len(self.notes()) - before) // BATCH))
        kept = answers(self.out)
        assert self.kept <= kept, f"lost {self.kept - kept}"
        self.kept = kept
        self.say(f"kill {len(self.made)}: after {self.made[-1][0]:.1f} s, {len(kept)} answers kept")

    def _check(self) -> None:
        found = comparable(self.out)
        assert found.keys() == self.expected.keys()
        for key, (record, samples) in self.expected.items():
            assert found[key][0] == record, (found[key][0], record)
            assert found[key][1] == samples
        assert not list(self.out.glob("*/journal.jsonl"))
        noted = Counter((cell, key) for _, cell, key in self.notes())
        assert set(noted.values()) == {1}, "asked for twice: " + str([key for key in noted if noted[key] > 1])
        total = sum(len(samples["answer"]) for _, samples in found.values())
        # A kill may fall between the journal and the note, never the other way round.
        assert total - BATCH * len(self.made) <= len(noted) <= total

    def notes(self) -> list[tuple[float, str, str]]:
        """When which answer of which cell was kept."""
        lines = [line.split(" ", 2) for line in self.audit.read_text().split("\n")[:-1]]
        return [(float(when), cell, key) for when, cell, key in lines]


def comparable(out: Path) -> dict[str, tuple[dict[str, Any], dict[str, list[Any]]]]:
    """Every record without its timings (and the commit: somebody may be editing the checkout), and its samples."""
    found = {}
    for record in records.read_records(out):
        plain = record.to_dict()
        del plain["timing"], plain["environment"]["commit"]
        samples = records.read_samples(out / record.spec.hash, record)
        found[record.spec.hash] = (plain, {name: [str(one) for one in samples[name]] for name in samples})
    return found


def answers(out: Path) -> set[tuple[str, str]]:
    """Cells and document ids of all answers that are kept; journals first, as they turn into records."""
    journals = {path.parent for path in out.glob("*/.lock")}
    kept = {
        (folder.name, str(row["doc_id"])) for folder in journals for row in records.Journal(folder).answers().values()
    }
    for folder in journals:
        record = records.read_record(folder)
        if record is not None and record.samples is not None:
            kept |= {(folder.name, str(one)) for one in records.read_samples(folder, record)["doc_id"]}
    return kept


def ray_workers() -> list[int]:
    """The processes that hold a worker of ours, or are about to: descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "CellWorker" in " ".join(process.cmdline()[:1]):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def noting(folder: Path) -> Iterator[None]:
    """Let this process, and those started meanwhile, note what they keep."""
    (folder / "sitecustomize.py").write_text(NOTES)
    before, append = dict(os.environ), records.Journal.append
    os.environ[AUDIT] = str(folder / "audit")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    exec(NOTES, {})
    try:
        yield
    finally:
        records.Journal.append = append
        os.environ.clear()
        os.environ.update(before)


def main() -> int:
    """Run it; the last line says what was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", choices=("serial", "ray"), default="serial")
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--limit", type=int, default=8)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="pruneval-stress-") as name, noting(Path(name)):
        preload()
        stress = Stress(
            Path(name), args.engine, args.kills, args.limit, args.seed, lambda text: print(text, flush=True)
        )
        stress.measure("serial")
        if args.engine == "serial":
            print(stress.run())
            return 0
        with connected(None):
            stress.measure("ray")
            print(stress.run())
    return 0


def preload() -> None:
    """Import what every start would, and leave the process as it was."""
    import transformers.models.llava.modeling_llava  # noqa: F401

    from pruneval.harness.lmms_task import quiet

    with quiet():
        from pruneval.harness import lmms_model, models, study  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
