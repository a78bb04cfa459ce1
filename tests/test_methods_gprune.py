"""G-Prune: the worked graph, its limits, counts per graph, newlines."""

from __future__ import annotations

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError


def one(tokens):
    """A sample of one tile whose projected tokens are given, (n, d), and one token of text."""
    tokens = torch.as_tensor(tokens, dtype=torch.float64)
    n, d = tokens.shape
    view = vision(torch.zeros(n + 1, 1), torch.zeros(1, n + 1, 1), torch.zeros(1, n + 1))
    return step(0, n, 1, vision=view, hidden=torch.cat([tokens, tokens.new_zeros(1, d)]))


WORKED = [[2.0, 0.0], [1.9, 0.2], [0.0, 1.0]]


def test_the_worked_graph():
    """Links 2, 2, 1: the isolated token ranks first, the two others tie."""
    method = methods.build("gprune", {"keep": 2 / 3})
    score = method.score(one(WORKED))
    assert score.tolist() == pytest.approx([0.9776, 0.9776, 1.0], abs=5e-5)
    assert method.reduce(one(WORKED)).keep.tolist() == [0, 2, 3]


def test_isolated_tokens_rank_by_norm():
    tokens = torch.diag(torch.tensor([3.0, 1.0, 4.0, 2.0]))
    assert methods.build("gprune").score(one(tokens)).tolist() == pytest.approx([3, 1, 4, 2])
    assert methods.build("gprune").reduce(one(tokens)).keep.tolist() == [0, 2, 4]


def test_equal_tokens_share_and_the_first_stay():
    found = methods.build("gprune").score(one([[3.0, 4.0]] * 8))
    assert found.tolist() == pytest.approx([5 / 8] * 8)
    assert methods.build("gprune").reduce(one([[3.0, 4.0]] * 8)).keep.tolist() == [0, 1, 2, 3, 8]


def test_what_is_at_the_threshold_is_linked():
    """A cosine of exactly .5 links, one just below does not."""
    tokens = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    graph = methods.build("gprune", {"iterations": 0})
    assert graph.mass(tokens).tolist() == [1 / 2, 1 / 3, 1 / 2]
    assert methods.build("gprune", {"iterations": 0, "similarity": 0.5001}).mass(tokens).tolist() == [1, 1, 1]


def test_rounds_are_a_matrix_power_and_keep_the_sum():
    tokens = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    flow = torch.where(cosine >= 0.5, (cosine / 0.03).exp(), 0)
    flow = torch.linalg.matrix_power(flow / flow.sum(1, keepdim=True), 5)
    torch.testing.assert_close(flow.sum(1), torch.ones(12, dtype=torch.float64))
    links = (cosine >= 0.5).sum(1)
    found = methods.build("gprune").mass(tokens)
    torch.testing.assert_close(found, tokens.norm(dim=1) @ flow / links)
    torch.testing.assert_close((found * links).sum(), tokens.norm(dim=1).sum())


def test_half_precision_is_scored_in_float32():
    tokens = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    sample = one(tokens)
    sample.hidden = sample.hidden.to(torch.float16)
    score = methods.build("gprune").score(sample)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, methods.build("gprune").mass(tokens.half().float()))


@pytest.mark.parametrize("count", [192, 128, 64])
def test_counts_of_one_tile(count):
    method = methods.build("gprune", {"keep": count / 576})
    assert method.schedule(shape(), 576) == [count] * 32
    tokens = torch.randn(576, 8, generator=torch.Generator().manual_seed(0))
    assert len(method.reduce(one(tokens)).keep) == count + 1


def kept(params, family, number=0):
    """Numbers of the visual tokens that stay, and the step."""
    sample, seen, kind = subject(family).samples[number], [], methods.method_class("gprune")
    spy = type("Spy", (kind,), {"reduce": lambda self, at: seen.append(at) or kind.reduce(self, at)})
    with torch.no_grad(), pruned(tiny(family), spy(**params)) as session:
        tiny(family)(**sample)
    stays = torch.isin(seen[0].origin[seen[0].visual], session.trace.entering(0).samples[0].origin)
    return stays.nonzero().squeeze(-1), seen[0]


def test_base_and_crops_are_two_graphs_and_newlines_stay():
    chosen, at = kept({"keep": 0.3}, "llava_next")
    newline, sheet = at.vision.is_newline(), at.vision.sheet_of()
    assert torch.equal(chosen[newline[chosen]], newline.nonzero().squeeze(-1)) and int(newline.sum()) > 0
    for graph in range(2):
        cells = (~newline & (sheet == graph)).nonzero().squeeze(-1)
        assert int(torch.isin(cells, chosen).sum()) == int(0.3 * len(cells))
        alone = methods.build("gprune").mass(at.hidden[at.visual[cells]])
        torch.testing.assert_close(methods.build("gprune").score(at)[cells], alone)


def test_newlines_may_go():
    chosen, at = kept({"keep": 0.3, "newline": "drop"}, "llava_next")
    assert len(chosen) == round(0.3 * at.total) and not bool(at.vision.is_newline()[chosen].any())
    assert methods.build("gprune", {"keep": 0.3, "newline": "drop"}).schedule(at.shape, at.total)[0] == len(chosen)
    with pytest.raises(MethodError, match="depends on the rows"):
        methods.build("gprune").schedule(at.shape, at.total)


def test_graphs_of_tiles_and_frames():
    """InternVL: the thumbnail and the rest; Qwen: an image; a video: one for each frame."""
    sizes = [
        [len(graph) for graph in methods.build("gprune").graphs(kept({"keep": 0.5}, family, number)[1])]
        for family, number in (("internvl", 0), ("qwen2_5_vl", 0), ("qwen2_5_vl", 2), ("video_llava", 1))
    ]
    assert sizes == [[8, 4], [24], [8, 8], [16] * 4]


@pytest.mark.parametrize(
    "params, message",
    [
        ({"newline": "some"}, "newline must be keep or drop, not 'some'"),
        ({"similarity": 2}, "similarity is a cosine, between -1 and 1, not 2"),
        ({"temperature": 0}, "temperature must be above 0, and iterations not negative"),
        ({"iterations": -1}, "temperature must be above 0, and iterations not negative"),
    ],
)
def test_wrong_parameters(params, message):
    with pytest.raises(MethodError, match=message):
        methods.build("gprune", params)


@pytest.mark.parametrize("keep, count", [(0.5, 8), (0.3, 4), (0.99, 15), (0.01, 1), (3 / 16, 3), (1, 16)])
def test_counts_are_rounded_down(keep, count):
    """int(.3 * 16) = 4, where the nearest is 5; whole products stay whole."""
    method = methods.build("gprune", {"keep": keep})
    found = method.reduce(one(torch.eye(16)))
    assert method.schedule(shape(), 16) == [count] * 32
    assert (17 if found is None else len(found.keep)) == count + 1
