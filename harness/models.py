"""Which models exist, where their files are, and loading them. torch and transformers are imported by `load` only.

A model is a name of `models.yaml` or a folder. Files are looked for in `$PRUNEVAL_MODELS/<name>`, in the package and in
the hub's cache; only then is the hub asked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pruneval.harness import model_files
from pruneval.harness.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "half": "float16"}
DTYPES |= {"bfloat16": "bfloat16", "bf16": "bfloat16"}
KERNELS = ("sdpa", "eager", "flash_attention_2")
DEVICES = ("cpu", "cuda", "mps")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One row of `models.yaml`, or a folder the user named."""

    name: str
    title: str
    family: str
    """config.json's `model_type`."""
    hub_id: str = ""
    revision: str = ""
    text_tower: str = ""
    """The CLIP model its vision tower comes from, `id@revision` on the hub."""
    packaged: str = ""
    """The folder inside the package, for a model that comes with it."""
    params_b: float | None = None
    visual_tokens: str = ""
    """Visual tokens of one image at the LLM input."""
    paper_tokens: int | None = None
    """Visual tokens of one image as the pruning papers count them."""
    dtype: str = "float16"
    """On a GPU; on a CPU the default is float32."""
    notes: str = ""


@dataclass(frozen=True)
class Located:
    """A model whose files were found and look complete; nothing is loaded."""

    entry: ModelEntry
    folder: Path
    revision: str
    """The hub's commit, or a hash of the folder's files."""


@dataclass
class LoadedModel:
    """A model ready to generate."""

    entry: ModelEntry
    model: Any
    processor: Any
    adapter: Any
    device: torch.device
    dtype: torch.dtype
    kernel: str
    revision: str
    folder: Path
    helpers: dict[str, LoadedModel] = field(default_factory=dict)
    """Helper models of methods, by the name or folder under which they were asked for."""


@cache
def _file() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))


def families() -> list[str]:
    """Every `model_type` that can be loaded."""
    return list(_file()["families"])


def names() -> list[str]:
    """Every registered model, in the file's order."""
    return list(_file()["models"])


def entry(name: str) -> ModelEntry:
    """The row of that name. Raises: UserError with the nearest name when there is none."""
    rows = _file()["models"]
    if name not in rows:
        raise unknown("model", name, rows)
    return ModelEntry(name=name, **rows[name])


def cards() -> list[dict[str, Any]]:
    """Every row as plain data."""
    return [{item.name: getattr(entry(name), item.name) for item in fields(ModelEntry)} for name in names()]


def locate(name_or_path: str) -> Located:
    """Find a model's files and check that they are complete. May download; loads nothing.

    Raises:
        UserError: unknown name, missing folder, incomplete or unsupported model.
    """
    if name_or_path not in names():
        folder = Path(name_or_path).expanduser()
        if not folder.is_dir() and not ({"/", os.sep} & set(name_or_path) or name_or_path.startswith((".", "~"))):
            raise unknown("model", name_or_path, names())
        family = model_files.check(folder, families())
        folder = folder.resolve()
        row = ModelEntry(name=folder.name, title=folder.name, family=family)
        return Located(row, folder, model_files.digest(folder))
    row = entry(name_or_path)
    own = _in_users_folder(row) or (packaged(row.name) if row.packaged else None)
    if own is not None:
        model_files.check(own, families())
        return Located(row, own, model_files.digest(own))
    from pruneval.harness import hub

    folder = hub.fetch(row)
    model_files.check(folder, families())
    return Located(row, folder, row.revision or folder.name)  # the cache names a snapshot by its commit


def packaged(name: str) -> Path:
    """The folder of a model that comes with the package."""
    return _ROOT / entry(name).packaged


def _in_users_folder(row: ModelEntry) -> Path | None:
    base = os.environ.get("PRUNEVAL_MODELS")
    for name in (row.name, row.hub_id.split("/")[-1]) if base else ():
        if name and Path(base or "", name).expanduser().is_dir():
            return Path(base or "", name).expanduser()
    return None


def text_tower(found: Located) -> str | None:
    """Where the rest of a model's CLIP is: `text_tower` in its folder, a copy in `$PRUNEVAL_MODELS`, or on the hub."""
    name, base = found.entry.text_tower, os.environ.get("PRUNEVAL_MODELS")
    folders = [found.folder / "text_tower"]
    if name and base:
        folders.append(Path(base).expanduser() / name.split("@")[0].split("/")[-1])
    return next((str(folder) for folder in folders if folder.is_dir()), name or None)


def text_tower_revision(found: Located) -> str:
    """A model's text tower by its name and the hub's commit, or a hash of a local folder's files; "" without one."""
    where = text_tower(found)
    if where is None:
        return ""
    if Path(where).is_dir():
        return f"{Path(where).name}@{model_files.digest(Path(where))[:8]}"
    name, _, commit = where.partition("@")
    return f"{name.split('/')[-1]}@{commit[:8]}"


def check_options(device: str | None, dtype: str | None, kernel: str | None) -> None:
    """Refuse a device, type or kernel that does not exist, before anything heavy is imported. Raises: UserError."""
    if device is not None and device.split(":")[0] not in DEVICES:
        raise unknown("device", device, DEVICES)
    if device is not None and ":" in device and not device.split(":", 1)[1].isdigit():
        raise UserError(f"device must look like cuda:0, not {device!r}")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if kernel is not None and kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)


def resolve(row: ModelEntry, device: str | None, dtype: str | None, kernel: str | None) -> tuple[str, str, str]:
    """Device, type and kernel with defaults: a GPU if there is one, float32 on a CPU, SDPA. Raises: UserError."""
    check_options(device, dtype, kernel)
    if device != "cpu":
        import torch

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device!r} was asked for, but torch sees no GPU")
        elif device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
            raise UserError(f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} GPU(s)")
        elif device.startswith("mps") and not torch.backends.mps.is_available():
            raise UserError(f"device {device!r} was asked for, but torch has no MPS here")
    chosen = DTYPES[dtype] if dtype else ("float32" if device == "cpu" else row.dtype)
    return device, chosen, kernel or "sdpa"


def load(
    name_or_path: str | Located, device: str | None = None, dtype: str | None = None, kernel: str | None = None
) -> LoadedModel:
    """A model of a supported family, by name or folder.

    Args:
        name_or_path: a name of the registry, a folder, or what `locate` returned.
        device: "cpu", "cuda", "cuda:1", …; a GPU if there is one.
        dtype: "float32", "float16", "bfloat16"; float32 on a CPU, else what the model was released in.
        kernel: "sdpa" (default), "eager", "flash_attention_2".

    Raises:
        UserError: it cannot be found, is incomplete or unsupported, or an option does not exist.
    """
    found = name_or_path if isinstance(name_or_path, Located) else locate(name_or_path)
    device, dtype, kernel = resolve(found.entry, device, dtype, kernel)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from pruneval.harness.adapters import adapter_for

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if model_files.converted(found.folder):
            from pruneval.harness.internvl2_processor import load_checkpoint

            model, processor = load_checkpoint(found.folder, getattr(torch, dtype), device, kernel)
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                found.folder, dtype=getattr(torch, dtype), attn_implementation=kernel, local_files_only=True
            )
            processor = AutoProcessor.from_pretrained(found.folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"the model in {found.folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model = model.to(device).eval()
    return LoadedModel(
        found.entry, model, processor, adapter_for(model, processor, text_tower(found)), torch.device(device),
        getattr(torch, dtype), kernel, found.revision, found.folder,
    )  # fmt: skip


def helper_of(loaded: LoadedModel, method: Any) -> LoadedModel | None:
    """The helper model that a method's parameter `helper` names, loaded once, as the model was; None when it has none.

    Raises: UserError when it cannot be loaded.
    """
    name = method.params.get("helper")
    if not name:
        return None
    if name not in loaded.helpers:
        dtype = str(loaded.dtype).removeprefix("torch.")
        loaded.helpers[name] = load(name, str(loaded.device), dtype, loaded.kernel)
    return loaded.helpers[name]


def adapter_of(loaded: LoadedModel, method: Any) -> Any:
    """The model's adapter, with the method's helper at its side. Raises: UserError."""
    helper = helper_of(loaded, method)
    return loaded.adapter if helper is None else loaded.adapter.helped(helper.adapter)
