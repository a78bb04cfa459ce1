"""PruneVid: the card's worked examples, and tiny models that see videos."""

from __future__ import annotations

import pytest
import torch
from films import MOVING, film, run, scene
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness import subjects
from pruneval.harness.session import pruned
from pruneval.methods.prunevid import refined, steady

build = methods.build


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
