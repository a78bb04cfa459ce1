"""Rows of the pocket editions, mutated, through lmms-eval's real tasks and a tiny model.

Every one ends in scores, in a failed sample by name, or in one line.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_llava
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pruneval import tasks
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.evaluate import evaluate
from pruneval.tasks.pocket import editions

BENCHMARKS = [*tasks.suite("pocket-image"), *tasks.suite("pocket-video")]
ROWS = 4


def png(mode: str, size: tuple[int, int], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def zero_size() -> bytes:
    """A PNG whose header says 0 x 0."""
    good = png("RGB", (8, 8))
    return good[:16] + bytes(8) + good[24:]


PICTURES: dict[str, Callable[[bytes], bytes | None]] = {
    "none": lambda good: None,
    "empty": lambda good: b"",
    "text": lambda good: b"this is no picture",
    "cut": lambda good: good[: len(good) // 2],
    "zeros": lambda good: bytes(len(good)),
    "flipped": lambda good: good[:60] + bytes(255 - byte for byte in good[60:90]) + good[90:],
    "zero size": lambda good: zero_size(),
    "one pixel": lambda good: png("RGB", (1, 1)),
    "one line": lambda good: png("RGB", (900, 1)),
    "one column": lambda good: png("L", (1, 700)),
    "transparent": lambda good: png("RGBA", (30, 40)),
    "palette": lambda good: png("P", (30, 40)),
    "bits": lambda good: png("1", (30, 40)),
    "print": lambda good: png("CMYK", (30, 40), "JPEG"),
    "deep": lambda good: png("I;16", (30, 40)),
    "moving": lambda good: png("RGB", (30, 40), "GIF"),
}
VALUES: tuple[Any, ...] = (
    None,
    "",
    0,
    -1,
    10**12,
    math.nan,
    True,
    "long " * 1000,
    [],
    [None],
    {},
    "<image>",
    "A" * 300,
)


def mutated(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    """The table with one value replaced; where its type does not take the value, the column's type gives way.

    Pictures and the whole of a column that cannot hold the value stay what they can be: a table must be writable.
    """
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    values = table.column(column).to_pylist()
    if isinstance(value, str) and value in PICTURES and isinstance(values[row], dict) and "bytes" in values[row]:
        values[row] = {**values[row], "bytes": PICTURES[value](values[row]["bytes"])}
    elif isinstance(values[row], dict) and "bytes" in values[row]:
        values[row] = None
    else:
        values[row] = value
    try:
        return table.set_column(place, field, pa.array(values, type=field.type))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        whole = [None if one is None else str(one)[:5000] for one in values]
        return table.set_column(place, column, pa.array(whole, type=pa.string()))


def edition(source: Path, folder: Path, split: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """A copy of an edition with its first rows only, one table changed."""
    for path in source.iterdir():
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            table = table if path.stem == "images" else table.slice(0, ROWS)
            pq.write_table(change(table) if path.stem == split else table, folder / path.name)
        elif path.name == "videos":
            shutil.copytree(path, folder / "videos")


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    found = tiny_llava.loaded()
    found.entry = SimpleNamespace(name="tiny")
    found.model.generation_config.max_length = None
    return found


def outcome(loaded: Any, name: str, change: Callable[[pa.Table], pa.Table], videos: bytes | None = None) -> None:
    """Evaluates a mutated edition; anything but scores, a named sample or a line is an error."""
    row = tasks.benchmark(name)
    split = row.split if not row.parts else row.parts[0]
    source = editions.ensure(row.dataset)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, fuzzing.ending():
        edition(source, Path(folder), split, change)
        if videos is not None:
            for path in (Path(folder) / "videos").glob("*"):
                path.write_bytes(videos or path.read_bytes()[:500])
        patch.setattr(editions, "ensure", lambda dataset: Path(folder))
        try:
            found = evaluate(loaded, None, row, limit=ROWS, batch_size=2)
            assert row.metric in found.scores and len(found.samples) >= 1
            assert found.samples.answer.notna().all()
        except SampleFailure as error:
            fuzzing.one_line(error)
            named = error.key.split("/")[-1]
            if not named.isdigit():
                raise AssertionError(f"{error.key!r} names no sample") from error
        except UserError as error:
            fuzzing.one_line(error)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, int, int, Any]:
    """Benchmark, number of the column, row and value."""
    value = st.one_of(st.sampled_from([*VALUES, *PICTURES]), st.sampled_from(list(PICTURES)), fuzzing.odd_text)
    return draw(st.sampled_from(BENCHMARKS)), draw(st.integers(0, 30)), draw(st.integers(0, ROWS - 1)), draw(value)


@fuzzing.examples(12, 200)
@given(mutations())
def test_a_mutated_row_ends_in_scores_a_named_sample_or_a_line(loaded, mutation):
    name, number, row, value = mutation
    outcome(loaded, name, lambda table: mutated(table, table.column_names[number % table.num_columns], row, value))


@fuzzing.examples(3, 40)
@given(st.sampled_from(BENCHMARKS), st.integers(0, 30))
def test_a_column_that_is_missing_ends_in_scores_or_a_line(loaded, name, number):
    outcome(loaded, name, lambda table: table.drop_columns([table.column_names[number % table.num_columns]]))


@pytest.mark.parametrize("content", [b"", b"no film", b"\x00\x00\x00\x18ftypmp42" + bytes(400)])
def test_an_unreadable_film_ends_in_a_named_sample(loaded, content):
    outcome(loaded, "pocket-tgif_qa_exact", lambda table: table, content)
