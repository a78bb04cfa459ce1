"""CDPruner: the sign, the scale of relevance, and the greedy selection."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.conformance import Case, verdicts
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject
from pruneval.methods.cdpruner import greedy, scaled

FOUR = torch.tensor([[1.0, 0.0], [0.99, 0.14], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


def sample(tokens, cells, texts):
    """One image of tokens (n, d), cells (n, p) in CLIP's space, and the question's segments (m, p)."""
    count = len(tokens)
    tower = vision(torch.cat([torch.zeros(1, cells.shape[1]), cells]), torch.zeros(1, count + 1, 1), torch.zeros(1, 1))
    clip = SimpleNamespace(segments=texts, project=lambda hidden: hidden)
    hidden = torch.cat([torch.zeros(2, tokens.shape[1]), tokens, torch.zeros(1, tokens.shape[1])])
    return step(2, count, 1, hidden=hidden.double(), vision=tower, clip=clip)


def random_tokens(n=12, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return tokens, scaled(torch.randn(n, generator=generator, dtype=torch.float64))


def test_the_cards_example():
    """T = 2: {0, 2}; the third is 1: the plane is used up, and 1 is more relevant than 3."""
    relevance = torch.tensor([1.0, 0.9, 0.5, 0.4], dtype=torch.float64)
    assert greedy(FOUR, relevance, 2).tolist() == [0, 2]
    assert greedy(FOUR, relevance, 3).tolist() == [0, 2, 1]


def test_equal_relevance_is_a_plain_dpp():
    """Parallel and anti-parallel are equally redundant."""
    assert greedy(FOUR, torch.ones(4, dtype=torch.float64), 2).tolist() == [0, 2]
    flipped = FOUR * torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert greedy(flipped, torch.ones(4, dtype=torch.float64), 2).tolist() == [0, 2]


@pytest.mark.parametrize("seed", range(4))
def test_every_pick_makes_the_determinant_largest(seed):
    tokens, relevance = random_tokens(seed=seed)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picked = []
    for _ in range(5):
        gains = {
            i: float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])) for i in range(12) if i not in picked
        }
        picked.append(max(gains, key=gains.get))
    assert greedy(tokens, relevance, 5).tolist() == picked
    assert picked[0] == int(relevance.argmax())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("count", [5, 17, 64])
def test_beyond_the_rank_all_are_distinct(dtype, count):
    """64 tokens in 16 dimensions; the released code repeats some and returns fewer."""
    tokens, relevance = random_tokens(64, 16)
    found = greedy(tokens.to(dtype), relevance.to(dtype), count)
    assert len(found) == len(found.unique()) == count
    assert greedy(torch.zeros(6, 3), torch.ones(6), 4).tolist() == [0, 1, 2, 3]


def test_relevance_runs_from_almost_0_to_1():
    found = scaled(torch.tensor([-3.0, 1.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1e-6 / 8, 0.5, 1.0], dtype=torch.float64), rtol=0, atol=2e-6)
    assert found[0] > 0 and scaled(torch.full((3,), 2.0)).tolist() == [1, 1, 1]


def test_what_clip_finds_least_alike_is_picked_first():
    """Orthogonal tokens: relevance alone decides, and it is the negated cosine, whatever the norms."""
    cells = torch.tensor([[1.0, 0.0], [-9.0, 1.0], [0.0, 0.1], [5.0, 5.0]], dtype=torch.float64)
    one = sample(torch.eye(4), cells, torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    method = methods.build("cdpruner", {"keep": 0.5})
    assert method.reduce(one).keep.tolist() == [0, 1, 3, 4, 6]  # cosines 1, -.99, 0, .71
    upside_down = sample(torch.eye(4), cells, torch.tensor([[-2.0, 0.0]], dtype=torch.float64))
    assert method.reduce(upside_down).keep.tolist() == [0, 1, 2, 5, 6]


def test_segments_of_a_long_question_are_averaged():
    cells = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = methods.build("cdpruner", {"keep": 0.25}).reduce(sample(torch.eye(4), cells, texts))
    assert found.keep.tolist() == [0, 1, 4, 6]  # mean cosines .5, .5, -.5, .7


def test_equal_cells_fall_back_to_diversity():
    one = sample(FOUR, torch.ones(4, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    assert methods.build("cdpruner", {"keep": 0.5}).reduce(one).keep.tolist() == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("preset", methods.method_class("cdpruner").presets)
def test_published_counts(preset):
    method, count = methods.build("cdpruner", methods.method_class("cdpruner").presets[preset]), preset.split("@")[1]
    tiles = 5 if "next" in preset else 1
    assert method.schedule(replace(shape(), whole=((576, 576),) * tiles), 576 * tiles) == [int(count)] * 32
    if "1.5" in preset:
        tokens, _ = random_tokens(576, 64)
        cells, texts = random_tokens(576, 8, 1)[0], random_tokens(1, 8, 2)[0]
        assert len(method.reduce(sample(tokens, cells, texts)).keep) == int(count) + 3


def test_relevance_is_scaled_image_by_image():
    """A second image with extreme cells changes nothing in the first."""
    cells = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    tokens = random_tokens(4, 3)[0]
    method = methods.build("cdpruner", {"keep": 0.5})
    alone = method.reduce(sample(tokens, cells, texts)).keep
    both = sample(tokens.repeat(2, 1), torch.cat([cells, cells * torch.tensor([[-9.0], [1.0], [1.0], [1.0]])]), texts)
    whole = both.vision.hidden(22)[0][1:]
    both.vision.tiles, both.vision.images, both.vision.grids = 2, (1, 1), ((2, 2), (2, 2))
    both.vision.hidden = lambda layer: [torch.nn.functional.pad(part, (0, 0, 1, 0)) for part in whole.split(4)]
    assert method.reduce(both).keep[:4].tolist() == alone[:4].tolist()


def test_another_question_keeps_others():
    tiny = subject("llava")
    model, kept = tiny.model("sdpa"), []
    for question in ("w1 w2", "w77 w150"):
        with torch.no_grad(), pruned(model, methods.build("cdpruner"), adapter=tiny.adapter(model)) as session:
            session.questions = [question]
            model(**tiny.samples[0])
            kept.append(session.trace.entering(3).samples[0].origin.tolist())
    assert kept[0] != kept[1] and len(kept[0]) == len(kept[1])
    assert methods.build("cdpruner", {"keep": 1}).reduce(step(1, 4, 1)) is None


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
def test_the_engines_promises(family):
    found = list(verdicts(Case("cdpruner", subject(family))))
    assert [verdict for verdict in found if verdict.status == "fail"] == []
    assert sum(verdict.status == "pass" for verdict in found) >= 10
