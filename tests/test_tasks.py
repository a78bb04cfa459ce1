"""The rows of benchmarks and suites."""

from __future__ import annotations

import pytest

from pruneval import tasks
from pruneval.harness.errors import UserError
from pruneval.harness.lmms_task import task_file

FIELDS = (
    "task",
    "split",
    "metric",
    "keys",
    "scale",
    "higher_is_better",
    "judge",
    "group",
    "images",
    "config",
    "prompt",
)


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
        for field in (
            "task",
            "split",
            "metric",
            "keys",
            "scale",
            "higher_is_better",
            "judge",
            "group",
            "images",
            "config",
            "prompt",
        ):
            assert getattr(full, field) == getattr(pocket, field), (name, field)
        assert pocket.n >= 200


def test_rows_are_in_range():
    for row in tasks.benchmarks().values():
        assert row.n > 0 and row.maximum > 0 and row.scale > 0 and row.keys and row.columns
        assert row.metric in row.keys if len(row.keys) == 1 else row.metric not in row.keys
        assert set(row.group) <= set(row.columns)
        assert "{part}" in row.task if row.parts else "{" not in row.task + row.config
        printed = row.maximum * row.scale
        assert printed == 100 or row.unit == f"of {printed}", row.name


def test_every_task_is_one_of_the_installed_lmms_eval_or_ours():
    for row in tasks.benchmarks().values():
        for task in row.tasks:
            assert task_file(task).exists()
            assert (task_file(task).parent.name == "video_qa") == (not row.hub)


def test_suites_are_those_of_the_papers():
    counts = {name: len(members) for name, members in tasks.suites().items()}
    assert counts == {
        "pocket": 5, "pocket-image": 19, "pocket-video": 5, "smoke": 2, "core5": 5, "gsearch12": 12,
        "gsearch-video": 2, "vflowopt": 13, "flowcut12": 12, "flowcut-video3": 3, "ifprune9": 9, "ifprune-ocr": 2,
    }  # fmt: skip
    for name, members in tasks.suites().items():
        row = tasks.suite_row(name)
        assert row.average in tasks.AVERAGES
        assert len({tasks.benchmark(member).edition for member in members}) == 1
    # What a paper's protocol decides: the hint in TextVQA's prompt, the part of MME, the split with the videos.
    assert "textvqa_ocr" in tasks.suite("flowcut12") and "textvqa" in tasks.suite("gsearch12")
    assert "mme_perception" in tasks.suite("vflowopt") and "mme" in tasks.suite("ifprune9")
    assert tasks.suite_row("gsearch12").average == "maximum" and tasks.suite_row("ifprune9").average == "vanilla"
    assert tasks.benchmark("textvqa_ocr").prompt == {"ocr": True} != tasks.benchmark("textvqa").prompt


def test_a_row_takes_what_it_does_not_say_from_another():
    mme, perception = tasks.benchmark("mme"), tasks.benchmark("mme_perception")
    assert (perception.task, perception.columns, perception.group) == (mme.task, mme.columns, mme.group)
    assert len(perception.only["category"]) == 10 and perception.n + tasks.benchmark("mme_cognition").n == mme.n
    assert perception.metric == "mme_perception_score,none" != mme.metric
    mvbench = tasks.benchmark("mvbench")
    assert mvbench.tasks[:2] == ("mvbench_action_sequence", "mvbench_moving_count") and len(mvbench.tasks) == 20
    assert mvbench.configs[1] == "moving_count"


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'pocket-pope'"):
        tasks.benchmark("pocket-pop")
    with pytest.raises(UserError, match="did you mean 'core5'"):
        tasks.suite("core")
