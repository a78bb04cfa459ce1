"""Every pocket edition through lmms-eval's own task: scores worked out by hand, and what its scoring gets wrong."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import scripting
from scripting import drawn

from pruneval import tasks


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    return functools.partial(scripting.run, monkeypatch, batch_size=64)


def right(row: dict, index: int) -> str:
    """The gold answer in the form the benchmark asks for."""
    if "gt_answer" in row:
        return ("No", "Yes")[int(row["gt_answer"])]
    if "answers" in row:
        people = [one["answer"] if isinstance(one, dict) else one for one in row["answers"]]
        return Counter(people).most_common(1)[0][0]
    return "ABCDE"[int(row["answer"])] if "options" in row and "img_type" not in row else row["answer"]


def wrong(row: dict, index: int) -> str:
    """A readable answer that is not the gold one."""
    return "B" if right(row, index) == "A" else "A"


EXACT = ("mmbench_en", "mmbench_cn", "mmmu_val", "ai2d", "chartqa", "docvqa", "infovqa", "realworldqa",
         "hallusionbench_rules", "mmstar", "seedbench")  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_right_answers_get_the_full_score(name: str, scripted):
    row = tasks.benchmark(f"pocket-{name}")
    outcome = scripted(row.name, right)
    assert outcome.scores[row.metric] == {"value": pytest.approx(row.maximum), "n": row.n, "stderr": pytest.approx(0)}
    assert (outcome.samples.correct == 1.0).all() and len(outcome.samples) == row.n


@pytest.mark.parametrize("name", ["mmbench_en", "mmbench_cn"])
def test_mmbench_counts_a_question_when_every_rotation_is_right(name: str, scripted):
    # 40 questions; in every fourth the answer to the last rotation is wrong: 30 of 40.
    rows = drawn(name)["dev"]
    last = {one["index"] % 1_000_000: one["index"] for one in rows}
    spoilt = {index for base, index in last.items() if base % 4 == 0}
    outcome = scripted(f"pocket-{name}", lambda row, i: (wrong if row["index"] in spoilt else right)(row, i))
    score = outcome.scores["gpt_eval_score,none"]
    assert score["value"] == pytest.approx(75.0)
    assert score["stderr"] == pytest.approx(100 * (0.75 * 0.25 / 39) ** 0.5)
    assert outcome.samples.correct.sum() == len(rows) - 10
    # An answer that names no letter counts when it is the text of one option; one that says nothing is wrong at once.
    said = scripted(f"pocket-{name}", lambda row, i: row[row["answer"]] if row["index"] < 1_000_000 else "hm")
    assert said.scores["gpt_eval_score,none"]["value"] == 0.0
    assert said.samples.correct.sum() == 40


def test_ai2d_wants_a_letter_whatever_stands_around_it(scripted):
    forms = ("{}", "{}.", "({})", "Answer: {}")
    outcome = scripted("pocket-ai2d", lambda row, i: forms[i % 4].format(right(row, i)))
    assert outcome.scores["exact_match,flexible-extract"]["value"] == pytest.approx(0.75)


def test_seedbench_reads_the_first_sign_and_counts_images_and_videos_apart(scripted):
    # Odd rows are answered "(A)": every video (index % 4 == 3) and a third of the images.
    outcome = scripted("pocket-seedbench", lambda row, i: f"({right(row, i)})" if i % 2 else right(row, i))
    scores = {key: score["value"] for key, score in outcome.scores.items()}
    assert scores == {
        "seed_all,none": pytest.approx(0.5),
        "seed_image,none": pytest.approx(60 / 90),
        "seed_video,none": 0.0,
    }


def test_mmstar_is_the_mean_over_sub_categories(scripted):
    # One of seven sub-categories is all wrong; fine-grained perception has two.
    outcome = scripted(
        "pocket-mmstar", lambda row, i: (wrong if row["l2_category"] == "recognition" else right)(row, i)
    )
    assert outcome.scores["average,none"]["value"] == pytest.approx(6 / 7)
    assert outcome.scores["fine-grained perception,none"]["value"] == pytest.approx(0.5)
    assert outcome.scores["math,none"]["value"] == pytest.approx(1.0)


def test_mmmu_reads_letters_and_open_answers(scripted):
    rows = drawn("mmmu")["validation"]
    kinds = Counter(row["question_type"] for row in rows)
    assert kinds == {"multiple-choice": 100, "open": 20}
    pairs = sum(row["image_2"] is not None for row in rows)
    assert pairs == 20
    outcome = scripted(
        "pocket-mmmu_val", lambda row, i: "(B) or nothing" if row["question_type"] == "open" else right(row, i)
    )
    assert outcome.scores["mmmu_acc,none"]["value"] == pytest.approx(100 / 120, abs=1e-5)
    assert outcome.samples.correct.sum() == 100


def test_realworldqa_forgives_case_and_a_dot(scripted):
    # Every third question is open: a sentence around the word is wrong, around the letter it is not.
    outcome = scripted("pocket-realworldqa", lambda row, i: f"The answer is {right(row, i)}.")
    assert outcome.scores["exact_match,none"]["value"] == pytest.approx(80 / 120)
    outcome = scripted("pocket-realworldqa", lambda row, i: f"{right(row, i).upper()}.")
    assert outcome.scores["exact_match,none"]["value"] == pytest.approx(1.0)


def soft(votes: int) -> float:
    """VQA accuracy of an answer that `votes` of ten people gave: those who did see one vote less among the others."""
    return (votes * min(1, (votes - 1) / 3) + (10 - votes) * min(1, votes / 3)) / 10


@pytest.mark.parametrize(("name", "table"), [("vqav2", "validation"), ("vizwiz", "val")])
def test_people_who_disagree_make_an_answer_worth_less(name: str, table: str, scripted):
    rows = drawn(name)[table]
    votes = []
    for row in rows:
        people = [one["answer"] if isinstance(one, dict) else one for one in row["answers"]]
        votes.append(Counter(people)[right(row, 0)])
    assert {3, 10} <= set(votes), "nothing is tested when everybody agrees"
    outcome = scripted(f"pocket-{name}", right)
    assert list(outcome.samples.correct) == pytest.approx([soft(each) for each in votes])
    assert outcome.scores["exact_match,none"]["value"] == pytest.approx(sum(map(soft, votes)) / len(votes))
    assert soft(10) == soft(4) == 1.0 and soft(3) == pytest.approx(0.9) and soft(1) == pytest.approx(0.3)


def test_vizwiz_rewards_saying_that_it_cannot_be_seen(scripted):
    rows = drawn("vizwiz")["val"]
    assert Counter(row["category"] == "unanswerable" for row in rows) == {True: 40, False: 80}
    outcome = scripted("pocket-vizwiz", lambda row, i: "Unanswerable")
    expected = sum(soft(row["answers"].count("unanswerable")) for row in rows) / len(rows)
    assert outcome.scores["exact_match,none"]["value"] == pytest.approx(expected)
    assert 0.25 < expected < 0.34


def test_documents_are_scored_by_edit_distance_to_the_nearest_gold(scripted):
    # One letter too many in n + 1: 1 - 1 / (n + 1); a digit with a letter behind it is just at the threshold of 0.5.
    rows = drawn("docvqa")["validation"]
    outcome = scripted("pocket-docvqa", lambda row, i: row["answers"][-1].upper() + "x")
    expected = [1 - 1 / (len(row["answers"][-1]) + 1) for row in rows]
    assert list(outcome.samples.correct) == pytest.approx(expected)
    assert outcome.scores["anls,none"]["value"] == pytest.approx(sum(expected) / len(rows))
    assert scripted("pocket-docvqa", lambda row, i: "xy" + row["answers"][0][:1]).scores["anls,none"]["value"] == 0.0
    words = scripted("pocket-infovqa", lambda row, i: row["answers"][-1])
    assert words.scores["anls,none"]["value"] == pytest.approx(1.0)


def test_charts_forgive_five_per_cent(scripted):
    def answer(row: dict, index: int) -> str:
        gold = row["answer"]
        if index % 4 == 0:
            return str(float(gold) * 1.04)  # near enough
        if index % 4 == 2:
            return str(float(gold.rstrip("%")) / 100)  # 27.3% may be said as 0.273
        return gold.upper() if index % 4 == 1 else str(float(gold) * 1.06)  # a colour; too far away

    scores = scripted("pocket-chartqa", answer).scores
    for key in ("relaxed_overall,none", "relaxed_human_split,none", "relaxed_augmented_split,none"):
        assert scores[key]["value"] == pytest.approx(0.75)
    assert [scores[key]["n"] for key in list(scores)[:3]] == [120, 60, 60]


def test_hallusionbench_by_rules_counts_questions_pairs_and_figures(scripted):
    scores = scripted("pocket-hallusionbench_rules", lambda row, i: "Yes.").scores
    assert [scores[f"{key},none"]["value"] for key in ("aAcc", "qAcc", "fAcc")] == [0.5, 0.0, 0.0]
    # 30 sets of two figures and two questions: one wrong answer spoils one of 60 pairs and one of 60 figures.
    scores = scripted("pocket-hallusionbench_rules", lambda row, i: "Yes" if i == 1 else right(row, i)).scores
    assert scores["aAcc,none"]["value"] == pytest.approx(119 / 120)
    assert scores["qAcc,none"]["value"] == pytest.approx(59 / 60)
    assert scores["fAcc,none"]["value"] == pytest.approx(59 / 60)


def test_textvqa_with_the_hint_lists_what_can_be_read(scripted):
    samples = scripted("pocket-textvqa_ocr", right, limit=5).samples
    for row, prompt in zip(drawn("textvqa")["validation"], samples.prompt, strict=False):
        assert f"\nReference OCR token: {', '.join(row['ocr_tokens'])}\n" in prompt
    assert "OCR" not in scripted("pocket-textvqa", right, limit=1).samples.prompt[0]


def test_a_limit_cuts_no_group(scripted):
    assert scripted("pocket-mmbench_en", right, limit=9).scores["gpt_eval_score,none"]["n"] in (7, 8)
    assert scripted("pocket-hallusionbench_rules", right, limit=7).scores["aAcc,none"]["n"] == 4
    assert scripted("pocket-hallusionbench_rules", right, limit=1).scores["aAcc,none"]["n"] == 4


def test_a_metric_that_means_something_else_is_not_reported(scripted):
    assert "pope_yes_ratio,none" not in scripted("pocket-pope", right, limit=4).scores
