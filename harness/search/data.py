"""Calibration samples: a pocket edition's training questions, or a user's own images with questions and answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError, unknown

SHORT = "\nAnswer the question using a single word or phrase."
COLUMNS = ("image", "question", "answer")


@dataclass(frozen=True)
class Sample:
    """One question about one image; any of the `answers` is right."""

    image: Any  # PIL.Image.Image
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """The samples of a search, with what a recipe says of them."""

    name: str
    digest: str
    samples: tuple[Sample, ...]


def load(data: str, number: int, seed: int = 0) -> Calibration:
    """`number` samples.

    Args:
        data: "pocket" (all editions in turn), "pocket-gqa" and so on; a folder or file `datasets` can read, or a hub
            id, with columns image, question and answer, and perhaps ":split" behind it (default: train).
        number: of samples; of a user's data, drawn by `seed`.
        seed: of the draw.

    Raises:
        UserError: no such data, a column is missing, or there are too few rows.
    """
    if data.startswith("pocket") and not Path(data).exists():
        return _pocket(data, number, seed)
    return _users(data, number, seed)


def _pocket(data: str, number: int, seed: int) -> Calibration:
    from PIL import Image

    from pruneval.tasks.pocket import calibration

    names = {"pocket": "all"} | {f"pocket-{name}": name for name in calibration.EDITIONS}
    if data not in names:
        raise unknown("calibration data", data, names)
    items = calibration.items(names[data], number, seed)
    samples = [Sample(Image.fromarray(item.image), item.prompt, (item.answer,)) for item in items]
    return Calibration(f"{data} (training scenes)", _digest(samples), tuple(samples))


def _users(data: str, number: int, seed: int) -> Calibration:
    import datasets

    source, colon, split = data.rpartition(":")
    source, split = (source, split) if colon else (data, "train")
    try:
        table = _read(source, split)
    except Exception as error:  # every reader has its own
        raise UserError(f"can't read the calibration data {source} ({split}): {error}") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"calibration data needs columns {', '.join(COLUMNS)}; {source} lacks {', '.join(missing)}")
    if len(table) < number:
        raise UserError(f"{source} has {len(table)} rows, {number} samples were asked for; say --samples {len(table)}")
    if not isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image())
    samples = [
        Sample(row["image"].convert("RGB"), row["question"] + SHORT, _answers(row["answer"]))
        for row in table.shuffle(seed=seed).select(range(number))
    ]
    return Calibration(f"{source}:{split}", _digest(samples), tuple(samples))


def _read(source: str, split: str) -> Any:
    import datasets

    path = Path(source)
    if path.is_file():
        kind = {".jsonl": "json"}.get(path.suffix, path.suffix.removeprefix("."))
        return datasets.load_dataset(kind, data_files={split: str(path)}, split=split)
    if path.is_dir() and (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(source, split=split)


def _answers(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(each) for each in value)


def _digest(samples: Sequence[Sample]) -> str:
    seen = hashlib.sha256()
    for sample in samples:
        seen.update(json.dumps([sample.prompt, sample.answers, sample.image.size]).encode())
        seen.update(sample.image.tobytes())
    return seen.hexdigest()[:16]
