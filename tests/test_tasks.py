"""The rows of benchmarks and suites."""

from __future__ import annotations

import pytest

from pruneval import tasks
from pruneval.harness.errors import UserError


def test_every_suite_names_benchmarks_that_exist():
    for name, members in tasks.suites().items():
        assert members, name
        assert all(tasks.benchmark(member).name == member for member in members)


def test_pocket_editions_say_so_and_share_everything_else_with_the_full_ones():
    table = tasks.benchmarks()
    for name, row in table.items():
        assert row.edition in ("full", "pocket")
        assert ("pocket" in name) == ("pocket" in row.title) == (row.edition == "pocket")
    for name in tasks.suite("core5"):
        full, pocket = table[name], table[f"pocket-{name}"]
        for field in ("task", "split", "metric", "keys", "scale", "higher_is_better", "judge", "group", "images"):
            assert getattr(full, field) == getattr(pocket, field), (name, field)
        assert pocket.n >= 200


def test_rows_are_in_range():
    for row in tasks.benchmarks().values():
        assert row.n > 0 and row.maximum > 0 and row.scale > 0 and row.keys
        assert row.metric in row.keys or len(row.keys) > 1


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'pocket-pope'"):
        tasks.benchmark("pocket-pop")
    with pytest.raises(UserError, match="did you mean 'core5'"):
        tasks.suite("core")
