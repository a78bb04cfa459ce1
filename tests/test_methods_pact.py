"""PACT's score, its clusters and the weights they get."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from steps import shape, step

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.methods import MethodError
from pruneval.methods.pact import distances, peaks


def attention(query: Any, key: Any, rotated: Any = None) -> SimpleNamespace:
    """One head; queries and keys without rotary embedding, and the keys with it where they differ."""
    query, key = (torch.as_tensor(part, dtype=torch.float64)[None] for part in (query, key))
    turned = key if rotated is None else torch.as_tensor(rotated, dtype=torch.float64)[None]
    return SimpleNamespace(query=query, key=turned, unrotated=lambda: SimpleNamespace(query=query, key=key))


def reduced(hidden: Any, query: Any, key: Any, **params: Any) -> Any:
    """The reduction of a text token, visual tokens and a text token."""
    hidden = torch.as_tensor(hidden, dtype=torch.float64)
    one = step(1, len(hidden) - 2, 1, 4, hidden=hidden, upcoming=lambda: attention(query, key))
    return methods.build("pact", params).reduce(one)


def turned(*degrees: float) -> list[list[float]]:
    """Unit keys in the plane."""
    return [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees]


def test_the_global_query_ranks_together_with_the_norm():
    """The mean query of the tokens up to the last visual one is (1, 0): it must not see the last text token."""
    query, key = [[2.0, 0], [1, 0], [0, 0], [100, 100]], [[0.0, 0], [math.log(3) * 2**0.5, 0], [0, 5], [9, 9]]
    hidden = torch.tensor([[0.0, 0], [3, 4], [0, 10], [0, 0]]).double()
    one = step(1, 2, 1, 4, hidden=hidden, upcoming=lambda: attention(query, key))
    score = methods.build("pact").score(one)
    torch.testing.assert_close(score, torch.tensor([5 * 3 / 5, 10 * 1 / 5]).double())


def test_keys_at_0_5_and_90_degrees_make_two_clusters():
    distance = distances(torch.tensor(turned(0, 5, 90)).double(), torch.arange(3))
    assert len(peaks(distance, 0.21)) == 2 and 2 in peaks(distance, 0.21)
    assert peaks(distance, 0).tolist() == [0, 1, 2] and len(peaks(distance, 1.1)) == 1


def test_rounds_find_the_centres_of_a_sweep_by_density():
    keys = torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distance = distances(keys, torch.arange(60))
    found = peaks(distance, 0.21)
    density = (-((distance / 2) ** 2)).exp().sum(-1)
    swept: list[int] = []
    for token in torch.sort(density, descending=True, stable=True).indices.tolist():
        if all(distance[token, centre] > 0.21 for centre in swept):
            swept.append(token)
    assert found.tolist() == sorted(swept) and 5 < len(found) < 50
    assert float(distance[:, found].amin(-1).amax()) <= 0.21
    assert float((distance[found][:, found] + 2 * torch.eye(len(found))).amin()) > 0.21


def test_clusters_are_means_with_the_weight_of_their_size():
    hidden = [[0.0], [1], [2], [4], [8], [0]]  # visual: 1, 2, 4, 8, of which 1 has the lowest score and goes
    key = [[0, 0], *turned(0, 5, 90, 20), [0, 0]]
    out = reduced(hidden, torch.zeros(6, 2), key, keep=0.75)
    kept, weights = out.keep.tolist(), out.weights.tolist()
    # 8 (20 degrees) and 2 (5 degrees) are within the cutoff; 4 (90) is alone; 1 (0 degrees) is taken in again
    assert len(kept) == 4 and {0, 3, 5} < set(kept)
    assert weights[kept.index(3)] == 1 and sum(weights[1:-1]) == 4 and weights[0] == weights[-1] == 1
    torch.testing.assert_close(out.values, torch.tensor([[11 / 3]]).double())
    assert weights[int(out.slots)] == 3
    out = reduced(hidden, torch.zeros(6, 2), key, keep=0.75, recover=0)
    assert sum(out.weights[1:-1]) == 3 and out.values.tolist() == [[5.0]]
    assert reduced(hidden, torch.zeros(6, 2), key, keep=0.75, proportional=False).weights is None


def test_identical_keys_make_one_cluster_of_everything():
    out = reduced(torch.ones(22, 1), torch.ones(22, 2), torch.ones(22, 2))
    assert len(out.keep) == 3 and out.weights.tolist() == [1, 20, 1]
    out = reduced(torch.ones(22, 1), torch.ones(22, 2), torch.ones(22, 2), recover=0)
    assert out.weights.tolist() == [1, 11, 1]


def test_far_keys_stay_alone_and_unweighted():
    key = torch.nn.functional.pad(torch.eye(20), (0, 0, 1, 1))
    out = reduced(torch.rand(22, 1) + 1, torch.ones(22, 20), key, cutoff=0)
    assert len(out.keep) == 2 + int(20 * 0.55) and out.weights is None and len(out.slots) == 0


def test_clusters_follow_the_rotated_keys():
    bare, rotary = torch.ones(4, 2), [[0, 0], *turned(0, 90), [0, 0]]
    one = step(1, 2, 1, 4, hidden=torch.ones(4, 1), upcoming=lambda: attention(bare, bare, rotary))
    assert len(methods.build("pact", {"keep": 0.99999}).reduce(one).keep) == 3  # one pruned, 90 degrees off: dropped
    one.upcoming = lambda: attention(bare, bare, bare)
    assert methods.build("pact", {"keep": 0.99999}).reduce(one).weights.tolist() == [1, 2, 1]


def test_boundaries_and_refusals():
    assert list(methods.build("pact").needs(shape())) == [4] == list(methods.build("pact").needs(shape(28)))
    assert list(methods.build("pact").needs(shape(4))) == [2]
    assert methods.build("pact", {"keep": 1}).schedule(shape(), 576) == [576] * 32
    with pytest.raises(MethodError, match="depends on the sample"):
        methods.build("pact").schedule(shape(), 576)
    for params in ({"cutoff": 3}, {"recover": -1}, {"layer": "first"}):
        with pytest.raises(MethodError, match="pact: "):
            methods.build("pact", params)


def test_centres_keep_their_positions_and_weights_add_up():
    model, sample = tiny.shared(), tiny.prompt(5, 7, 1, 1)
    with torch.no_grad(), pruned(model, methods.build("pact", {"cutoff": 0.6})) as session:
        model(**sample)
    tokens = session.trace.entering(2).samples[0]
    assert torch.equal(tokens.position, tokens.origin)
    sizes = tokens.weight[tokens.visual]
    assert 0 < len(sizes) <= 8 and len(sizes) < sizes.sum() <= 16
    assert torch.equal(tokens.made[tokens.visual], sizes > 1)
