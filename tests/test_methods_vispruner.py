"""VisPruner: rounds of deletion, and what is left when all of it is attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.methods import MethodError
from pruneval.methods.vispruner import distinct


def tower(features, score):
    """A tile whose CLS token attends to its cells with `score`."""
    row = torch.cat([1 - score.sum(0, True), score])[None].double()
    features = torch.cat([torch.zeros_like(features[:1]), features])
    return vision(features, torch.zeros(1, len(row[0]), 2), row)


def run(count, features, score, important=0.5):
    method = methods.build("vispruner", {"keep": count / len(score), "important": important})
    result = method.reduce(step(0, len(score), 1, vision=tower(features, score)))
    return list(range(len(score))) if result is None else result.keep[:-1].tolist()


FALLING = torch.tensor([0.3, 0.2, 0.1, 0.05, 0.04, 0.03])


def test_the_even_side_goes():
    """Ranked 0..5, four stay: 0 and 1 by attention; of 2, 3, 4, 5 both even places go."""
    assert run(4, torch.randn(6, 3), FALLING) == [0, 1, 3, 5]


def test_the_most_similar_of_the_even_side_goes():
    """Five stay, so one goes: 2 resembles 3, 4 resembles nothing."""
    features = torch.eye(6)
    features[3] = torch.tensor([0, 0, 0.95, (1 - 0.95**2) ** 0.5, 0, 0])
    features[4, 5] = 0.1
    assert run(5, features, FALLING) == [0, 1, 3, 4, 5]
    features[2, 2], features[2, 0], features[5, 4] = 0.0, 1.0, 5.0
    assert run(5, features, FALLING) == [0, 1, 2, 3, 5]


def test_rounds_follow_the_order_of_similarity():
    """Eight go at once; then the even ones left stand first, the most similar ahead."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 5, generator=generator, dtype=torch.float64), dim=-1)
    left = list(range(40))
    while len(left) > 11:
        even, odd = left[::2], left[1::2]
        closest = {a: max(float(features[a] @ features[b]) for b in odd) for a in even}
        ranked = sorted(even, key=lambda a: -closest[a])
        left = ranked[min(8, len(left) - 11, len(even)) :] + odd
    assert distinct(features, torch.arange(40), 11).tolist() == left


@pytest.mark.parametrize("important", [0.0, 0.5, 0.75, 1.0])
def test_the_count_is_exact(important):
    """Odd remainders and tiny budgets too."""
    generator = torch.Generator().manual_seed(1)
    features, score = torch.randn(25, 4, generator=generator), torch.rand(25, generator=generator) / 50
    for count in range(1, 26):
        chosen = run(count, features, score, important)
        assert len(chosen) == len(set(chosen)) == count


def test_all_important_is_fastervlm():
    generator = torch.Generator().manual_seed(2)
    features, score = torch.randn(36, 4, generator=generator), torch.rand(36, generator=generator) / 50
    one = step(0, 36, 1, vision=tower(features, score))
    other = methods.build("fastervlm", {"keep": 0.3}).reduce(one).keep
    assert torch.equal(methods.build("vispruner", {"keep": 0.3, "important": 1}).reduce(one).keep, other)
    assert not torch.equal(methods.build("vispruner", {"keep": 0.3}).reduce(one).keep, other)


def test_copies_of_important_tokens_are_not_looked_for():
    """3 is 0 again and stays: among the rest it resembles nothing."""
    features = torch.eye(6)
    features[3] = features[0]
    features[4] = features[5] + 0.1 * features[2]
    assert 3 in run(5, features, FALLING)


@pytest.mark.parametrize(
    "model, n, counts", [("llava-1.5-7b", 576, (192, 128, 64, 32)), ("llava-next-7b", 2880, (640, 320, 160))]
)
def test_published_counts(model, n, counts):
    for count in counts:
        method = methods.build("vispruner", methods.method_class("vispruner").presets[f"{model}@{count}"])
        assert method.schedule(replace(shape(), whole=((576, 576),) * (n // 576)), n) == [count] * 32


def test_important_is_a_share():
    with pytest.raises(MethodError, match=r"vispruner: important must be in \[0, 1\], not 2"):
        methods.build("vispruner", {"important": 2})
