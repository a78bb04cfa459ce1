"""VisionZip's split, its merge, and what goes to the language model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from steps import shape, step, vision

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods.salience import spread
from pruneval.methods.visionzip import among, merge


@pytest.mark.parametrize("count, dominant, contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10), (32, 27, 5)])
def test_split_of_the_budget(count, dominant, contextual):
    assert (count - among(count), among(count)) == (dominant, contextual)
    assert methods.build("visionzip", {"keep": count / 576}).schedule(shape(), 576) == [count] * 32


@pytest.mark.parametrize("total", [640, 320, 160])
def test_presets_of_llava_next(total):
    method = methods.build("visionzip", methods.method_class("visionzip").presets[f"llava-next-7b@{total}"])
    assert method.per_tile == total // 5 and among(total // 5) == {640: 20, 320: 10, 160: 5}[total]
    assert method.schedule(replace(shape(), whole=((576, 576),) * 5), 2880) == [total] * 32


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
    assert among(8) == 1
    features = torch.arange(17, dtype=torch.float64)[:, None] * 10
    row = torch.tensor([[0.9] + [0.01] * 16], dtype=torch.float64)
    row[0, 1 + torch.tensor([2, 3, 5, 7, 11, 13])] = 0.2
    tower = vision(features, torch.ones(1, 17, 2, dtype=torch.float64), row)
    result = methods.build("visionzip").reduce(step(3, 16, 2, vision=tower))
    assert result.keep.tolist() == [0, 1, 2, 3, 5, 6, 8, 10, 14, 16, 3, 19, 20]
    assert result.slots.tolist() == [3, 10] and result.added.tolist() == [True, False]
    rest = torch.tensor([1, 4, 6, 8, 9, 10, 12, 14, 15], dtype=torch.float64)
    assert result.values[:, 0].tolist() == pytest.approx([0, 10 + float((rest + 1).mean()) * 10])


def kept(family, number, **params):
    """What enters the language model, what the step before it showed, and the reduction."""
    sample, seen, kind = subject(family).samples[number], [], methods.method_class("visionzip")

    def reduce(self, one):
        seen.extend([one, kind.reduce(self, one)])
        return seen[1]

    with torch.no_grad(), pruned(tiny(family), type("Spy", (kind,), {"reduce": reduce})(**params)) as session:
        tiny(family)(**sample)
    return session.trace.entering(0).samples[0], *seen


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_blocks_of_cells_are_zipped_whole(family):
    """Scores and keys are means over a block; its contextual feature is merged cell by cell and then projected."""
    tokens, step, found = kept(family, 0, keep=0.5)
    view, layer, cls = step.vision, step.shape.feature_layer, int(step.shape.has_cls)
    assert tokens.origin.tolist() == tokens.origin.sort().values.tolist() and found.added.sum() == 0
    sizes = [rows * columns for rows, columns in view.grids]
    shares, first, values = spread(round(0.5 * step.total), sizes), 0, iter(found.values)
    assert len(tokens) - len(step.text) == sum(shares) == round(0.5 * step.total)
    for tile, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        attention = view.attention(layer)[tile]
        cells = attention.rows(0)[:, 0, 1:].mean(0) if cls else attention.received().mean(0)
        score = view.blocks(cells).mean(1)
        keys = view.blocks(attention.key.mean(0)[cls:]).mean(1)
        dominant = share - max(1, round(share * 10 / 64))
        best = score.argsort(descending=True)[:dominant].sort().values
        rest = torch.tensor([token for token in range(size) if token not in best.tolist()])
        features = view.blocks(view.hidden(layer)[tile][cls:])[rest]
        targets, merged = merge(features.flatten(1), keys[rest], share - dominant)
        mine = (step.origin[step.visual[first : first + size]]).tolist()
        assert [mine.index(origin) for origin in tokens.origin.tolist() if origin in mine] == sorted(
            [*best.tolist(), *rest[targets].tolist()]
        )
        for value in view.project(merged):
            torch.testing.assert_close(next(values), value)
        first += size
    assert next(values, None) is None


def test_a_frame_of_video_llava_keeps_the_cls_token_it_has():
    """Frames of 1 + 16 tokens, four of them: seven stay of each, the CLS token, five cells and one contextual."""
    tokens, step, found = kept("video_llava", 1, keep=28 / 68)
    frames = step.visual.unflatten(0, (4, 17))
    assert found.added.sum() == 0 and int(tokens.visual.sum()) == 28
    for frame in frames:
        mine = tokens.origin[torch.isin(tokens.origin, frame)]
        assert len(mine) == 7 and bool((mine == frame[0]).any())
    cls = torch.isin(tokens.origin, frames[:, 0])
    assert not bool(tokens.made[cls].any()) and int(tokens.made.sum()) == 4


def test_an_image_of_video_llava_is_given_one():
    tokens, step, found = kept("video_llava", 0, keep=0.5)
    assert found.added.tolist() == [True, False] and int(tokens.visual.sum()) == 8
    cls = step.vision.hidden(step.shape.feature_layer)[0][:1]
    torch.testing.assert_close(found.values[:1], step.vision.project(cls))


def test_images_share_the_budget():
    """Thirteen of two times sixteen: seven and six; each with its own CLS token."""
    tokens, _, found = kept("llava", 1, keep=0.4)
    assert int(tokens.visual.sum()) == 13 and found.added.tolist() == [True, False] * 2
