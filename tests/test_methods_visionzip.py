"""VisionZip's split, its merge, and what goes to the language model."""

from __future__ import annotations

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.methods.visionzip import merge, split


@pytest.mark.parametrize(
    "count, dominant, contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10), (32, 27, 5), (576, 576, 0)]
)
def test_split_of_the_budget(count, dominant, contextual):
    assert split(576, count / 576) == (dominant, contextual)
    assert methods.build("visionzip", {"keep": count / 576}).schedule(shape(), 576) == [count] * 32


def test_targets_are_evenly_spaced():
    targets, merged = merge(torch.randn(523, 8), torch.randn(523, 4), 10)
    assert targets.tolist() == list(range(0, 469, 52)) and merged.shape == (10, 8)


def test_a_contextual_token_is_target_plus_mean():
    """Features [1], [2], [10] with keys a, a, b: token 1 joins target 0, target 2 has no member."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    targets, merged = merge(torch.tensor([[1.0], [2.0], [10.0], [4.0]]), torch.cat([keys, keys[:1]]), 2)
    assert targets.tolist() == [0, 2] and merged.tolist() == [[1 + (2 + 4) / 2], [10.0]]


def test_ties_go_to_the_lowest_target():
    targets, merged = merge(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.ones(4, 2), 2)
    assert targets.tolist() == [0, 2] and merged.tolist() == [[1 + 3.0], [3.0]]


def test_cls_goes_first_and_has_an_origin_of_its_own():
    """Sixteen patches, eight tokens: seven dominant (CLS and six patches) and one contextual."""
    assert split(16, 0.5) == (7, 1)
    features = torch.arange(17, dtype=torch.float64)[:, None] * 10
    row = torch.tensor([[0.9] + [0.01] * 16], dtype=torch.float64)
    row[0, 1 + torch.tensor([2, 3, 5, 7, 11, 13])] = 0.2
    tower = vision(features, torch.ones(1, 17, 2, dtype=torch.float64), row)
    result = methods.build("visionzip").reduce(step(3, 16, 2, vision=tower))
    assert result.keep.tolist() == [0, 1, 2, 3, 5, 6, 8, 10, 14, 16, 3, 19, 20]
    assert result.slots.tolist() == [3, 10] and result.added.tolist() == [True, False]
    rest = torch.tensor([1, 4, 6, 8, 9, 10, 12, 14, 15], dtype=torch.float64)
    assert result.values[:, 0].tolist() == pytest.approx([0, 10 + float((rest + 1).mean()) * 10])
