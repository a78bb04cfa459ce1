"""The pocket editions: the benchmarks' data sets, column for column, on the drawn world.

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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pruneval.harness.errors import UserError, unknown
from pruneval.tasks.pocket import benches, benches_choice, benches_judged, benches_open, benches_video
from pruneval.tasks.pocket.items import Tables

SEED = 20
MAKERS: dict[str, tuple[Callable[[int, int], Tables], int]] = {
    "mme": (benches.mme, 240),
    "gqa": (benches.gqa, 240),
    "pope": (benches.pope, 240),
    "scienceqa": (benches.scienceqa, 240),
    "textvqa": (benches.textvqa, 240),
    "mmbench_en": (benches_choice.mmbench_en, 40),
    "mmbench_cn": (benches_choice.mmbench_cn, 40),
    "ai2d": (benches_choice.ai2d, 120),
    "seedbench": (benches_choice.seedbench, 120),
    "mmstar": (benches_choice.mmstar, 126),
    "mmmu": (benches_choice.mmmu, 120),
    "realworldqa": (benches_choice.realworldqa, 120),
    "vqav2": (benches_open.vqav2, 120),
    "vizwiz": (benches_open.vizwiz, 120),
    "docvqa": (benches_open.docvqa, 120),
    "infovqa": (benches_open.infovqa, 120),
    "chartqa": (benches_open.chartqa, 120),
    "hallusionbench": (benches_judged.hallusionbench, 120),
    "mathvista": (benches_judged.mathvista, 120),
    "mmvet": (benches_judged.mmvet, 60),
    "llava_bench": (benches_judged.llava_bench, 60),
    "videomme": (benches_video.videomme, 60),
    "mvbench": (benches_video.mvbench, 60),
    "video_qa": (benches_video.video_qa, 60),
}
"""What draws an edition's tables from a seed and a number of questions (MMBench: before they are rotated)."""
SOURCES = (
    "world.py", "questions.py", "prompts.py", "image_prompts.py", "charts.py", "clips.py", "items.py", "schemas.py",
    "editions.py",
)  # fmt: skip
"""The modules that decide an edition's content, beside the makers."""


def names() -> list[str]:
    """The editions that can be made."""
    return list(MAKERS)


def ensure(name: str) -> Path:
    """The folder of an edition's files (`<split>.parquet`, for GQA also `images.parquet`), made if missing.

    Raises:
        UserError: no such edition, or the cache folder cannot be written.
    """
    if name not in MAKERS:
        raise unknown("pocket edition", name, MAKERS)
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


def rows(name: str) -> Tables:
    """An edition's rows per table, drawn afresh; images are uint8 arrays (height, width, 3)."""
    maker, number = MAKERS[name]
    return maker(SEED, number)


def digest(tables: Tables) -> str:
    """A hash of an edition's rows that is the same on every machine.

    Pictures enter coarsely, as means of 8 x 8 pixels in steps of 8 levels: the last bit of a float, and with it now and
    then a pixel, depends on the processor.
    """
    seen = hashlib.sha256()
    for table in sorted(tables):
        for row in tables[table]:
            for column, value in row.items():
                seen.update(f"{table}/{column}=".encode() + b"".join(_content(value)))
    return seen.hexdigest()[:16]


def _content(value: Any) -> list[bytes]:
    if _pictures(value):
        films = isinstance(value, list) or value.ndim == 4
        return [_coarse(each) for each in (value if films else [value])]
    return [json.dumps(value, sort_keys=True).encode()]


def _pictures(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, list) and bool(value) and _pictures(value[0]))


def _coarse(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    means = pixels.reshape(height // 8, 8, width // 8, 8, channels).mean((1, 3))
    return (means // 8).astype(np.uint8).tobytes()


@cache
def _generation() -> str:
    """A hash of the code that draws and asks, and of the seed."""
    here = Path(__file__).parent
    seen = hashlib.sha256(str(SEED).encode())
    for source in (*SOURCES, *sorted(path.name for path in here.glob("benches*.py"))):
        seen.update((here / source).read_bytes())
    return seen.hexdigest()[:12]


def _write(name: str, folder: Path) -> None:
    import datasets
    import pyarrow.parquet as pq
    from PIL import Image

    from pruneval.tasks.pocket.clips import write_video
    from pruneval.tasks.pocket.schemas import features

    def encoded(pixels: Any) -> Any:
        if isinstance(pixels, list):
            return [encoded(each) for each in pixels]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    tables = rows(name)
    for video in tables.get("videos", []):
        (folder / video["path"]).parent.mkdir(exist_ok=True)
        write_video(folder / video["path"], video["video"])
    for table, content in tables.items():
        if table == "videos":
            continue
        columns = features(name, table)
        data = {
            column: [encoded(row[column]) if _pictures(row[column]) else row[column] for row in content]
            for column in columns
        }
        made = datasets.Dataset.from_dict(data, features=columns)
        pq.write_table(made.data.table.combine_chunks(), folder / f"{table}.parquet")
    manifest = {"edition": name, "digest": digest(tables), "rows": {table: len(tables[table]) for table in tables}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
