"""Latency that can be compared: contestants take turns in one process, round by round (A B C A B C ...).

A drift of the machine then hits all of them alike, and a ratio is taken of what ran side by side. What is printed is a
median with its quartiles, and a ratio with a bootstrap interval over rounds; an interval that holds 1 shows nothing.
Where the time goes (vision, selection, the rest) is measured in rounds of its own, because its hooks cost time too.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from pruneval.harness.adapters import Adapter
from pruneval.harness.backend import Runner
from pruneval.harness.override import override

RESAMPLES = 2000
LEVEL = 95  # per cent
Values = dict[str, list[float]]
"""Seconds by phase, one per round."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values), [25, 50, 75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def speedup(baseline: Sequence[float], values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """How many times faster than the baseline: ratio of medians, with an interval from resampled rounds.

    Args:
        baseline: seconds of the baseline, one per round.
        values: seconds of the contestant in the same rounds.
        seed: of the resampling.

    Returns:
        `ratio`, `low`, `high` and `verdict`: faster, slower (below 1 with the whole interval) or no difference shown.
    """
    base, mine = np.asarray(baseline), np.asarray(values)
    if base.shape != mine.shape:
        raise ValueError(f"rounds must be paired, not {len(base)} against {len(mine)}")
    drawn = np.random.default_rng(seed).integers(len(base), size=(RESAMPLES, len(base)))
    ratios = np.median(base[drawn], axis=1) / np.median(mine[drawn], axis=1)
    low, high = np.percentile(ratios, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
    return {
        "ratio": float(np.median(base) / np.median(mine)), "low": float(low), "high": float(high), "verdict": verdict,
    }  # fmt: skip


def contest(runners: Sequence[Runner], rounds: int, tell: Callable[[], None] = lambda: None) -> list[Values]:
    """Times all runners, interleaved; every other round goes backwards, so that nobody always runs after the same one.

    Args:
        runners: who takes part, warmed up, the baseline among them.
        rounds: generations of each.
        tell: called after each generation.

    Returns:
        Seconds of `prefill`, `decode` (per token) and `generate` of each runner, one per round.
    """
    found: list[Values] = [{"prefill": [], "decode": [], "generate": []} for _ in runners]
    for number in range(rounds):
        order = range(len(runners)) if number % 2 == 0 else reversed(range(len(runners)))
        for index in order:
            for phase, seconds in runners[index].measure().items():
                found[index][phase].append(seconds)
            tell()
    return found


# Where the time goes


class Clock:
    """Pairs of moments, on the device's own time line."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pairs: dict[str, list[tuple[Any, Any]]] = {}
        self.started: Any = None
        self.encoding = False

    def now(self) -> Any:
        """This moment: seconds, or an event in the GPU's stream."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any) -> None:
        """Notes that `name` lasted from `start` until now."""
        self.pairs.setdefault(name, []).append((start, self.now()))

    def total(self, name: str) -> float:
        """Seconds of all that was noted under the name."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self.pairs.get(name, [])) / 1000
        return sum(end - start for start, end in self.pairs.get(name, []))


@contextmanager
def split(adapter: Adapter) -> Iterator[Clock]:
    """Times, in the next generation, `vision` (tower and projector), `selection` (all that the engine and the method do
    before decoder layers of the prefill: rows, ranking, gathering, masks) and `upkeep` (the same at decode steps).

    Enter it inside `pruned`, whose hooks then run between its own.
    """
    clock, pre = Clock(adapter.model.device), functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
    with ExitStack() as stack:
        for name in ("get_image_features", "get_video_features"):
            _time_encoder(adapter.model.model, name, clock, stack)
        for layer in adapter.decoder_layers:
            stack.callback(pre(layer, functools.partial(_start, clock), prepend=True).remove)
            stack.callback(pre(layer, functools.partial(_stop, clock)).remove)
        yield clock


def _time_encoder(inner: nn.Module, name: str, clock: Clock, stack: ExitStack) -> None:
    original = getattr(inner, name, None)
    if original is None:
        return

    @functools.wraps(original)  # generate reads the signature to know what to pass
    def encode(*args: Any, **kwargs: Any) -> Any:
        if clock.encoding:  # a family may encode videos by its function for images
            return original(*args, **kwargs)
        clock.encoding, start = True, clock.now()
        try:
            return original(*args, **kwargs)
        finally:
            clock.encoding = False
            clock.add("vision", start)

    override(inner, name, encode, stack)


def _start(clock: Clock, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    clock.started = clock.now()


def _stop(clock: Clock, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    clock.add("selection" if hidden.shape[1] > 1 else "upkeep", clock.started)


def parts(
    runners: Sequence[Runner], adapter: Adapter, rounds: int, tell: Callable[[], None]
) -> list[Mapping[str, Any]]:
    """Median seconds of `vision`, `selection`, `decoder` (the rest of the prefill), `upkeep` (of all decode steps) and
    `prefill`, for each runner, measured in interleaved rounds of their own.
    """
    found: list[Values] = [{} for _ in runners]
    for _ in range(rounds):
        for runner, mine in zip(runners, found, strict=True):
            backend = runner.backend
            with backend.ready(), split(adapter) as clock:
                runner.scenario.run_per_token_text_generation_latency_tracking()
            prefill = runner.scenario.report.prefill.latency.values[0]
            seconds = {name: clock.total(name) for name in ("vision", "selection", "upkeep")} | {"prefill": prefill}
            seconds["decoder"] = prefill - seconds["vision"] - seconds["selection"]
            for name, value in seconds.items():
                mine.setdefault(name, []).append(value)
            tell()
    return [{name: statistics.median(values) for name, values in mine.items()} for mine in found]
