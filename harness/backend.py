"""optimum-benchmark's scenario with our models in it.

Its inference scenario keeps the time: warm-up, one generation at a time, the first token (prefill) apart from the
others (decode). The backend gives it a model that is loaded already, prompts of our own (its generator knows no
multimodal chat model), and a method to run them with. Hooks go in before a measurement and come out after it.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.methods.base import Method

RAPL = "/sys/class/powercap"


@dataclass(frozen=True)
class Contestant:
    """One way to run the model: a method (None: the stock model, without hooks) on an attention kernel."""

    name: str
    method: Method | None
    kernel: str


def optimum() -> SimpleNamespace:
    """What is used of optimum-benchmark. Raises: UserError when it is not installed."""
    import transformers.modeling_utils
    import transformers.processing_utils  # noqa: F401  puts another `transformers` in its place, once

    # 0.6.0 imports a name from transformers, for a type alias only, that transformers 5 no longer has.
    library: Any = sys.modules["transformers"]
    missing = "SpecialTokensMixin"
    lent = not hasattr(library, missing)
    if lent:
        setattr(library, missing, library.PreTrainedTokenizerBase)
    try:
        from optimum_benchmark import import_utils
        from optimum_benchmark.scenarios.inference.config import InferenceConfig
        from optimum_benchmark.scenarios.inference.scenario import InferenceScenario
        from optimum_benchmark.trackers.energy import EnergyTracker
        from optimum_benchmark.trackers.memory import MemoryTracker
    except ImportError as error:
        raise UserError(f"optimum-benchmark is needed (pip install 'pruneval[bench]'): {error}") from None
    finally:
        if lent:
            delattr(library, missing)
    for name in ("inference", "latency", "memory", "energy", "generators"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return SimpleNamespace(
        Scenario=InferenceScenario, Config=InferenceConfig, Memory=MemoryTracker, Energy=EnergyTracker,
        codecarbon=import_utils.is_codecarbon_available(),
    )  # fmt: skip


class Backend:
    """What the scenario calls a backend: a loaded model on one device, run by one contestant."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], contestant: Contestant) -> None:
        self.model, self.inputs, self.contestant = model, dict(inputs), contestant
        device = model.device.type
        self.config = SimpleNamespace(
            name="pytorch", device=device, device_ids=str(model.device.index or 0) if device == "cuda" else None,
            task="text-generation", model_type=None,
        )  # fmt: skip
        self.model_shapes = {"sequence_length": 1, "vocab_size": 2}  # its own inputs are replaced
        self.session: Any = None

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The model as the contestant wants it; yields the session, or None for the stock model."""
        self.model.set_attn_implementation(self.contestant.kernel)
        method = self.contestant.method
        with nullcontext() if method is None else pruned(self.model, method) as session:
            yield session

    def load(self) -> None:
        """Nothing: the model is shared by all contestants."""

    def prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Our prompts instead of the scenario's."""
        return self.inputs

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
        """One generation."""
        return self.model.generate(**inputs, **kwargs)

    prefill = generate


class Runner:
    """One contestant in the scenario: warmed up once, then measured one generation at a time."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], contestant: Contestant, new_tokens: int) -> None:
        self.backend, self.contestant = Backend(model, inputs, contestant), contestant
        self.tools, self.new_tokens = optimum(), new_tokens
        self.scenario: Any = None

    def warm_up(self, runs: int) -> None:
        """Runs the whole scenario once: two generations, `runs` short ones, and one that is timed and thrown away."""
        tokens = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        batch = len(self.backend.inputs["input_ids"])
        config = self.tools.Config(
            iterations=1, duration=0, warmup_runs=runs, input_shapes={"batch_size": batch}, generate_kwargs=tokens
        )
        self.scenario = self.tools.Scenario(config)
        with self.backend.ready():
            self.scenario.run(self.backend)

    def measure(self) -> dict[str, float]:
        """Seconds of one generation: `prefill`, `decode` (per token after the first) and `generate` (all of it)."""
        with self.backend.ready():
            self.scenario.run_per_token_text_generation_latency_tracking()
        report = self.scenario.report
        return {
            "prefill": report.prefill.latency.values[0],
            "decode": report.decode.latency.values[0] / (self.new_tokens - 1),
            "generate": report.generate.latency.values[0],
        }

    def peak(self) -> dict[str, float | None]:
        """Peak memory of a prefill in MB (10^6 bytes), as optimum-benchmark's tracker sees it.

        `allocated` and `reserved` are torch's own on a GPU, weights included. On a CPU there are none: `process` is the
        resident set of the whole process, sampled, which keeps what the allocator did not give back.
        """
        tracker = self.tools.Memory(self.config.device, self.config.name, self.config.device_ids)
        kwargs = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
        with self.backend.ready(), tracker.track():
            self.backend.prefill(self.backend.inputs, kwargs)
        seen = tracker.get_max_memory()
        return {"allocated": seen.max_allocated, "reserved": seen.max_reserved, "process": seen.max_ram}

    def energy(self, seconds: float = 10.0) -> dict[str, Any]:
        """Watt-hours per generation, or why there are none; takes `seconds`, as power is sampled once a second."""
        reason = no_energy(self.config.device, self.tools.codecarbon)
        if reason:
            return {"available": False, "reason": reason}
        import time

        before = os.getcwd()
        kwargs = self.scenario.config.generate_kwargs
        with tempfile.TemporaryDirectory() as folder, self.backend.ready():
            os.chdir(folder)  # the tracker writes where it stands
            try:
                tracker, count = self.tools.Energy(self.config.device, self.config.name, self.config.device_ids), 0
                with tracker.track(task_name="generate"):
                    start = time.perf_counter()
                    while time.perf_counter() - start < seconds:
                        self.backend.generate(self.backend.inputs, kwargs)
                        count += 1
            finally:
                os.chdir(before)
        used = tracker.get_energy()
        part = used.gpu if self.config.device == "cuda" else used.cpu
        what = "GPU" if self.config.device == "cuda" else "CPU package (RAPL), the whole machine"
        return {"available": True, "watt_hours": 1000 * part / count, "what": what, "generations": count}

    @property
    def config(self) -> Any:
        """The backend's: device and name."""
        return self.backend.config


def no_energy(device: str, codecarbon: bool) -> str | None:
    """Why the energy of a run can't be measured here; None when it can. Estimates from a data sheet are not taken."""
    if device == "cpu":
        counters = os.path.join(RAPL, "intel-rapl:0", "energy_uj")
        if not os.access(counters, os.R_OK):
            return f"this CPU's energy counter ({counters}) can't be read, and an estimate is no measurement"
    elif device != "cuda":
        return f"no energy counter is known for {device}"
    if not codecarbon:
        return "optimum-benchmark reads energy through codecarbon, which is not installed"
    return None
