"""The pocket editions: five benchmarks' data sets, column for column, on the drawn world.

An edition is made on first use, in a few seconds, into `$PRUNEVAL_DATA` or `~/.cache/pruneval`, below a folder named
after everything that decides its content. The same code gives the same rows everywhere; `digest` says so in one number.

Scenes come from the world's "test" and "heldout" splits, half and half, and never from "train".
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pruneval.harness.errors import UserError, unknown
from pruneval.tasks.pocket import benches

SEED = 20
ROWS = 240
"""Questions per edition."""


def names() -> list[str]:
    """The editions that can be made."""
    return list(benches.MAKERS)


def ensure(name: str) -> Path:
    """The folder of an edition's files (`<split>.parquet`, for GQA also `images.parquet`), made if missing.

    Raises:
        UserError: no such edition, or the cache folder cannot be written.
    """
    if name not in benches.MAKERS:
        raise unknown("pocket edition", name, benches.MAKERS)
    folder = root() / name
    if (folder / "manifest.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write the pocket editions to {root()}: {error}; set PRUNEVAL_DATA") from error
    try:
        _write(name, draft)
        draft.chmod(0o755)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was first; its folder has the same content.
            if not (folder / "manifest.json").exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def root() -> Path:
    """The folder of this generation of editions: another generator or seed means another folder."""
    base = os.environ.get("PRUNEVAL_DATA")
    cache_folder = Path(base) if base else Path.home() / ".cache" / "pruneval"
    return cache_folder / "pocket" / _generation()


def rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """An edition's rows per table, drawn afresh; images are uint8 arrays (height, width, 3)."""
    return benches.MAKERS[name](SEED, ROWS)


def digest(tables: dict[str, list[dict[str, Any]]]) -> str:
    """A hash of an edition's rows that is the same on every machine.

    Pictures enter coarsely, as means of 8 x 8 pixels in steps of 8 levels: the last bit of a float, and with it now and
    then a pixel, depends on the processor.
    """
    seen = hashlib.sha256()
    for table in sorted(tables):
        for row in tables[table]:
            for column, value in row.items():
                content = _coarse(value) if column == "image" else json.dumps(value, sort_keys=True).encode()
                seen.update(f"{table}/{column}=".encode() + content)
    return seen.hexdigest()[:16]


def _coarse(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    means = pixels.reshape(height // 8, 8, width // 8, 8, channels).mean((1, 3))
    return (means // 8).astype(np.uint8).tobytes()


@cache
def _generation() -> str:
    """A hash of the code that draws and asks, and of the seed."""
    here = Path(__file__).parent
    seen = hashlib.sha256(f"{SEED} {ROWS}".encode())
    for source in ("world.py", "questions.py", "prompts.py", "benches.py", "schemas.py", "editions.py"):
        seen.update((here / source).read_bytes())
    return seen.hexdigest()[:12]


def _write(name: str, folder: Path) -> None:
    import datasets
    import pyarrow.parquet as pq
    from PIL import Image

    from pruneval.tasks.pocket.schemas import features

    def encoded(pixels: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    tables = rows(name)
    for table, content in tables.items():
        columns = features(name, table)
        data = {
            column: [encoded(row[column]) if column == "image" else row[column] for row in content]
            for column in columns
        }
        made = datasets.Dataset.from_dict(data, features=columns)
        pq.write_table(made.data.table.combine_chunks(), folder / f"{table}.parquet")
    manifest = {"edition": name, "digest": digest(tables), "rows": {table: len(tables[table]) for table in tables}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
