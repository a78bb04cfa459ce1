"""What a result was made with: versions, commit, machine. Imports nothing heavy."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("pruneval", "torch", "torchvision", "transformers", "lmms-eval", "datasets", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Python, package versions, git commit of the source (None when it is not a checkout), machine, GPU and driver."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **_gpu(),
    }


@functools.cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout this module lies in, with "+" when tracked files differ from it."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    head = _run("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + "+" * bool(changed) if head else None


def _gpu() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "cuda": None}
    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver or None, "cuda": torch.version.cuda}
