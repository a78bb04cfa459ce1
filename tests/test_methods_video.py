"""DyCoke, FrameFusion and PruneVid: the cards' worked examples, and tiny models that see videos."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness import subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.adapters.internvl import TileView
from pruneval.harness.session import pruned
from pruneval.methods.base import DecodeStep, MethodError
from pruneval.methods.framefusion import collapse, neighbours, required
from pruneval.methods.prunevid import refined, steady

MOVING = {"llava_next_video": 2, "llava_onevision": 2, "video_llava": 1, "qwen2_5_vl": 2}
"""Which prompt of a family's subject shows a video."""

build = methods.build


def film(frames: int, places: int, seed: int = 0, size: int = 8) -> torch.Tensor:
    """(F * P, d) random tokens of a video."""
    return torch.randn(frames * places, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene(tokens: torch.Tensor, frames: int, before: int = 2, after: int = 3, **seen):
    """A prompt of text, a video of `tokens` and text."""
    text = film(before + after, 1, 99, tokens.shape[1])
    hidden = torch.cat([text[:before], tokens, text[before:]])
    clips = (torch.arange(before, before + len(tokens)).unflatten(0, (frames, -1)),)
    fields = {"hidden": hidden, "embeddings": hidden, "clips": clips} | seen
    return step(before, len(tokens), after, **fields)


def run(model, inputs, method, new: int = 3):
    """Logits of a greedy generation, and its session."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with pruned(model, method) as session:
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, 1), session, out.past_key_values


# Frames


@pytest.mark.parametrize(("family", "index"), MOVING.items())
def test_clips_are_the_frames_of_a_video(family, index):
    subject = subjects.subject(family)
    _, session, _ = run(subject.model("sdpa"), subject.samples[index], build("framefusion", {"keep": 1}), 1)
    prompt = session.trace.prompt.samples[0]
    clips = []
    kind = type(session.method)

    class Probe(kind):
        def reduce(self, step):
            clips.append(step.clips)

    run(subject.model("sdpa"), subject.samples[index], Probe(), 1)
    (clip,) = clips[0]
    visual = prompt.visual.nonzero().squeeze(-1)
    frames = 2 if family == "qwen2_5_vl" else 4
    extra = {"llava_onevision": 1, "video_llava": 4}.get(family, 0)  # a newline, four CLS tokens
    assert clip.shape == (frames, (len(visual) - extra) // frames)
    assert torch.isin(clip, visual).all() and len(clip.unique()) == clip.numel()
    assert (clip.diff(dim=1) == 1).all() and (clip.diff(dim=0) > 0).all()
    if family == "video_llava":
        assert (clip[:, 0] - visual[0]).tolist() == [1, 18, 35, 52]  # each frame's CLS comes first
    elif extra:
        assert clip[-1, -1] + 1 == visual[-1]


def test_images_are_no_clips_and_tiles_in_a_row_are():
    model = subjects.tiny("internvl")
    view = TileView(adapter_for(model), [])
    for images, sizes in (((3,), []), ((1,), []), ((1, 3), []), ((1, 1, 1), [3]), ((1, 1, 3, 1, 1, 1), [2, 3])):
        view.images = images
        assert [len(clip) for clip in view.clips()] == sizes
    view.images = (3, 1, 1)
    assert view.clips()[0].tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]


# DyCoke


@pytest.mark.parametrize(
    ("frames", "odd", "left"), [(32, "keep", 3098), (16, "keep", 1618), (31, "drop", 2844), (31, "keep", 3040)]
)
def test_dycoke_counts(frames, odd, left):
    """The card's counts for 196 tokens per frame; without the code's loss a last odd frame adds its 196."""
    method = build("dycoke", {"odd": odd})
    chosen = method.chosen(film(frames, 196, size=2).unflatten(0, (frames, -1)))
    assert sum(map(len, chosen)) == left
    assert all(len(chosen[frame]) == 196 for frame in range(0, frames - frames % 2, 4))
    assert {len(chosen[frame]) for frame in range(1, frames, 2)} == {58}


def test_dycoke_keeps_what_is_least_alike_and_reverses_with_it():
    angles = torch.tensor([[0.0, 0, 0, 0], [0.1, 1.5, 0.7, 1.1]], dtype=torch.float64)
    video = torch.stack([angles.cos(), angles.sin()], -1)
    assert build("dycoke", {"keep": 0.5}).chosen(video)[1].tolist() == [1, 3]
    angles[1] = torch.tensor([0.1, 1.1, 0.7, 1.5])
    video = torch.stack([angles.cos(), angles.sin()], -1)
    assert build("dycoke", {"keep": 0.5}).chosen(video)[1].tolist() == [3, 1]
    assert build("dycoke", {"keep": 0.5, "order": "raster"}).chosen(video)[1].tolist() == [1, 3]
    same = torch.ones(2, 4, 3)
    assert build("dycoke", {"keep": 0.5}).chosen(same)[1].tolist() == [0, 1]
    found = build("dycoke", {"keep": 0.5}).reduce(scene(video.flatten(0, 1), 2))
    assert found.keep.tolist() == [0, 1, 2, 3, 4, 5, 9, 7, 10, 11, 12]


def test_dycoke_leaves_images_and_text_alone():
    assert build("dycoke").reduce(step(2, 8, 2)) is None
    assert build("dycoke", {"keep": 1}).reduce(scene(film(4, 4), 4)) is None
    kept = build("dycoke", {"keep": 0.25}).reduce(scene(film(4, 4), 4)).keep.tolist()
    assert kept[:6] == [0, 1, 2, 3, 4, 5] and kept[-3:] == [18, 19, 20]


def test_dycoke_chooses_anew_only_when_the_scores_turn():
    def look(scores, memory):
        return DecodeStep(3, 1, Rows([scores]), torch.tensor([1, 2, 3]), 3, shape(), memory)

    first, near, far = [0.0, 3, 2, 1], [0.0, 3, 2.2, 1], [0.0, 0, 1, 9]
    for otherwise, second in (("all", None), ("reuse", [0])):
        method, memory = build("dycoke", {"keep": 0.4, "otherwise": otherwise}), {}
        assert method.select(look(first, memory)).tolist() == [0]
        found = method.select(look(near, memory))
        assert (None if found is None else found.tolist()) == second
        assert method.select(look(far, memory)).tolist() == [2]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_dycoke_attends_to_the_chosen_ones_only_and_keeps_the_cache(kernel):
    """A decode step equals that of the plain model in which what was not chosen is masked from `layer` on."""
    model = subjects.tiny("llava_next_video", kernel)
    inputs = subjects.subject("llava_next_video").samples[2]
    method = build("dycoke", {"keep": 1, "decode_keep": 0.3, "layer": 2})
    chosen = []
    kind = type(method)

    class Noting(kind):
        def select(self, step):
            found = kind.select(self, step)
            chosen.append(step.visual[found])
            return found

    found, session, cache = run(model, inputs, Noting(**method.params), 2)
    length = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length + 1] * 4
    visual = session.trace.prompt.samples[0].visual
    assert len(chosen[0]) == int(0.3 * int(visual.sum()))
    attended = torch.cat([~visual, torch.ones(1, dtype=torch.bool)])
    attended[chosen[0]] = True

    def mask(module, args, kwargs):
        if (args[0] if args else kwargs["hidden_states"]).shape[1] > 1:
            return None
        full = attended[None, None, None]
        bias = torch.zeros(1, 1, 1, length + 1, dtype=torch.float64).masked_fill(~full, float("-inf"))
        return args, kwargs | {"attention_mask": full if kernel == "sdpa" else bias}

    hooks = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in model.model.language_model.layers[2:]]
    try:
        masked, _, _ = run(model, inputs, build("vanilla"), 2)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, masked)
    plain, _, _ = run(model, inputs, build("vanilla"), 2)
    assert torch.equal(found[:, 0], plain[:, 0]) and not torch.allclose(found[:, 1], plain[:, 1])
    same, _, _ = run(model, inputs, build("dycoke", {"keep": 1, "layer": 2}), 2)
    assert torch.equal(same, plain)


def test_dycoke_beams_and_batches():
    subject = subjects.subject("llava_next_video")
    model, options = subject.model("sdpa"), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with pruned(model, build("dycoke", {"layer": 1})):
        for number in (1, 3):
            alone = [model.generate(**one, **options, num_beams=number)[0, -4:] for one in subject.samples]
            together = model.generate(**subject.batch(*subject.samples), **options, num_beams=number)[:, -4:]
            assert torch.equal(together, torch.stack(alone))


# FrameFusion


def test_framefusion_budget_formula():
    assert required([0.4], 28, 0.3) == pytest.approx(0.5185, abs=1e-4)
    assert required([], 32, 1.0) == 0 and required([], 32, 0.3) == pytest.approx(0.7)
    assert required([0.9], 28, 0.5) == 0 and required([0.0], 28, 0.01) == 1
    for past in ([0.0], [0.2, 0.05], [0.3, 0.3, 0.01]):
        left = [1.0]
        for share in past:
            left.append(left[-1] * (1 - share))
        last = left[-1] * (1 - required(past, 32, 0.3))
        assert sum(left[1:]) + (32 - len(past)) * last == pytest.approx(0.3 * 32)


def test_framefusion_collapses_runs_into_the_token_before():
    """Flags 0 1 1 1 0 0 1 1 along one place: tokens 0 and 5 absorb three and two."""
    tokens = film(8, 1)
    at = scene(tokens, 8)
    flags = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    found = collapse(at, torch.arange(2, 10), flags)
    assert found.keep.tolist() == [0, 1, 2, 6, 7, 10, 11, 12] and found.slots.tolist() == [2, 4]
    torch.testing.assert_close(found.values, torch.stack([tokens[:4].mean(0), tokens[5:].mean(0)]))


def test_framefusion_compares_a_place_with_the_last_living_frame():
    tokens = film(3, 2)
    whole = scene(tokens, 3)
    listed, similar = neighbours(whole)
    assert listed.tolist() == [2, 4, 6, 3, 5, 7] and similar.isinf().tolist() == [True, False, False] * 2
    expected = torch.nn.functional.cosine_similarity(tokens[2], tokens[0], dim=0)
    torch.testing.assert_close(similar[1], expected)
    stays = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10])  # origin 4 has been merged away
    later = dataclasses.replace(whole, hidden=whole.hidden[stays], origin=stays, visual=torch.arange(2, 7))
    listed, similar = neighbours(later)
    assert stays[listed].tolist() == [2, 6, 3, 5, 7]
    torch.testing.assert_close(similar[1], torch.nn.functional.cosine_similarity(tokens[4], tokens[0], dim=0))


def test_framefusion_takes_the_most_similar_when_the_budget_caps_it():
    tokens = film(1, 4).repeat(4, 1)
    at = scene(tokens, 4)
    found = build("framefusion", {"keep": 0.7, "threshold": 0.5}).reduce(at)
    assert len(at.origin) - len(found.keep) == int(0.3 * 16) and at.memory["stage"] == "done"
    at = scene(tokens, 4)
    found = build("framefusion", {"keep": 0.05}).reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 3, 4, 5, 18, 19, 20] and at.memory["past"] == [0.75]
    torch.testing.assert_close(found.values, tokens[:4])
    at = scene(film(4, 4), 4)
    assert build("framefusion", {"keep": 1}).reduce(at) is None and at.memory["stage"] == "done"


def test_framefusion_prunes_once_by_the_last_row():
    method = build("framefusion", {"keep": 0.5})
    memory = {"past": [0.0], "stage": "pruning"}
    scores = torch.tensor([[0.0, 0, 1, 9, 2, 8, 3, 7, 4, 6, 0, 0, 0]])
    at = scene(film(2, 4), 2, layer=1, layers=3, seen={0: Rows(scores)}, memory=memory)
    assert method.reduce(at).keep.tolist() == [0, 1, 3, 5, 10, 11, 12]  # round(8 (1 - 0.75))
    assert memory["stage"] == "done" and method.reduce(at) is None
    image = build("framefusion").schedule(shape(), 576)
    assert image[0] == 576 and sum(image) / 32 / 576 == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("family", "index"), MOVING.items())
def test_framefusion_meets_its_budget_on_videos(family, index, keep):
    subject = subjects.subject(family)
    for threshold in (-1, 0.1, 0.9):
        method = build("framefusion", {"keep": keep, "threshold": threshold})
        _, session, _ = run(subject.model("sdpa"), subject.samples[index], method, 1)
        budget = session.trace.budget(0)
        if budget.visual >= 16:
            assert budget.keep == pytest.approx(keep, abs=1 / budget.visual)


# PruneVid


def test_prunevid_segments():
    assert refined([0, 0, 1, 0, 0]) == [0] * 5
    assert refined([0, 1, 1, 0]) == [1] * 4
    assert refined([0, 0, 1, 1, 1, 0]) == [0, 0, 1, 1, 1, 1]
    assert refined([0, 0, 2, 1, 1, 1]) == [0, 0, 1, 1, 1, 1]
    assert refined([0, 1, 2]) == [0, 0, 0] and refined([5]) == [5]
    scenes = film(2, 1).repeat_interleave(4, 0) + film(8, 1, 1) / 100
    assert build("prunevid").segments(scenes) == [(0, 4), (4, 8)]


def test_prunevid_static_is_the_mean_pairwise_cosine():
    frames = film(3, 5).unflatten(0, (3, 5))
    unit = torch.nn.functional.normalize(frames, dim=-1)
    pairs = torch.stack([(unit[a] * unit[b]).sum(-1) for a, b in ((0, 1), (0, 2), (1, 2))]).mean(0)
    for least in (-0.2, 0.0, 0.2):
        assert torch.equal(steady(frames, least), pairs > least)
    assert not steady(frames[:1], -1).any()


def test_prunevid_merges_what_lasts():
    tokens = film(1, 4).repeat(4, 1)
    at = scene(tokens, 4)
    found = build("prunevid").reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 3, 4, 5, 18, 19, 20] and found.compact
    torch.testing.assert_close(found.values, tokens[:4])
    assert [group.tolist() for group in at.memory["groups"]] == [[2, 3, 4, 5]]
    moved = tokens.unflatten(0, (4, 4)).clone()
    moved[:, 1] = film(4, 1, 3) * torch.tensor([[1.0], [-1], [1], [-1]])
    at = scene(moved.flatten(0, 1), 4)
    found = build("prunevid").reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 4, 5, 3, 7, 11, 15, 18, 19, 20]
    assert [group.tolist() for group in at.memory["groups"]] == [[2, 4, 5], [3], [7], [11], [15]]


def test_prunevid_without_any_merging_is_the_identity():
    at = scene(film(4, 16), 4)
    assert build("prunevid", {"static": 2, "spatial": 1}).reduce(at) is None
    assert len(at.memory["groups"]) == 4
    assert build("prunevid", {"keep": 1}).reduce(scene(film(4, 16), 4)) is None
    found = build("prunevid", {"static": 2}).reduce(scene(film(4, 16), 4))
    assert len(found.keep) == 5 + 4 * 8


def test_prunevid_clusters_are_means_around_their_centres():
    tokens = film(1, 20)
    groups = build("prunevid").grouped(tokens)
    assert len(groups) == 10 and sorted(torch.cat(groups).tolist()) == list(range(20))
    assert [int(group[0]) for group in groups] == sorted(int(group[0]) for group in groups)
    at = scene(tokens, 1)
    found = build("prunevid").reduce(at)
    torch.testing.assert_close(found.values[0], tokens[next(g for g in groups if len(g) > 1)].mean(0))


def test_prunevid_selects_in_every_group():
    scores = torch.zeros(2, 13)
    scores[0, 2:10] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    scores[1, 2] = 9
    groups = [torch.tensor([2, 3, 4, 5]), torch.tensor([6, 7]), torch.tensor([8])]
    at = step(2, 8, 3, layer=11, seen={10: Rows(scores)}, memory={"groups": groups})
    found = build("prunevid", {"keep": 0.5}).reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 5, 7, 8, 9, 10, 11, 12] and found.everywhere and found.compact is False
    found = build("prunevid", {"keep": 0.5, "least": 0, "earlier": "full"}).reduce(at)
    assert found.keep.tolist() == [0, 1, 2, 5, 7, 9, 10, 11, 12] and not found.everywhere
    assert build("prunevid").schedule(shape(), 576) == [576] * 11 + [230] * 21


@pytest.mark.parametrize("earlier", ["shrunk", "full"])
@pytest.mark.parametrize(("family", "index"), MOVING.items())
def test_prunevid_shrinks_all_caches_alike(family, index, earlier):
    subject = subjects.subject(family)
    model, inputs = subject.model("sdpa"), subject.samples[index]
    method = build("prunevid", {"layer": 1, "static": 0.1, "earlier": earlier})
    _, session, cache = run(model, inputs, method, 3)
    merged, last = (len(session.trace.entering(layer).samples[0]) for layer in (0, 3))
    lengths = [layer.keys.shape[-2] - 2 for layer in cache.layers]
    assert last < merged < inputs["input_ids"].shape[1]
    assert lengths == ([last] * 4 if earlier == "shrunk" else [merged, merged, last, last])
    stream = session.trace.entering(3).samples[0]
    assert int(stream.position.max()) == merged - 1  # decoding goes on from the merged prompt's length


def test_prunevid_decodes_as_if_the_rest_were_masked():
    """The first decode step with shrunk caches is that of full ones in which the same tokens are masked."""
    subject = subjects.subject("llava_next_video")
    model, inputs = subject.model("sdpa"), subject.samples[0]
    method = build("prunevid", {"layer": 1, "stages": "select"})
    found, session, _ = run(model, inputs, method, 2)
    stays = torch.zeros(inputs["input_ids"].shape[1] + 1, dtype=torch.bool)
    stays[session.trace.entering(3).samples[0].origin] = stays[-1] = True

    def mask(module, args, kwargs):
        if (args[0] if args else kwargs["hidden_states"]).shape[1] > 1:
            return args, kwargs
        return args, kwargs | {"attention_mask": stays[None, None, None]}

    with pruned(model, build("prunevid", {"layer": 1, "stages": "select", "earlier": "full"})):
        hooks = [
            layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in model.model.language_model.layers[:2]
        ]
        try:
            options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
            out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        finally:
            for hook in hooks:
                hook.remove()
    torch.testing.assert_close(found, torch.stack(out.logits, 1))


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("dycoke", {"layer": 0}, "at least 1"),
        ("dycoke", {"otherwise": "no"}, "all or reuse"),
        ("dycoke", {"order": "no"}, "similarity or raster"),
        ("dycoke", {"odd": "no"}, "keep or drop"),
        ("dycoke", {"decode_keep": 2}, r"in \[0, 1\]"),
        ("framefusion", {"threshold": 2}, r"in \[-1, 1\]"),
        ("framefusion", {"saturated": 2}, r"in \[0, 1\]"),
        ("prunevid", {"temporal": 0}, "temporal must be"),
        ("prunevid", {"stages": "no"}, "both, merge or select"),
        ("prunevid", {"earlier": "no"}, "shrunk or full"),
        ("prunevid", {"least": 2}, "0 or 1"),
    ],
)
def test_nonsense_is_refused(name, params, said):
    with pytest.raises(MethodError, match=said):
        build(name, params)


@pytest.mark.parametrize("name", ["dycoke", "framefusion", "prunevid"])
def test_presets_are_valid(name):
    for params in methods.method_class(name).presets.values():
        assert build(name, params).needs(shape())
