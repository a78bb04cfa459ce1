"""What is drawn over an image, and what analysis says, on tiny models and hand-made traces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from pruneval.harness import analyze, subjects
from pruneval.harness.errors import UserError
from pruneval.harness.layout import Layout, Tokens, Trace
from pruneval.harness.looking import Places, Received
from pruneval.harness.session import pruned
from pruneval.harness.show import _record, stages
from pruneval.reports import patches


def tokens(origin, visual, made=()):
    return Tokens(
        torch.tensor(origin),
        torch.tensor([one in visual for one in origin]),
        torch.tensor([one in made for one in origin]),
        torch.arange(len(origin)),
    )


def test_stages_say_what_is_kept_merged_dropped_and_new():
    prompt = tokens(range(8), {2, 3, 4, 5})
    trace = Trace(Layout(0, (prompt,)), layers=4)
    trace.layouts += [
        Layout(1, (tokens([0, 1, 2, 4, 5, 6, 7], {2, 4, 5}, {4}),)),
        Layout(3, (tokens([0, 1, 5, 9, 6, 7], {5, 9}, {9}),)),
    ]
    first, second = stages(trace)
    assert (first.title, list(first.state)) == ("before layer 1", [1, 0, 2, 1])
    assert (second.title, list(second.state)) == ("before layer 3 (and 1 new)", [0, 0, 0, 1])


def test_overlap_is_jaccards():
    one, other = np.array([1, 2, 0, 0]), np.array([1, 0, 1, 0])
    assert patches.jaccard(one, other) == pytest.approx(1 / 3)
    assert patches.jaccard(one, one) == 1.0 and patches.jaccard(np.zeros(4), np.zeros(4)) == 1.0


def test_tiles_stand_side_by_side_and_boxes_follow_them():
    tiles = [np.full((4, 4, 3), shade) for shade in (0.0, 0.5, 1.0)]
    boxes = np.array([[0, 0, 0, 0.5, 0.5], [1, 0.5, 0.5, 1, 1], [2, 0, 0, 1, 1], [np.nan] * 5])
    on = patches.canvas(tiles, boxes)
    for (top, left, bottom, right), shade in zip(on.boxes[:3], (0.0, 0.5, 1.0), strict=True):
        assert (on.picture[top:bottom, left:right] == shade).all()
    assert list(on.boxes[3]) == [-1] * 4
    assert on.boxes[0][2] - on.boxes[0][0] == patches.SIDE // 2


def test_a_picture_veils_what_is_dropped_and_tints_what_is_merged():
    on = patches.canvas([np.ones((8, 8, 3))], np.array([[0, 0, 0, 0.5, 1], [0, 0.5, 0, 0.75, 1], [0, 0.75, 0, 1, 1]]))
    stage = patches.Stage("before layer 2", np.array([1, 2, 0]))
    figure = patches.draw(on, [patches.Shown("fastv", "a", (stage,))], "What?", "b", "c")
    veil = figure.axes[1].images[1].get_array()
    assert veil[0, 0, 3] == 0
    assert tuple(veil[on.boxes[1][0], 0]) == pytest.approx(patches.TINTS[patches.MERGED])
    assert tuple(veil[on.boxes[2][0], 0]) == pytest.approx(patches.VEIL)
    assert figure.axes[1].get_title() == "before layer 2\n2 of 3, 1 merged (orange)"
    both = patches.draw(on, [patches.Shown("x", "a", (stage,)), patches.Shown("y", "a", ())], "What?")
    assert any(axes.get_title().startswith("in the end: Jaccard 0.67") for axes in both.axes)


# On tiny models of every family ---------------------------------------------------------------------------------------


def looked(family, probe, prompt=0):
    model = subjects.tiny(family)
    inputs = subjects.subject(family).samples[prompt]
    with pruned(model, probe, adapter=subjects.adapter(model)), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return probe.seen[0]


@pytest.mark.parametrize("family", list(subjects.FAMILIES))
def test_every_visual_token_has_its_own_place(family):
    boxes = looked(family, Places(pixels=False))["boxes"]
    placed = boxes[~np.isnan(boxes[:, 0])]
    assert len(placed) >= 0.7 * len(boxes)  # the rest are newlines
    assert len(np.unique(placed.round(4), axis=0)) == len(placed)
    assert (placed[:, 3:] > placed[:, 1:3]).all() and placed[:, 1:].min() >= 0 and placed[:, 1:].max() < 1.3


def test_places_of_a_plain_image_are_its_grid():
    boxes = looked("llava", Places(pixels=False))["boxes"]
    row, column = np.divmod(np.arange(16), 4)
    expected = np.stack([0 * row, row / 4, column / 4, (row + 1) / 4, (column + 1) / 4], axis=1)
    assert boxes == pytest.approx(expected)


def test_places_of_merged_cells_are_their_blocks():
    boxes = looked("internvl", Places(pixels=False))["boxes"]
    assert list(boxes[:, 0]) == [0] * 4 + [1] * 4 + [2] * 4
    assert boxes[:4, 1:] == pytest.approx(
        np.array([[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]])
    )


def test_received_attention_is_that_of_the_text_behind_the_image():
    seen = looked("llava", Received())
    assert sorted(seen) == [0, 1, 2, 3] and all(one.shape == (4, 16) for one in seen.values())
    model = subjects.tiny("llava", "eager")
    inputs = subjects.subject("llava").samples[0]
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions
    visual = (inputs["input_ids"][0] == subjects.IMAGE).nonzero().squeeze(-1)
    behind = slice(int(visual[-1]) + 1, None)
    for layer, one in seen.items():
        assert one.numpy() == pytest.approx(maps[layer][0][:, behind][..., visual].mean(dim=1).numpy(), abs=1e-6)


# Analysis -------------------------------------------------------------------------------------------------------------


def test_analysis_is_scipys_tau_and_numpys_quartiles():
    draw = np.random.default_rng(0)
    seen = [draw.random((3, 20)), draw.random((3, 30))]
    found = analyze.analysis(seen)
    expected = np.mean([kendalltau(one[0], one[2]).statistic for one in seen])
    assert found.tau[0, 2] == found.tau[2, 0] == pytest.approx(expected)
    assert np.diagonal(found.tau) == pytest.approx(1.0)
    assert list(found.tokens["median"]) == pytest.approx(list(np.median(np.concatenate(seen, axis=1), axis=1)))
    assert found.share["median"][1] == pytest.approx(np.median([one[1].sum() for one in seen]))
    assert found.questions == 2 and "| -" not in analyze.to_text(found, "x").splitlines()[4]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        _record(tmp_path)
