"""The machine that numbers were measured on, and how busy it was with other things."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pruneval.harness.environment import environment


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, processors, memory (bytes), threads, and the load; `load_after` is for whoever measures to renew."""
    cpu, info = "", Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    on_gpu = device.type == "cuda"
    return {
        **environment(),
        "optimum_benchmark": version("optimum-benchmark"),
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "threads": torch.get_num_threads(),
        "load_before": load(),
        "load_after": load(),
    }


def load() -> float:
    """Mean number of running processes over the last minute."""
    return round(os.getloadavg()[0], 2)
