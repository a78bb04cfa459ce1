"""The files of a model in a folder: whether all are there, whose family they are, and what they hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from pruneval.harness.errors import UserError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
CONVERTED = {"internvl_chat": "internvl"}  # checkpoints for code of their own, whose tensors are rearranged on loading
_SAMPLED_ABOVE = 1 << 28


def check(folder: Path, families: Collection[str]) -> str:
    """The folder's family, one of `families`, when everything a load needs is there. Raises: UserError."""
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    family = CONVERTED.get(str(family), family)
    if family not in families:
        raise UserError(f"{folder} holds a model of type {family!r}; supported: {', '.join(families)}")
    shards = ["model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        missing.append("processor_config.json")
    if missing:
        raise UserError(f"the model in {folder} is incomplete: {', '.join(missing)} missing")
    return str(family)


def converted(folder: Path) -> bool:
    """Whether these are tensors of a checkpoint for code of its own, to be rearranged on loading."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] in CONVERTED


def digest(folder: Path) -> str:
    """A short hash of a model's files, so that another model is another spec. Very large files are read in part."""
    seen = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_ABOVE:
                seen.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for block in range(64):
                file.seek(block * (size - (1 << 20)) // 63)
                seen.update(file.read(1 << 20))
    return seen.hexdigest()[:12]
