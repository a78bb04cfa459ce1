"""The contests of `pruneval bench`: who runs against whom on which prompts, and what is written down about it."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from pruneval import methods
from pruneval.harness import bench, budgets, kv_cache, latency, models, unweighted
from pruneval.harness.adapters import Adapter, adapter_for
from pruneval.harness.backend import Contestant, Runner
from pruneval.harness.dimensions import Dimensions
from pruneval.harness.dimensions import load as facts
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.errors import UserError
from pruneval.harness.flops import lengths_of
from pruneval.harness.machine import machine
from pruneval.harness.measure import cost
from pruneval.harness.observed import observing
from pruneval.harness.session import pruned
from pruneval.harness.workload import Workload, workload
from pruneval.methods.base import Method, MethodError

PILOT = 3
"""Generations by which vanilla's best kernel is found."""
VANILLA = "vanilla"


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    label: str
    adapter: Adapter
    dimensions: Dimensions
    weights: str
    kernel: str
    dtype: str


@dataclass(frozen=True)
class Setting:
    """The prompts of one contest, and the methods' budget (None: their defaults)."""

    visual: int
    text: int
    batch: int
    new_tokens: int
    keep: float | None


def subject(args: argparse.Namespace) -> Subject:
    """The model the command line asks for. Raises: UserError."""
    if not args.no_weights:
        loaded = models.load(args.model, args.device, args.dtype, args.kernel)
        unweighted.endless(loaded.model)
        weights, dtype = f"revision {loaded.revision}", str(loaded.dtype).removeprefix("torch.")
        sizes = dimensions_of(loaded.model.config, loaded.entry.name)
        return Subject(loaded.entry.name, loaded.adapter, sizes, weights, loaded.kernel, dtype)
    sizes = unweighted.scaled(facts(args.model), args.width, args.depth)
    device, dtype, kernel = models.resolve(models.entry(args.model), args.device, args.dtype, args.kernel)
    try:
        model = unweighted.build(sizes, device, dtype, kernel)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{sizes.name} does not fit on {device}: {_short(error)}") from None
    except (ImportError, ValueError) as error:
        raise UserError(f"{args.model} cannot be built with {kernel}: {_short(error)}") from None
    return Subject(f"{args.model}-random", adapter_for(model), sizes, "random", kernel, dtype)


def head(one: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about a measurement that holds for all of its settings."""
    device = one.adapter.model.device
    return {
        "schema": 1,
        "model": one.dimensions.name,
        "weights": one.weights,
        "params_b": sum(one.dimensions.params.values()) / 1e9,
        "dtype": one.dtype,
        "device": str(device),
        "protocol": {
            "tool": f"optimum-benchmark {version('optimum-benchmark')}, inference scenario, one generation at a time",
            "order": "interleaved in one process, every other round backwards",
            "rounds": args.rounds,
            "warm_up": args.warm_up + 3,
            "spread": "median and quartiles; ratios of medians with a 95 % bootstrap interval over rounds",
        },
        "machine": machine(device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": [],
    }


def settings(one: Subject, args: argparse.Namespace) -> Iterator[Setting]:
    """Every combination the command line asks for."""
    usual = lengths_of(one.dimensions).given
    for visual, batch, new, keep in itertools.product(
        args.visual_tokens or [usual], args.batch, args.new_tokens, args.keep or [None]
    ):
        yield Setting(visual, args.text_tokens, batch, new, keep)


def run(one: Subject, names: Sequence[str], setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """One contest: vanilla on the same kernel, vanilla on its best kernel if that is another, and the methods."""
    built, left_out = bench.plan(names, budgets.parameters(args.set), setting.keep)
    document = {**asdict(setting), "kernel": one.kernel, "contestants": [], "left_out": left_out}
    _free()
    try:
        prompts = workload(one.adapter, setting.visual, setting.text, setting.batch)
    except torch.OutOfMemoryError as error:
        left_out.append({"method": "all", "reason": f"the prompts do not fit: {_short(error)}"})
        return document
    document["visual"] = prompts.visual
    line = [Contestant(VANILLA, None, one.kernel), *(Contestant(m.signature, m, one.kernel) for m in built)]
    title = f"{one.label}, {prompts.visual} visual tokens, batch {setting.batch}, keep {setting.keep or 'default'}"
    with _bar(title, len(line) * (1 + args.rounds + args.rounds // 2)) as tell:
        runners = _warmed(one, prompts, line, setting, args.warm_up, left_out, tell)
        best, tried = _best_kernel(one, prompts, runners, setting)
        document["kernels"] = tried
        if best is not None:
            runners.insert(1, best)
        try:
            found = latency.contest(runners, args.rounds, tell)
            shares = latency.parts(runners, one.adapter, max(1, args.rounds // 2), tell)
            sole = workload(one.adapter, prompts.visual, prompts.text)
            for runner, seconds, share in zip(runners, found, shares, strict=True):
                document["contestants"].append(_row(one, prompts, sole, runner, seconds, share, args.energy))
        except torch.OutOfMemoryError as error:
            left_out.append({"method": "all", "reason": f"memory ran out between rounds: {_short(error)}"})
    _compare(document)
    return document


def _warmed(
    one: Subject, prompts: Workload, line: Sequence[Contestant], setting: Setting, warm_up: int,
    left_out: list[dict[str, str]], tell: Callable[[], None],
) -> list[Runner]:  # fmt: skip
    """Those that run here; the others go to `left_out` with the reason."""
    runners = []
    for contestant in line:
        runner = Runner(one.adapter.model, prompts.inputs, contestant, setting.new_tokens)
        try:
            runner.warm_up(warm_up)
            runners.append(runner)
        except (UserError, MethodError) as error:
            left_out.append({"method": contestant.name, "reason": str(error)})
        except torch.OutOfMemoryError as error:
            left_out.append({"method": contestant.name, "reason": f"does not fit: {_short(error)}"})
            _free()
        except Exception as error:  # the others are measured all the same
            reason = f"failed with {type(error).__name__}: {_short(error)}"
            left_out.append({"method": contestant.name, "reason": reason})
        tell()
    return runners


def _best_kernel(
    one: Subject, prompts: Workload, runners: Sequence[Runner], setting: Setting
) -> tuple[Runner | None, dict[str, Any]]:
    """Vanilla on its fastest kernel, None if all run on that one; and what each kernel took or why it did not run."""
    tried: dict[str, Any] = {}
    fastest: tuple[float, Runner] | None = None
    vanilla = next((runner for runner in runners if runner.contestant.name == VANILLA), None)
    for kernel in models.KERNELS:
        if kernel == "flash_attention_2" and not is_flash_attn_2_available():
            tried[kernel] = "is not installed"
            continue
        runner = vanilla if kernel == one.kernel else None
        try:
            if runner is None:
                contestant = Contestant(f"{VANILLA} (its best kernel: {kernel})", None, kernel)
                runner = Runner(one.adapter.model, prompts.inputs, contestant, setting.new_tokens)
                runner.warm_up(0)
            seconds = statistics.median(runner.measure()["prefill"] for _ in range(PILOT))
        except torch.OutOfMemoryError as error:
            tried[kernel] = f"does not fit: {_short(error)}"
            _free()
            continue
        except (ImportError, ValueError, RuntimeError) as error:
            tried[kernel] = f"does not run here: {_short(error)}"
            continue
        tried[kernel] = seconds
        if fastest is None or seconds < fastest[0]:
            fastest = seconds, runner
    return (fastest[1] if fastest and fastest[1] not in runners else None), tried


def _row(
    one: Subject, prompts: Workload, sole: Workload, runner: Runner, seconds: latency.Values,
    share: Mapping[str, float], energy: bool,
) -> dict[str, Any]:  # fmt: skip
    contestant = runner.contestant
    row = {
        "name": contestant.name,
        "kernel": contestant.kernel,
        "seconds": seconds,
        **{phase: latency.spread(values) for phase, values in seconds.items()},
        "parts": dict(share),
        "memory": runner.peak(),
        "kv_cache": _cache(one, runner, prompts),
        "implied": _implied(one, sole, contestant.method, contestant.kernel),
    }
    return row | ({"energy": runner.energy()} if energy else {})


def _cache(one: Subject, runner: Runner, prompts: Workload) -> dict[str, Any]:
    """Bytes of the whole batch's cache per layer: read off the tensors, and by the formula from the trace's lengths."""
    decoder, found = one.dimensions.decoder, {}
    width, size = prompts.inputs["input_ids"].shape[1], one.adapter.model.dtype.itemsize
    for name, new in (("prefill", 1), ("end", runner.new_tokens)):
        with runner.backend.ready() as session, torch.inference_mode():
            cache = one.adapter.model.generate(
                **prompts.inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True
            ).past_key_values
            layers = range(decoder.layers)
            stored = [width if session is None else session.trace.stored(layer).width for layer in layers]
        tokens = [prompts.batch * (count + new - 1) for count in stored]
        found[name] = {
            "true": kv_cache.held(cache),
            "resident": sum(kv_cache.resident(cache)),
            "formula": [kv_cache.kv_bytes(decoder, [count], size) for count in tokens],
            "full_heads": kv_cache.kv_bytes_full_heads(decoder, tokens, size),
        }
        del cache
    return found


def _implied(one: Subject, sole: Workload, method: Method | None, kernel: str) -> dict[str, Any]:
    """What one prompt costs by the ledger, from the lengths that were observed on it."""
    model, convention = one.adapter.model, "true-eager" if kernel == "eager" else "true"
    model.set_attn_implementation(kernel)
    with torch.inference_mode(), pruned(model, method or methods.build(VANILLA)) as session:
        with observing(session.adapter, one.dimensions) as seen:
            model(**sole.inputs, logits_to_keep=1)
        lengths = seen.lengths(session.trace)
    found = cost(one.dimensions, lengths, convention)
    kept = ("convention", "tflops", "avg_in", "kept_after", "keep", "kv_ratio", "per_layer", "not_counted")
    return {name: found[name] for name in kept}


def _compare(document: dict[str, Any]) -> None:
    """Adds to every contestant how it stands against each vanilla."""
    bases = [row for row in document["contestants"] if row["name"].startswith(VANILLA)]
    for row in document["contestants"]:
        row["against"] = {
            base["name"]: {
                **{phase: latency.speedup(base["seconds"][phase], row["seconds"][phase]) for phase in row["seconds"]},
                "flops_ratio": base["implied"]["tflops"] / row["implied"]["tflops"],
                "kv_ratio": sum(row["kv_cache"]["prefill"]["true"]) / sum(base["kv_cache"]["prefill"]["true"]),
            }
            for base in bases
            if base is not row
        }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)
