"""Scores of lmms-eval's own tasks on the pocket editions, worked out by hand; failures; resuming."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripting
import tiny_llava

from pruneval import tasks
from pruneval.harness import lmms_model, lmms_task
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.evaluate import build_task, evaluate, preview
from pruneval.tasks.pocket import editions, prompts
from pruneval.tasks.pocket.questions import Question

POCKET = tasks.suite("pocket")
drawn = scripting.drawn
SNAPSHOT = Path(__file__).parent / "snapshots" / "pocket_prompts.json"


class MemoryJournal:
    def __init__(self, rows=()):
        self.rows = {row["key"]: row for row in rows}

    def answers(self):
        return dict(self.rows)

    def append(self, rows):
        self.rows.update((row["key"], row) for row in rows)


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    return tiny_llava.loaded()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    return functools.partial(scripting.run, monkeypatch)


def gold(row: dict, index: int) -> str:
    if "choices" in row:
        return "ABCDE"[row["answer"]]
    if "answers" in row:
        return Counter(row["answers"]).most_common(1)[0][0]
    return row["answer"]


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POCKET)
def test_the_right_answers_get_the_full_score(name: str, scripted):
    row = tasks.benchmark(name)
    outcome = scripted(name, gold, batch_size=16)
    score = outcome.scores[row.metric]
    assert score == {"value": pytest.approx(row.maximum), "n": row.n, "stderr": pytest.approx(0.0)}
    assert next(iter(outcome.scores)) == row.metric
    assert list(outcome.samples.doc_id) == list(range(row.n))
    assert (outcome.samples.correct == 1.0).all()
    assert outcome.samples.error.isna().all()


def test_mme_gives_50_for_half_a_pair_and_nothing_extra(scripted):
    # Always "Yes": one of each pair is right, never both: 50 in each of six categories.
    scores = scripted("pocket-mme", lambda row, index: "Yes").scores
    assert scores["mme_perception_score,none"]["value"] == pytest.approx(4 * 50)
    assert scores["mme_cognition_score,none"]["value"] == pytest.approx(2 * 50)
    assert scores["mme_total_score"]["value"] == pytest.approx(300)
    # One pair of 20 half wrong in one category: (19 * 200 + 50) / 20 = 192.5 there.
    outcome = scripted("pocket-mme", lambda row, index: "no." if index == 0 else f"{row['answer']}, it is")
    assert outcome.scores["mme_total_score"]["value"] == pytest.approx(1200 - 7.5)
    assert outcome.scores["mme_total_score"]["n"] == 240
    assert outcome.samples.correct.sum() == 239


def test_pope_is_f1_of_bare_yes_and_no(scripted):
    scores = scripted("pocket-pope", lambda row, index: "Yes").scores
    assert scores["pope_f1_score,none"]["value"] == pytest.approx(2 / 3)
    assert scores["pope_accuracy,none"]["value"] == pytest.approx(0.5)
    assert scores["pope_recall,none"]["value"] == pytest.approx(1.0)
    assert scripted("pocket-pope", lambda row, index: "Yes.").scores["pope_f1_score,none"]["value"] == 0.0
    # 120 yes, 120 no; every twelfth question (even, hence a "yes") is denied: 20 false negatives.
    scores = scripted("pocket-pope", lambda row, index: "no" if index % 12 == 0 else row["answer"]).scores
    assert scores["pope_f1_score,none"]["value"] == pytest.approx(2 * 100 / (2 * 100 + 20))
    assert scores["pope_accuracy,none"]["value"] == pytest.approx(220 / 240)


def test_gqa_ignores_case_and_punctuation_and_nothing_else(scripted):
    def answer(row, index):
        return row["answer"].upper() + "." if index % 4 else "the " + row["answer"]

    score = scripted("pocket-gqa", answer).scores["exact_match,none"]
    assert score["value"] == pytest.approx(0.75)
    # 180 ones and 60 zeros.
    assert score["stderr"] == pytest.approx((0.75 * 0.25 * 240 / 239 / 240) ** 0.5)


def test_scienceqa_wants_a_letter_alone_or_before_a_dot(scripted):
    def answer(row, index):
        letter = gold(row, index)
        words = row["choices"][row["answer"]]
        return [letter, f"{letter}. {words}", f"({letter})", f"The answer is {letter}"][index % 4]

    assert scripted("pocket-scienceqa", answer).scores["exact_match,none"]["value"] == pytest.approx(0.5)


def test_textvqa_counts_how_many_of_ten_people_agree(scripted):
    rows = drawn("textvqa")["validation"]

    def answer(row, index):
        return Counter(row["answers"]).most_common()[-1][0]

    def worth(row):
        # Among the other nine of each person: those who agree saw one vote less.
        votes = Counter(row["answers"]).most_common()[-1][1]
        return (votes * min(1, (votes - 1) / 3) + (10 - votes) * min(1, votes / 3)) / 10

    outcome = scripted("pocket-textvqa", answer)
    assert {round(worth(row), 6) for row in rows} >= {0.3, 1.0}
    assert outcome.scores["exact_match,none"]["value"] == pytest.approx(sum(map(worth, rows)) / len(rows))
    assert list(outcome.samples.correct) == pytest.approx(list(map(worth, rows)))
    assert list(outcome.samples.target) == [gold(row, 0) for row in rows]


def test_a_limit_never_cuts_a_pair_and_says_when_it_is_too_small(scripted):
    assert scripted("pocket-mme", gold, limit=13).scores["mme_total_score"]["n"] == 12
    assert scripted("pocket-pope", gold, limit=13).scores["pope_f1_score,none"]["n"] == 13
    with pytest.raises(UserError, match="mme_cognition_score,none; use a larger limit"):
        scripted("pocket-mme", gold, limit=1)


def test_nothing_is_written_or_printed(scripted, tmp_path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(tmp_path)
    seen = []
    scripted("pocket-textvqa", gold, limit=20, batch_size=8, on_progress=lambda *step: seen.append(step))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]


# Prompts --------------------------------------------------------------------------------------------------------------


def asked(row: dict, name: str) -> str:
    """The prompt the pocket model was trained on for this row."""
    text = row["question"].removesuffix(prompts.YES_NO)
    question = Question("", text, "", (), choices=tuple(row.get("choices", ())), hint=row.get("hint", ""))
    return getattr(prompts, name)(question)


@pytest.mark.parametrize("name", POCKET)
def test_prompts_are_those_of_training(name: str, loaded):
    row = tasks.benchmark(name)
    rows = drawn(row.dataset)[row.split]
    found = preview(row, loaded)
    assert found == [prompts.chat(asked(one, row.dataset)) for one in rows]
    assert found[:3] == json.loads(SNAPSHOT.read_text())[name]


def test_questions_about_one_image_are_known(loaded):
    image = evaluate(loaded, None, tasks.benchmark("pocket-mme"), limit=8).samples.image
    assert list(image[::2]) == list(image[1::2]) and image.nunique() == 4 and image.map(len).eq(16).all()


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_sample_that_cannot_be_answered_fails_the_cell(loaded, monkeypatch: pytest.MonkeyPatch):
    journal, real = MemoryJournal(), lmms_model.PrunevalModel._generate

    def generate(self, batch, session):
        if "gqa/5" in [request.key for request in batch]:
            raise RuntimeError("index out\nof range")
        return real(self, batch, session)

    monkeypatch.setattr(lmms_model.PrunevalModel, "_generate", generate)
    with pytest.raises(SampleFailure) as failure:
        evaluate(loaded, None, tasks.benchmark("pocket-gqa"), limit=8, batch_size=4, journal=journal)
    assert failure.value.key == "gqa/5"
    assert str(failure.value) == "sample gqa/5: RuntimeError: index out of range"
    assert "gqa/5" not in journal.rows


def test_a_batch_that_fails_for_its_size_is_answered_one_by_one(loaded, monkeypatch: pytest.MonkeyPatch):
    row = tasks.benchmark("pocket-gqa")
    expected = evaluate(loaded, None, row, limit=4, batch_size=4)
    real = lmms_model.PrunevalModel._generate

    def generate(self, batch, session):
        if len(batch) > 1:
            raise MemoryError("too large")
        return real(self, batch, session)

    monkeypatch.setattr(lmms_model.PrunevalModel, "_generate", generate)
    with pytest.warns(UserWarning, match="a batch of 4 failed .MemoryError: too large"):
        outcome = evaluate(loaded, None, row, limit=4, batch_size=4)
    assert outcome.samples.equals(expected.samples)


@pytest.mark.parametrize("broken", [0, 5])
def test_a_corrupt_image_fails_the_cell_and_is_named(broken: int, loaded, tmp_path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(editions.ensure("pope") / "test.parquet")
    images = table.column("image").to_pylist()
    images[broken] = {"bytes": images[broken]["bytes"][:60], "path": None}
    place = table.schema.get_field_index("image")
    column = pa.array(images, type=table.schema.field("image").type)
    pq.write_table(table.set_column(place, table.schema.field("image"), column), tmp_path / "test.parquet")
    monkeypatch.setattr(editions, "ensure", lambda name: tmp_path)
    with pytest.raises(SampleFailure, match=f"sample pope/{broken}: "):
        evaluate(loaded, None, tasks.benchmark("pocket-pope"), limit=8, batch_size=4)


# Resuming -------------------------------------------------------------------------------------------------------------


def test_answers_in_the_journal_are_not_generated_again(loaded, monkeypatch: pytest.MonkeyPatch):
    row = tasks.benchmark("pocket-scienceqa")
    first = MemoryJournal()
    whole = evaluate(loaded, None, row, limit=12, batch_size=4, journal=first)
    assert len(first.rows) == 12

    again, generated = MemoryJournal(list(first.rows.values())[:7]), []
    stale = next(iter(again.rows))
    again.rows[stale] = {**again.rows[stale], "request": "of another prompt", "answer": "stale"}
    real = lmms_model.PrunevalModel._generate

    def generate(self, batch, session):
        generated.extend(request.key for request in batch)
        return real(self, batch, session)

    monkeypatch.setattr(lmms_model.PrunevalModel, "_generate", generate)
    steps = []
    outcome = evaluate(
        loaded, None, row, limit=12, batch_size=4, journal=again, on_progress=lambda *step: steps.append(step)
    )
    assert sorted(generated) == sorted(set(first.rows) - set(list(first.rows)[1:7]))
    assert steps[0] == (6, 12) and steps[-1] == (12, 12)
    assert outcome.scores == whole.scores
    assert outcome.samples.equals(whole.samples)
    assert again.rows == first.rows


def test_tasks_are_those_lmms_eval_has_installed():
    from lmms_eval.tasks import TaskManager

    folder = Path(lmms_task.task_file("mme")).parent.parent
    for name in POCKET:
        task = tasks.benchmark(name).task
        path = Path(lmms_task.task_file(task))
        index = TaskManager(include_path=str(path.parent), include_defaults=False)
        assert Path(index._get_yaml_path(task)) == path
        assert folder in path.parents
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        lmms_task.task_file("no_such_task")


def test_importing_lmms_eval_changes_nothing_else():
    import warnings

    from PIL import ImageFile

    build_task(tasks.benchmark("pocket-mme"))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ("ignore", None, Warning, None, 0) not in warnings.filters
