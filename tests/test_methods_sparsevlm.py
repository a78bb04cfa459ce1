"""SparseVLM's counts, raters, clusters and its three versions."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness.attention import HeadAttention
from pruneval.harness.session import pruned
from pruneval.methods import MethodError
from pruneval.methods.sparsevlm import density_peaks, raters


def build(**params: Any) -> Any:
    return methods.build("sparsevlm", params)


def preset(name: str) -> Any:
    cls = methods.method_class("sparsevlm")
    return methods.build("sparsevlm", cls.presets[f"llava-1.5-7b@{name}"])


@pytest.mark.parametrize(
    "budget, counts, clusters, average",
    [
        (192, (309, 204, 113), (9, 4, 3), 206.5),
        (128, (312, 117, 39), (9, 7, 3), 145.4),
        (96, (249, 55, 27), (11, 7, 1), 114.1),
        (64, (82, 32, 18), (16, 2, 1), 82.3),
    ],
)
def test_published_counts_with_recycled_tokens(budget, counts, clusters, average):
    method = preset(str(budget))
    first, second, third = counts
    declared = method.schedule(shape(), 576)
    assert declared == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16
    assert sum(declared) / 32 == pytest.approx(average, abs=0.05)
    assert tuple(after - kept for after, kept in zip(counts, method.listed(576), strict=True)) == clusters


@pytest.mark.parametrize(
    "budget, counts", [(192, (300, 200, 118)), (128, (238, 108, 60)), (96, (246, 54, 28)), (64, (66, 34, 20))]
)
def test_published_counts_of_version_two(budget, counts):
    first, second, third = counts
    declared = preset(f"{budget}/2.0").schedule(shape(), 576)
    assert declared == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16


def test_layers_scale_with_depth_and_counts_with_the_image():
    assert list(build().needs(shape())) == [3, 7, 16] and list(build(version="1.0").needs(shape())) == [3, 7, 16, 20]
    assert [layer - 1 for layer in build(version="1.0").needs(shape(28))] == [2, 5, 13, 17]  # LLaVA-OneVision-7B
    assert list(build().needs(shape(4))) == [1, 2, 3]
    assert build(keep=192 / 576).listed(1152) == (600, 400, 220)
    assert build(keep=0.001).listed(576) == (1, 1, 1)
    between = build(keep=160 / 576).listed(576)
    assert between == (302, 155, 73)  # halfway between the lists of 192 and 128
    assert build(keep=1).schedule(shape(), 576) == [576] * 32


def test_raters_are_more_relevant_than_average_or_all():
    visual = torch.tensor([[1.0, 0], [0.5, 0]])
    assert raters(visual, torch.tensor([[3.0, 0], [0, 9], [2.9, 0], [-1, 0]])).tolist() == [True, False, True, False]
    assert raters(visual, torch.ones(3, 2)).all()


def test_density_peaks_by_hand():
    """Points 0, 1, 2 and 10 on a line, two clusters; 0 and 1 tie with 2 (each has a neighbour at distance 1)."""
    centres, member = density_peaks(torch.tensor([[0.0], [1], [2], [10]]).double(), 2)
    # densities exp(-1/2) three times and exp(-32); gaps 10 (the densest), 1, 1 and 8
    assert centres.tolist() == [0, 1] and member.tolist() == [0, 1, 1, 1]
    centres, member = density_peaks(torch.tensor([[0.0], [1], [10], [11]]).double(), 2)
    assert centres.tolist() == [0, 2] and member.tolist() == [0, 0, 1, 1]
    centres, member = density_peaks(torch.rand(5, 3), 1)
    assert centres.tolist() == [0] and member.tolist() == [0] * 5


def test_pruned_tokens_come_back_as_clusters_behind_the_image():
    """20 visual tokens at keep .1: 2 stay, the 6 best of the other 18 make one token."""
    score = torch.tensor([0, *range(20, 0, -1), 0, 0]).double() / 100
    hidden = torch.arange(23).double()[:, None]
    for recycle, value in (("mean", 5.5), ("sum", 33.0)):
        one = step(1, 20, 2, 3, hidden=hidden, embeddings=torch.ones(23, 1), seen={2: Rows(score[None])})
        method = build(recycle=recycle, keep=64 / 576)
        assert method.listed(20)[0] == 2 and method.recycled(18) == (6, 1)
        out = method.reduce(one)
        assert out.keep.tolist() == [0, 1, 2, 3, 21, 22] and out.slots.tolist() == [3]
        assert out.values.tolist() == [[value]] and out.added is None
    assert build(recycle="none", keep=64 / 576).reduce(one).keep.tolist() == [0, 1, 2, 21, 22]


def test_only_raters_vote_and_they_stay_the_same():
    rows = torch.zeros(1, 6, 6).double()
    rows[0, 4, 1:4] = torch.tensor([0.1, 0.2, 0.7])
    rows[0, 5, 1:4] = torch.tensor([0.9, 0.05, 0.05])
    embeddings = torch.tensor([[0.0], [1], [1], [1], [5], [-5]])  # token 4 is the rater
    one = step(1, 3, 2, 3, embeddings=embeddings, seen={2: Rows(rows)})
    assert build(recycle="none", keep=64 / 576).reduce(one).keep.tolist() == [0, 3, 4, 5]
    later = step(1, 3, 2, 7, embeddings=-embeddings, seen={6: Rows(rows)}, memory=one.memory)
    assert build(recycle="none", keep=64 / 576).reduce(later).keep.tolist() == [0, 3, 4, 5]


def test_version_one_keeps_by_rank():
    seen = torch.zeros(1, 10, 10).double()
    seen[0, 8, 1:8] = torch.arange(7).double()
    seen[0, 9, 1:8] = torch.tensor([0.0, 0, 0, 0, 0, 0, 1])
    one = step(1, 7, 2, 3, embeddings=torch.ones(10, 1), seen={2: Rows(seen)})
    method = build(version="1.0", scale=1.5, offset=1.0, recycle="none")
    assert method.reduce(one).keep.tolist() == [0, 4, 5, 6, 7, 8, 9]  # rank 2: int(2 * 1.5 + 1) = 4
    assert len(build(version="1.0", recycle="none").reduce(one).keep) == 9  # int(27) is capped at one less than all
    full = step(1, 2, 2, 3, embeddings=torch.ones(5, 1), seen={2: Rows(torch.eye(5)[None].roll(2, 1))})
    assert method.reduce(full) is None  # rank 2 of 2 visual tokens
    with pytest.raises(MethodError, match="depends on the sample"):
        method.schedule(shape(), 576)


def llama(n: int, theta: float = 1e4, heads: int = 2) -> HeadAttention:
    """Attention of equal queries and keys of a head of 128, at positions 0..n-1."""
    angle = torch.arange(n)[:, None] * theta ** (-torch.arange(0, 128, 2).double() / 128)[None].repeat(1, 2)
    query = torch.zeros(heads, n, 128, dtype=torch.float64)
    return HeadAttention(query, query, query, 128**-0.5, True, rotation=(angle.cos(), angle.sin()))


def gravity(distance: int, theta: float = 1e4) -> float:
    """A uniform row over what version 2.0 makes of it, at this distance."""
    n = distance + 2
    one = step(0, n - 1, 1, 3, seen={2: llama(n, theta)}, embeddings=torch.ones(n, 1))
    return float(1 / n / build(version="2.0")._corrected(one, torch.tensor([n - 1]))[0, n - 1 - distance])


def test_gravity_falls_with_distance_and_changes_sign():
    assert gravity(0) == pytest.approx(128**0.5) and gravity(600) == pytest.approx(2.35, abs=0.01)
    assert gravity(1706) > 0 > gravity(1707)
    assert gravity(4000, 1e6) > 2.2


def test_version_two_listens_to_the_heads_that_look_at_the_image():
    attention = llama(6, heads=3)
    attention.rows = lambda index: torch.tensor(
        [[[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]], [[0, 0.1, 0.2, 0.6, 0, 0.1]], [[0, 0.5, 0.1, 0.1, 0.1, 0.2]]]
    ).double()
    one = step(1, 4, 1, 3, seen={2: attention}, embeddings=torch.ones(6, 1))
    assert len(build(version="2.0", heads=14)._corrected(one, torch.tensor([5]))) == 3
    received = build(version="2.0", heads=2)._corrected(one, torch.tensor([5]))
    assert (received[0] != 0).sum() == 4 and (received[1] != 0).sum() == 5  # heads 1 and 2
    assert build(version="2.0", heads=1, keep=64 / 576).reduce(one).keep.tolist() in ([0, 3, 5], [0, 1, 5])


@pytest.mark.parametrize("version", ["1.0", "1.5", "2.0"])
def test_order_positions_and_full_first_cache(version):
    model, sample = tiny.shared(), tiny.prompt(3, 4, 2, 2)
    params = {"scale": 0.8} if version == "1.0" else {}
    with torch.no_grad(), pruned(model, build(version=version, **params)) as session:
        model(**sample)
    end = int((sample["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
    assert len(session.trace.entering(0).samples[0]) == sample["input_ids"].shape[1]
    for layer in (1, 2, 3):
        tokens = session.trace.entering(layer).samples[0]
        visual = tokens.origin[tokens.visual]
        made = tokens.made[tokens.visual]
        first = int(made.int().argmax()) if bool(made.any()) else len(made)
        assert torch.equal(visual[:first], visual[:first].sort().values) and len(visual) < 32
        assert made[first:].all() and bool(made.any()) == (version != "2.0")
        after = tokens.origin[int(tokens.visual.nonzero()[-1]) + 1 :]
        assert (after > (end if version != "2.0" else int(visual[-1]))).all()
        assert torch.equal(tokens.position, tokens.origin if version == "2.0" else torch.arange(len(tokens)))


def test_work_counts_the_rows_of_all_raters():
    work = preset("192").work(shape(), 576, 40)
    assert work["raters"] == 576 * 40 * 4096
    assert [work[f"rows of layer {layer}"] for layer in (2, 6, 15)] == [4096 * 40 * (n + 40) for n in (576, 309, 204)]
    best = [int(0.3 * pruned) + 1 for pruned in (276, 109, 94)]
    assert [work[f"distances after layer {layer}"] for layer in (2, 6, 15)] == [m * m * 4096 for m in best]
    assert preset("192/2.0").work(shape(), 576, 40)["distances after layer 2"] == 0
    assert preset("64/1.0").work(shape(), 576, 40)["rows of layer 19"] == 4096 * 40 * 616


@pytest.mark.parametrize(
    "params, message",
    [
        ({"version": "3"}, "version must be"),
        ({"recycle": "all"}, "recycle must be"),
        ({"version": "1.0", "keep": 0.5}, "has no keep"),
        ({"layers": "2,6"}, "layers must be"),
        ({"layers": "6,2,15"}, "layers must be"),
        ({"heads": 0}, "must be positive"),
    ],
)
def test_parameters_are_checked(params, message):
    with pytest.raises(MethodError, match=message):
        build(**params)
