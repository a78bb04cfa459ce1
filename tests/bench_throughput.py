"""Questions per second of this harness beside lmms-eval's own `llava_hf` wrapper, on the same requests, in turns.

    python tests/bench_throughput.py [--benchmark pocket-mme] [--limit 64] [--rounds 5] [--out FILE]

Both are asked through lmms-eval's contract, `generate_until`, with the same requests of a pocket benchmark; model and
data are loaded before the clock starts. Their wrapper is the chat form (`lmms_eval.models.chat.llava_hf`), whose
prompts are ours. It refuses any batch but 1 ("Do not support batch_size_per_gpu > 1 for now"), so ours at 8 stands
against theirs at 1: that is all it can do. Ours runs as in an evaluation of the bare model: what it keeps of questions
and images is thrown away before every round, so that nothing is known from the round before.

A round is theirs, ours at 1, ours at 8, and every other one backwards. Ratios are of medians, with a bootstrap
interval over rounds; process time (all threads) stands beside the wall clock, which other programs stretch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BATCHES = (1, 8)


def their_wrapper(folder: Path) -> Any:
    """lmms-eval's chat wrapper, in float32 on the CPU; the video reader it imports is not needed for images."""
    decord: Any = ModuleType("decord")
    decord.VideoReader = decord.cpu = None
    sys.modules.setdefault("decord", decord)
    from lmms_eval.models.chat.llava_hf import LlavaHf

    return LlavaHf(pretrained=str(folder), device="cpu", device_map="cpu", batch_size=1, dtype="float32")


def contestants(model: str, benchmark: str, limit: int) -> dict[str, Callable[[], list[str]]]:
    """Who answers the requests, by name, their wrapper first."""
    from pruneval import tasks
    from pruneval.harness import models, preparing
    from pruneval.harness.evaluate import instances_of
    from pruneval.harness.lmms_model import PrunevalModel

    loaded = models.load(model, device="cpu")
    known = PrunevalModel(loaded)
    requests = instances_of(tasks.benchmark(benchmark), limit, known)
    theirs = their_wrapper(loaded.folder)
    theirs.task_dict = known.task_dict

    def ask_theirs() -> list[str]:
        with contextlib.redirect_stderr(io.StringIO()):  # its bar
            return [answer.text for answer in theirs.generate_until(copy.deepcopy(requests))]  # it writes into requests

    def ask_ours(batch_size: int) -> list[str]:
        preparing.forget(loaded.processor)
        ours = PrunevalModel(loaded, batch_size=batch_size)
        ours.task_dict = known.task_dict
        return ours.generate_until(copy.deepcopy(requests))

    ours = {f"pruneval, batch {size}": lambda size=size: ask_ours(size) for size in BATCHES}
    return {"llava_hf (chat), batch 1": ask_theirs, **ours}


def clocked(work: Callable[[], list[str]]) -> tuple[float, float, list[str]]:
    """Seconds by the wall clock and of this process's own time, and the answers."""
    from pruneval.harness.lmms_task import quiet

    with quiet():
        wall, own = time.perf_counter(), time.process_time()
        answers = work()
        return time.perf_counter() - wall, time.process_time() - own, answers


def measure(model: str, benchmark: str, limit: int, rounds: int) -> dict[str, Any]:
    """Every time of every contestant, ratios to theirs, and whether the answers are the same."""
    from pruneval.harness.latency import speedup, spread
    from pruneval.harness.lmms_task import quiet

    with quiet():
        who = contestants(model, benchmark, limit)
    answers = {name: clocked(work)[2] for name, work in who.items()}  # the warm-up
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "process": []} for name in who}
    for number in range(rounds):
        for name in list(who) if number % 2 == 0 else reversed(list(who)):
            wall, own, _ = clocked(who[name])
            times[name]["wall"].append(wall)
            times[name]["process"].append(own)
    first, *others = who
    questions = len(answers[first])
    return {
        "model": model,
        "benchmark": benchmark,
        "questions": questions,
        "rounds": rounds,
        "seconds": times,
        "per_second": {name: questions / spread(found["wall"])["median"] for name, found in times.items()},
        "against": first,
        "ratios": {
            name: {clock: speedup(times[first][clock], times[name][clock]) for clock in ("wall", "process")}
            for name in others
        },
        "same_answers": {
            name: sum(a == b for a, b in zip(answers[name], answers[first], strict=True)) for name in others
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--benchmark", nargs="+", default=["pocket-mme", "pocket-gqa"])
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the numbers and the machine's description, as JSON")
    args = parser.parse_args()
    import torch

    from pruneval.harness.machine import load, machine
    from pruneval.harness.records import write_atomically

    document: dict[str, Any] = {"what": __doc__.split("\n")[0], "machine": machine(torch.device("cpu")), "runs": []}
    for benchmark in args.benchmark:
        run = measure(args.model, benchmark, args.limit, args.rounds)
        document["runs"].append(run)
        print(f"{run['model']}, {run['questions']} questions of {benchmark}, {run['rounds']} rounds")
        for name, rate in run["per_second"].items():
            print(f"  {name:26} {rate:7.2f} questions/s", end="")
            if name in run["ratios"]:
                wall, own = run["ratios"][name]["wall"], run["ratios"][name]["process"]
                print(
                    f"  {wall['ratio']:.2f} x ({wall['low']:.2f}-{wall['high']:.2f}), by process time "
                    f"{own['ratio']:.2f} x; same answers: {run['same_answers'][name]} of {run['questions']}",
                    end="",
                )
            print(flush=True)
    document["machine"]["load_after"] = load()
    if args.out:
        write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
