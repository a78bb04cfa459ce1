"""Ray for a sweep: started on this machine or reached at an address, and what there is to share among workers."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pruneval.harness.errors import UserError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's own default lets everything else on the machine go first
    "RAY_prestart_worker_first_driver": "0",
}
"""For a Ray that is started here, where the user has not set it."""


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, started on this machine or at an address; one that is there already is used and left as it is.

    Raises: UserError when Ray is not installed, can't be started, or does not answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray, which is not installed: pip install 'pruneval[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    _reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": 80 * 2**20, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address or "local", **options)
    except Exception as error:  # whatever Ray raises: the user can only start it otherwise
        ray.shutdown()
        what = f"the Ray cluster at {address} can't be used" if address else "Ray can't be started on this machine"
        raise UserError(f"{what}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reachable(address: str | None) -> None:
    """Ray itself waits for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not address or address == "auto":
        return
    if not host or not port.isdigit():
        raise UserError(f"--address must be host:port, ray://host:port or auto, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error


def device_of(ray: Any, device: str | None) -> str:
    """Where workers compute: as the user says, else on a GPU if the cluster has one. Raises: UserError."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if device is None:
        return "cuda" if gpus else "cpu"
    if device.startswith("cuda:"):
        raise UserError(f"with --engine ray, Ray chooses the GPU: --device cuda, not {device}")
    if device == "cuda" and not gpus:
        raise UserError("device 'cuda' was asked for, but Ray sees no GPU")
    return device


def resources(ray: Any, device: str, workers: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what each asks Ray for: a GPU of its own if there are enough, or its share of the CPUs.

    Without a wish there is one worker per GPU, or one per four CPUs.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([node.get(kind, 0) for node in alive] for kind in ("CPU", "GPU"))
    if device == "cuda":
        count = workers or int(sum(gpus))
        return count, {"num_gpus": min(1, share(gpus, count)), "num_cpus": min(1, share(cpus, count))}
    count = workers or max(1, int(sum(cpus)) // 4)
    return count, {"num_cpus": share(cpus, count)}


def share(sizes: Sequence[float], count: int) -> float:
    """The most that each of `count` workers can have of machines of these sizes; whole, or one over a whole number."""
    for whole in range(int(sum(sizes)) // count, 0, -1):
        if sum(int(size) // whole for size in sizes) >= count:
            return whole
    return 1 / math.ceil(count / max(1, sum(map(int, sizes))))


def one_line(error: BaseException) -> str:
    """The part of Ray's long messages that says what has happened."""
    text = " ".join(str(error).split())
    for start in ("Worker exit detail: ", "Worker exit type: "):
        text = text.partition(start)[2] or text
    for guesses in (" Some common causes", " There are some potential root causes"):
        text = text.partition(guesses)[0]
    return text[:300]
