"""The files of a cell: the journal while it runs, one record when it has ended. No other module writes result files.

    <out>/<hash of the spec>/journal.jsonl     answers already generated, one JSON object per line
                             samples.parquet   one row per request
                             record.json       written last: a cell with one has ended

Every file but the journal appears whole or not at all. Reading needs no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import UserError
from pruneval.harness.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
RECORD, SAMPLES, JOURNAL, LOCK = "record.json", "samples.parquet", "journal.jsonl", ".lock"
CHECKSUM = "checksum"


class StorageError(UserError):
    """Results cannot be written: the disk is full, or the folder is not ours."""


class RecordError(UserError):
    """A record that cannot be read or was changed after it was written."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a cell ended. The field order is the order in the file."""

    schema: int = SCHEMA
    spec: RunSpec
    status: str
    """ "done" (scored) or "failed" (not scored)."""
    error: dict[str, str] | None = None
    """Why it failed: {"sample": its key or "", "message": one line}."""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """metric -> {"value", "n", "stderr"}, at full precision; empty when failed."""
    budget: dict[str, float] = field(default_factory=dict)
    """Means over the samples: visual_tokens, avg_in, kept_after, final, keep, and early where a helper may answer."""
    provisional: str = ""
    """Why the method is not yet its paper's, as its card says; usually empty."""
    implied: dict[str, Any] | None = None
    """Cost computed from dimensions and declared lengths, when it could be."""
    measured: dict[str, Any] | None = None
    """Cost observed on the device, when it was measured."""
    samples: dict[str, Any] | None = None
    """The file of samples: {"file", "rows", "sha256"}."""
    environment: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    """{"started", "seconds", "resumed"}: the last attempt only; `resumed` counts answers taken from the journal."""

    @property
    def done(self) -> bool:
        """Whether the cell has a score."""
        return self.status == "done"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """The record a file holds."""
        return cls(**{**data, "spec": RunSpec.from_dict(data["spec"])})


def write_record(folder: Path, record: RunRecord, samples: pd.DataFrame | None = None) -> RunRecord:
    """Write a cell's end, samples first; returns the record with its samples' checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    described = None
    if samples is not None:
        buffer = io.BytesIO()
        samples.to_parquet(buffer, index=False)
        described = {"file": SAMPLES, "rows": len(samples), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
        write_atomically(folder / SAMPLES, buffer.getvalue())
    record = RunRecord(**{**record.__dict__, "samples": described})
    data = record.to_dict()
    text = json.dumps({**data, CHECKSUM: _checksum(data)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / RECORD, text.encode())
    return record


def read_record(folder: Path) -> RunRecord | None:
    """The record in a cell's folder, or None when the cell has not ended.

    Raises:
        RecordError: it is of another schema, unreadable, or its samples are not the ones it was written with.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise RecordError(f"the record {path} cannot be read: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise RecordError(f"the record {path} has schema {schema!r}; this version reads {SCHEMA}")
    if data.pop(CHECKSUM, None) != _checksum(data):
        raise RecordError(f"the record {path} was changed after it was written; delete it to run the cell again")
    try:
        record = RunRecord.from_dict(data)
    except (KeyError, TypeError) as error:
        raise RecordError(f"the record {path} is incomplete: {error}") from error
    if record.spec.hash != folder.name:
        raise RecordError(f"the record {path} belongs into {record.spec.hash}: its spec was changed or it was moved")
    if record.samples is not None:
        _verify(folder / record.samples["file"], record.samples["sha256"])
    return record


def _checksum(data: Mapping[str, Any]) -> str:
    """Of a record's content, as it is read back."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_samples(folder: Path, record: RunRecord) -> pd.DataFrame:
    """The samples of a record, verified."""
    import pandas as pd

    if record.samples is None:
        raise RecordError(f"the record in {folder} has no samples")
    path = folder / record.samples["file"]
    _verify(path, record.samples["sha256"])
    return pd.read_parquet(path)


def read_records(out: Path | str) -> list[RunRecord]:
    """Every record below a results folder, ordered by model, method and benchmark. Raises: RecordError."""
    found = [read_record(path.parent) for path in sorted(Path(out).glob(f"*/{RECORD}"))]
    return sorted((record for record in found if record), key=lambda r: (r.spec.model, r.spec.method, r.spec.benchmark))


class Journal:
    """Answers of an unfinished cell. A line torn by a crash is dropped, and so is everything that is not a row.

    Of several processes that share a cell each writes a file of its own, and all read all.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        first = Path(folder) / JOURNAL
        self.path = first.with_suffix(f".{process}{first.suffix}") if process else first
        self._all = f"{first.stem}*{first.suffix}"

    def files(self) -> list[Path]:
        """Those that are there, of all processes."""
        return sorted(self.path.parent.glob(self._all))

    def answers(self) -> dict[str, dict[str, Any]]:
        """The rows by their key; of two with the same key, the later."""
        lines = [line for file in self.files() for line in file.read_bytes().split(b"\n")[:-1]]
        rows: dict[str, dict[str, Any]] = {}
        for line in lines:
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
        return rows

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of a batch; they are on the disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with _writing(self.path), self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    text = b"\n" + text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Forget the answers of all; the record holds them now."""
        for file in self.files():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own a cell's folder: two processes never run the same cell. A killed process lets go by itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write results to {folder.parent}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is running the cell {folder}; wait for it or use another --out") from None
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears whole or not at all, and is on the disk when this returns."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; what was finished is kept, make room and run it again"
        ) from error


def _verify(path: Path, expected: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"the samples {path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise RecordError(
            f"the samples {path} are not the ones the record was written with; delete {path.parent} to run it again"
        )
