"""DyCoke: the card's worked examples, and tiny models that see videos."""

from __future__ import annotations

import pytest
import torch
from films import film, run, scene
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness import subjects
from pruneval.harness.session import pruned
from pruneval.methods.base import DecodeStep

build = methods.build


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
