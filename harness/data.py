"""Where a benchmark's questions and videos are, at which revision, and whether they are all there.

Full editions are folders `<root>/<data set's id>`, laid out as on the hub: what `pruneval data fetch` or
`hf download --repo-type dataset <id> --local-dir <folder>` makes. The root is `--data-root`, `$PRUNEVAL_DATA`, or
`~/.cache/pruneval`. Data that only the hub's own cache holds is used too. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.tasks import Benchmark

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".avi", ".mov", ".webm")
SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(.*)$")


@dataclass(frozen=True)
class Source:
    """One table for `datasets.load_dataset`: files are named, so that its cache is keyed by their content."""

    builder: str
    """ "parquet" or "json"."""
    files: list[str]
    cache: dict[str, str] = field(default_factory=dict)


def root() -> Path:
    """The folder of all data."""
    base = os.environ.get("PRUNEVAL_DATA")
    return Path(base) if base else Path.home() / ".cache" / "pruneval"


def locate(benchmark: Benchmark) -> Path | None:
    """The folder of a full edition's data set, if it is on this machine."""
    folder = root() / benchmark.dataset
    if folder.is_dir():
        return folder
    if not benchmark.hub:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                benchmark.dataset, repo_type="dataset", revision=benchmark.revision or None, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def require(benchmark: Benchmark) -> Path:
    """The folder of a full edition's data set. Raises: UserError with what to do when it is not there."""
    found = locate(benchmark)
    if found is not None:
        return found
    where = root() / benchmark.dataset
    if not benchmark.hub:
        raise UserError(f"benchmark {benchmark.name!r}: no hub has its data; put it into {where} (see docs/data.md)")
    raise UserError(
        f"benchmark {benchmark.name!r}: the data set {benchmark.dataset!r} is not on this machine; run `pruneval data "
        f"fetch {benchmark.name}` where there is a network, or point --data-root or PRUNEVAL_DATA at a folder with "
        f"{benchmark.dataset} in it; the pocket editions need no download"
    )


def revision(benchmark: Benchmark) -> str:
    """What a record says about its questions: the hub's commit, "local" where nothing says which it is; for a pocket
    edition the hash of the code that draws it.
    """
    if benchmark.edition == "pocket":
        from pruneval.tasks.pocket import editions

        return editions.root().name
    folder = locate(benchmark)
    if folder is None:
        return benchmark.revision
    # A folder of the hub's cache is named after the commit.
    return (_downloaded(folder) or "local") if root() in folder.parents else folder.name


def source(benchmark: Benchmark, place: int = 0) -> Source:
    """The table of questions of a benchmark's part. Raises: UserError when it is not there."""
    if benchmark.edition == "pocket":
        return _pocket(benchmark, benchmark.split if not benchmark.parts else benchmark.parts[place])
    if benchmark.questions:
        path = require(benchmark) / benchmark.questions
        if not path.is_file():
            raise UserError(f"benchmark {benchmark.name!r}: {path} is missing")
        answers(benchmark)
        return Source("json", [str(path)])
    return _files(benchmark, benchmark.configs[place], benchmark.split)


def answers(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows of a benchmark's file of answers. Raises: UserError."""
    path = require(benchmark) / benchmark.answers
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all("answer" in row for row in rows):
            raise ValueError("not a list of answers")
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"benchmark {benchmark.name!r}: {path} cannot be read ({error})") from error
    return rows


def image_table(benchmark: Benchmark) -> Source:
    """The table of images of a benchmark that has one. Raises: UserError when it is not there."""
    assert benchmark.images is not None
    if benchmark.edition == "pocket":
        return _pocket(benchmark, "images")
    return _files(benchmark, benchmark.images[0], benchmark.split)


def video_of(row: dict[str, Any], *_: Any, benchmark: Benchmark, place: int, folder: Path) -> list[str]:
    """A question's video file, as lmms-eval's `doc_to_visual` answers. Raises: FileNotFoundError."""
    stem = folder / benchmark.video_path(row, place)
    for path in (stem, *(stem.with_name(stem.name + suffix) for suffix in VIDEO_SUFFIXES)):
        if path.is_file():
            return [str(path)]
    raise FileNotFoundError(f"the video {stem} is missing")


def video_folder(benchmark: Benchmark) -> Path:
    """What the paths of a benchmark's videos are relative to."""
    if benchmark.edition == "pocket":
        from pruneval.tasks.pocket import editions

        return editions.ensure(benchmark.dataset)
    return require(benchmark)


def _pocket(benchmark: Benchmark, table: str) -> Source:
    from pruneval.tasks.pocket import editions

    folder = editions.ensure(benchmark.dataset)
    return Source("parquet", [str(folder / f"{table}.parquet")], {"cache_dir": str(folder / "arrow")})


def _files(benchmark: Benchmark, config: str, split: str) -> Source:
    """The files of a split, as the data set's card (README.md) or its file names say; every shard must be there."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    folder = require(benchmark)
    try:
        builder = datasets.load_dataset_builder(str(folder), config or None)
        files = [str(file) for file in builder.config.data_files[split]]
    except (DatasetNotFoundError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
        where = " ".join(part for part in (config, split) if part)
        raise UserError(
            f"benchmark {benchmark.name!r}: no files of {where!r} in {folder} ({' '.join(str(error).split())[:150]})"
        ) from error
    missing = _missing_shards([Path(file) for file in files])
    if missing:
        raise UserError(f"benchmark {benchmark.name!r}: {folder} lacks {', '.join(missing)}")
    kind = "json" if Path(files[0]).suffix in (".json", ".jsonl") else "parquet"
    return Source(kind, files)


def _missing_shards(files: list[Path]) -> list[str]:
    """The names of shards that the others' names promise."""
    shards = [match for file in files if (match := SHARD.match(file.name))]
    wanted = {f"{shard[1]}-{i:05d}-of-{shard[3]}" for shard in shards for i in range(int(shard[3]))}
    return sorted(wanted - {f"{shard[1]}-{shard[2]}-of-{shard[3]}" for shard in shards})


def _downloaded(folder: Path) -> str:
    """The commit that `hf download --local-dir` noted beside the files; empty when there is none."""
    notes = sorted((folder / ".cache" / "huggingface" / "download").rglob("*.metadata"))
    lines = {note.read_text(encoding="utf-8").split("\n")[0].strip() for note in notes}
    return hashlib.sha256(" ".join(sorted(lines)).encode()).hexdigest()[:16] if len(lines) > 1 else "".join(lines)
