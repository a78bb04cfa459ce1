"""FrameFusion: the card's worked examples, and tiny models that see videos."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from films import MOVING, film, run, scene
from steps import Rows, shape

from pruneval import methods
from pruneval.harness import subjects
from pruneval.methods.framefusion import collapse, neighbours, required

build = methods.build


def test_framefusion_budget_formula():
    assert required([0.4], 28, 0.3) == pytest.approx(0.5185, abs=1e-4)
    assert required([], 32, 1.0) == 0 and required([], 32, 0.3) == pytest.approx(0.7)
    assert required([0.9], 28, 0.5) == 0 and required([0.0], 28, 0.01) == 1
    for past in ([0.0], [0.2, 0.05], [0.3, 0.3, 0.01]):
        left = [1.0]
        for share in past:
            left.append(left[-1] * (1 - share))
        last = left[-1] * (1 - required(past, 32, 0.3))
        assert sum(left[1:]) + (32 - len(past)) * last == pytest.approx(0.3 * 32)


def test_framefusion_collapses_runs_into_the_token_before():
    """Flags 0 1 1 1 0 0 1 1 along one place: tokens 0 and 5 absorb three and two."""
    tokens = film(8, 1)
    at = scene(tokens, 8)
    flags = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    found = collapse(at, torch.arange(2, 10), flags)
    assert found.keep.tolist() == [0, 1, 2, 6, 7, 10, 11, 12] and found.slots.tolist() == [2, 4]
    torch.testing.assert_close(found.values, torch.stack([tokens[:4].mean(0), tokens[5:].mean(0)]))


def test_framefusion_compares_a_place_with_the_last_living_frame():
    tokens = film(3, 2)
    whole = scene(tokens, 3)
    listed, similar = neighbours(whole)
    assert listed.tolist() == [2, 4, 6, 3, 5, 7] and similar.isinf().tolist() == [True, False, False] * 2
    expected = torch.nn.functional.cosine_similarity(tokens[2], tokens[0], dim=0)
    torch.testing.assert_close(similar[1], expected)
    stays = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10])  # origin 4 has been merged away
    later = dataclasses.replace(whole, hidden=whole.hidden[stays], origin=stays, visual=torch.arange(2, 7))
    listed, similar = neighbours(later)
    assert stays[listed].tolist() == [2, 6, 3, 5, 7]
    torch.testing.assert_close(similar[1], torch.nn.functional.cosine_similarity(tokens[4], tokens[0], dim=0))


def test_framefusion_takes_the_most_similar_when_the_budget_caps_it():
    tokens = film(1, 4).repeat(4, 1)
    at = scene(tokens, 4)
    found = build("framefusion", {"keep": 0.7, "threshold": 0.5}).reduce(at)
    assert len(at.origin) - len(found.keep) == int(0.3 * 16) and at.memory["stage"] == "done"
    at = scene(tokens, 4)
    found = build("framefusion", {"keep": 0.05}).reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 3, 4, 5, 18, 19, 20] and at.memory["past"] == [0.75]
    torch.testing.assert_close(found.values, tokens[:4])
    at = scene(film(4, 4), 4)
    assert build("framefusion", {"keep": 1}).reduce(at) is None and at.memory["stage"] == "done"


def test_framefusion_prunes_once_by_the_last_row():
    method = build("framefusion", {"keep": 0.5})
    memory = {"past": [0.0], "stage": "pruning"}
    scores = torch.tensor([[0.0, 0, 1, 9, 2, 8, 3, 7, 4, 6, 0, 0, 0]])
    at = scene(film(2, 4), 2, layer=1, layers=3, seen={0: Rows(scores)}, memory=memory)
    assert method.reduce(at).keep.tolist() == [0, 1, 3, 5, 10, 11, 12]  # round(8 (1 - 0.75))
    assert memory["stage"] == "done" and method.reduce(at) is None
    image = build("framefusion").schedule(shape(), 576)
    assert image[0] == 576 and sum(image) / 32 / 576 == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("family", "index"), MOVING.items())
def test_framefusion_meets_its_budget_on_videos(family, index, keep):
    subject = subjects.subject(family)
    for threshold in (-1, 0.1, 0.9):
        method = build("framefusion", {"keep": keep, "threshold": threshold})
        _, session, _ = run(subject.model("sdpa"), subject.samples[index], method, 1)
        budget = session.trace.budget(0)
        if budget.visual >= 16:
            assert budget.keep == pytest.approx(keep, abs=1 / budget.visual)
