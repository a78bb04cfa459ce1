"""DivPrune: the order of its picks, what its distance sees, duplicates and several images."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from steps import shape, step

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.divprune import max_min

CARD = torch.tensor([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0], [-1.0, 0.0]])


def distances(tokens):
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    return 1 - unit @ unit.T


def naive(tokens, count):
    """The paper's greedy algorithm, word for word: minima over all picked tokens at every step."""
    distance = distances(tokens)
    picked = [int(distance.sort(0).values[1].argmax())]
    while len(picked) < count:
        nearest = distance[picked].amin(0)
        nearest[picked] = -1
        picked.append(int(nearest.argmax()))
    return picked


def test_the_example_of_the_card():
    distance = distances(CARD)
    found = [float(distance[pair]) for pair in ((0, 1), (0, 3), (1, 3), (1, 2))]
    assert found == pytest.approx([0.0099, 2, 1.9901, 0.86], abs=1e-4)
    assert max_min(CARD, 3).tolist() == [3, 0, 2]


def test_order_is_kept_and_text_stays():
    hidden = torch.cat([torch.ones(2, 2), CARD, torch.ones(1, 2)])
    for keep, left in ((0.75, [0, 1, 2, 4, 5, 6]), (0.5, [0, 1, 2, 5, 6])):
        assert methods.build("divprune", {"keep": keep}).reduce(step(2, 4, 1, hidden=hidden)).keep.tolist() == left


@pytest.mark.parametrize("seed", range(4))
def test_a_running_minimum_picks_as_the_naive_algorithm(seed):
    tokens = torch.randn(60, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert max_min(tokens, 25).tolist() == naive(tokens, 25)


def test_sizes_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    scaled = tokens * (torch.rand(40, 1, generator=generator, dtype=torch.float64) + 0.1)
    assert torch.equal(max_min(tokens, 20), max_min(scaled, 20))


def test_copies_come_last_and_nothing_is_picked_twice():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(8, 6, generator=generator).repeat_interleave(2, 0)
    picked = max_min(tokens, 16).tolist()
    assert sorted(index // 2 for index in picked[:8]) == list(range(8)) and sorted(picked) == list(range(16))
    assert sorted(max_min(torch.ones(5, 3, dtype=torch.bfloat16), 5).tolist()) == list(range(5))


def test_each_others_nearest_are_a_tie():
    """Two far from the rest but not from each other: the first of them is picked, however rounding falls."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        turned = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0].float()
        close = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [1.0, 0.0, 0.01], [0.0, 1.0, 0.5], [0.0, 1.0, -0.5]])
        assert int(max_min(close @ turned, 1)) == 3


def test_the_smallest_distance_never_grows():
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    distance, picked = distances(tokens).fill_diagonal_(9), max_min(tokens, 50)
    smallest = [float(distance[picked[:count]][:, picked[:count]].min()) for count in range(2, 51)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(smallest))


def test_blocks_of_rows_do_not_change_the_first_pick(monkeypatch):
    tokens = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    first = max_min(tokens, 5)
    monkeypatch.setattr("pruneval.methods.divprune.BLOCK", 7)
    assert torch.equal(max_min(tokens, 5), first)


def test_images_share_the_budget_unless_they_are_one_set():
    """An image of three copies and one of three different tokens; a token of text between them."""
    one = torch.tensor([[1.0, 0, 0]]).expand(3, 3)
    hidden = torch.cat([one, torch.zeros(1, 3), torch.eye(3), torch.zeros(1, 3)])
    two = dataclasses.replace(
        step(0, 3, 5, hidden=hidden), visual=torch.tensor([0, 1, 2, 4, 5, 6]), spans=((0, 3), (4, 7)), total=6
    )
    single = methods.build("divprune", {"keep": 4 / 6}).reduce(two)
    assert single.keep.tolist() == [0, 1, 3, 4, 5, 7]
    joint = methods.build("divprune", {"keep": 0.5, "scope": "prompt"}).reduce(two)
    assert joint.keep.tolist() == [0, 3, 5, 6, 7]
    with pytest.raises(MethodError, match="divprune: scope must be image or prompt, not 'all'"):
        methods.build("divprune", {"scope": "all"})


@pytest.mark.parametrize(
    "preset, n, count",
    [
        ("llava-1.5-7b@56", 576, 56),
        *((f"llava-1.5-7b@{count}", 576, count) for count in (192, 128, 64, 32)),
        *((f"llava-next-7b@{count}", 2880, count) for count in (640, 320, 160)),
        ("llava-next-video-7b@115", 1152, 115),
    ],
)
def test_published_counts(preset, n, count):
    method = methods.build("divprune", methods.method_class("divprune").presets[preset])
    assert method.schedule(shape(), n) == [count] * 32


def test_the_cosines_are_priced():
    assert methods.build("divprune", {"keep": 0.5}).work(shape(), 100, 5) == {"cosines of visual tokens": 15000 * 4096}
