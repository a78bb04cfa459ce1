"""PyramidDrop's counts, boundaries and where its scores come from."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness.session import pruned


@pytest.mark.parametrize(
    "n, keep, counts", [(10, 0.5, [10, 5, 2, 1]), (576, 0.5, [576, 288, 144, 72]), (576, 1, [576] * 4)]
)
def test_counts(n, keep, counts):
    declared = methods.build("pdrop", {"keep": keep}).schedule(shape(), n)
    assert declared == [count for count in counts for _ in range(8)]


def test_average_of_the_paper_and_of_low_budgets():
    assert sum(methods.build("pdrop").schedule(shape(), 576)) / 32 == 270
    early = methods.build("pdrop", {"layers": "2,8,16", "keep": 0.192}).schedule(shape(), 576)
    assert [early[layer] for layer in (0, 2, 8, 16)] == [576, 110, 21, 4]


@pytest.mark.parametrize("layers, expected", [(32, [8, 16, 24]), (28, [7, 14, 21]), (40, [10, 20, 30]), (3, [])])
def test_boundaries_at_other_depths(layers, expected):
    assert list(methods.build("pdrop").needs(shape(layers))) == expected


def test_the_last_prompt_token_of_the_coming_layer_ranks():
    heads = torch.tensor([[0, 0.1, 0.4, 0.2, 0.3, 0], [0, 0.3, 0.1, 0.2, 0.3, 0]])
    one = step(1, 4, 1, layer=8, upcoming=lambda: Rows(heads))
    assert methods.build("pdrop").reduce(one).keep.tolist() == [0, 2, 4, 5]


def chosen(model: Any) -> list[int]:
    """Origins after the first stage."""
    with torch.no_grad(), pruned(model, methods.build("pdrop", {"layers": "2"})) as session:
        model(**tiny.prompt(5, 7, 1, 1))
    return session.trace.entering(2).samples[0].origin.tolist()


def test_ranking_reads_the_layer_about_to_run():
    """Changing the coming layer's queries changes the choice; reversing its key heads and query heads together
    does not.
    """
    model = tiny.llava()
    before = chosen(model)
    attention = model.model.language_model.layers[2].self_attn
    with torch.no_grad():
        for weight, heads in ((attention.q_proj.weight, 4), (attention.k_proj.weight, 2)):
            weight.copy_(weight.unflatten(0, (heads, -1)).flip(0).flatten(0, 1))
        assert chosen(model) == before
        attention.q_proj.weight.neg_()
        assert chosen(model) != before
