"""Smaller images: what the tower sees, what the language model gets, and which token stands for which."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from steps import shape

from pruneval import methods
from pruneval.harness import pixels
from pruneval.harness.declared import declared
from pruneval.harness.dimensions import load
from pruneval.harness.flops import lengths_of
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.resize import middles


def run(family, keep=0.3, sample=0, **params):
    """The reductions at layer 0 with their steps, the trace, and how many tokens entered each call of tower layer 0."""
    model, seen, entered = tiny(family), [], []
    kind = methods.method_class("resize")

    class Spy(kind):
        def reduce(self, one):
            seen.append((one, super().reduce(one)))
            return seen[-1][1]

    with torch.no_grad(), pruned(model, Spy(keep=keep, **params)) as session:
        hooks = [
            layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"]).shape[-2]),
                with_kwargs=True,
            )
            for layers in session.adapter.towers
        ]
        model(**subject(family).samples[sample])
        for hook in hooks:
            hook.remove()
    return seen, session.trace, entered


def scaled(images, *size):
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)


def test_the_language_model_gets_the_features_of_the_small_image():
    """Four by four cells of 14 pixels become two by two."""
    model, inputs = tiny("llava"), subject("llava").samples[0]
    seen, trace, entered = run("llava")
    with torch.no_grad():
        small = scaled(inputs["pixel_values"], 28, 28)
        expected = model.model.get_image_features(small, interpolate_pos_encoding=True).pooler_output
    ((step, result),) = seen
    torch.testing.assert_close(result.values, torch.cat(tuple(expected)))
    assert step.origin[result.keep][result.slots].sub(step.visual[0]).tolist() == [5, 7, 13, 15]
    assert entered == [5] and trace.budget(0).per_layer == [4] * 4
    assert methods.build("resize", {"keep": 0.3}).schedule(step.shape, 16) == [4] * 4


def test_answers_are_those_of_a_prompt_with_the_small_image():
    model, inputs = tiny("llava"), subject("llava").samples[0]
    ids = inputs["input_ids"][0]
    image = ids == model.config.image_token_id
    few = torch.cat([ids[: int(image.nonzero()[0])], ids[image][:4], ids[int(image.nonzero()[-1]) + 1 :]])[None]
    with torch.no_grad():
        small = scaled(inputs["pixel_values"], 28, 28)
        features = model.model.get_image_features(small, interpolate_pos_encoding=True).pooler_output
        embeds = model.get_input_embeddings()(few)
        embeds[few == model.config.image_token_id] = torch.cat(tuple(features))
        expected = model(inputs_embeds=embeds).logits[:, -1]
        with pruned(model, methods.build("resize", {"keep": 0.3})):
            torch.testing.assert_close(model(**inputs).logits[:, -1], expected)


def test_tiles_of_a_sheet_are_scaled_one_by_one():
    model, inputs = tiny("llava_next"), subject("llava_next").samples[0]
    ((step, result),), _, entered = run("llava_next")
    tiles = inputs["pixel_values"][0, : step.vision.tiles]
    with torch.no_grad():
        hidden = model.model.vision_tower(
            scaled(tiles, 28, 28), interpolate_pos_encoding=True, output_hidden_states=True
        )
        expected = model.model.multi_modal_projector(hidden.hidden_states[-2][:, 1:])
    assert set(entered) == {5}
    place = step.origin[result.keep][result.slots] - step.visual[0]
    tile = step.vision.tile_of()[place]
    torch.testing.assert_close(result.values[tile == 0], expected[0])
    for each in range(1, step.vision.tiles):
        mine = result.values[tile == each]
        assert len(mine) and all(bool((expected[each] - one).abs().amax(1).min() < 1e-9) for one in mine)


def test_newlines_of_rows_that_stay_may_stay():
    ((step, plain),), *_ = run("llava_next")
    ((_, result),), *_ = run("llava_next", newline="keep")
    more = set(result.keep.tolist()) - set(plain.keep.tolist())
    numbers = torch.tensor(sorted(more)) - step.visual[0]
    assert more and bool(step.vision.is_newline()[numbers].all()) and len(result.slots) == len(plain.slots)


def test_blocks_of_cells_stay_together():
    """Four by four cells, two by two tokens; one token of two by two cells is left."""
    model, inputs = tiny("internvl"), subject("internvl").samples[0]
    ((_, result),), _, entered = run("internvl")
    with torch.no_grad():
        expected = model.model.get_image_features(scaled(inputs["pixel_values"], 28, 28)).pooler_output
    torch.testing.assert_close(result.values, expected.flatten(0, -2))
    assert entered == [5]


@pytest.mark.parametrize("family, merge", [("qwen2_5_vl", 14), ("qwen3_vl", 16)])
def test_qwen_sees_a_smaller_grid(family, merge):
    """Eight by twelve patches are four by six tokens; six stay: two by three."""
    model, inputs = tiny(family), subject(family).samples[0]
    ((step, result),), _, entered = run(family, 0.25)
    patches = inputs["pixel_values"]
    images = pixels._images(patches, (1, 4, 6), 2, 2, merge)
    assert torch.equal(pixels._as_patches(images, (1, 4, 6), 2, 2, merge), patches)
    small = pixels._as_patches(scaled(images, 4 * merge, 6 * merge), (1, 2, 3), 2, 2, merge)
    with torch.no_grad():
        expected = model.model.get_image_features(small, image_grid_thw=torch.tensor([[1, 4, 6]])).pooler_output
    torch.testing.assert_close(result.values, torch.cat(tuple(expected)))
    assert entered == [24] and (step.origin[result.keep][result.slots] - step.visual[0]).tolist() == [
        7,
        9,
        11,
        19,
        21,
        23,
    ]


def test_a_patch_is_where_the_processor_puts_it():
    """Channels, two frames, pixels; tokens row by row, their patches too."""
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = pixels._as_patches(images, (1, 2, 2), 2, 2, 2)
    assert torch.equal(patches[0].reshape(3, 2, 2, 2), images[:, :, :2, :2].transpose(0, 1))
    assert torch.equal(patches[1].reshape(3, 2, 2, 2), images[:, :, :2, 2:4].transpose(0, 1))
    assert torch.equal(patches[6].reshape(3, 2, 2, 2), images[:, :, 2:4, 4:6].transpose(0, 1))


def test_frames_are_scaled_before_they_are_pooled():
    """A frame of LLaVA-NeXT-Video: four by four cells, two by two tokens; one stays, the mean of two by two cells."""
    model, inputs = tiny("llava_next_video"), subject("llava_next_video").samples[2]
    ((step, result),), _, entered = run("llava_next_video", sample=2)
    with torch.no_grad():
        frames = scaled(inputs["pixel_values_videos"][0], 28, 28)
        hidden = model.model.vision_tower(frames, interpolate_pos_encoding=True, output_hidden_states=True)
        expected = model.model.multi_modal_projector(hidden.hidden_states[-2][:, 1:].mean(1))
    torch.testing.assert_close(result.values, expected)
    assert len(step.visual) == 16 and entered == [5]


@pytest.mark.parametrize("cells, tokens, small", [(24, 24, 13), (32, 16, 5), (24, 12, 7), (27, 14, 3), (5, 5, 5)])
def test_a_token_is_a_whole_token_of_the_small_image(cells, tokens, small):
    """The token in the middle of an area has its cells in order, and every small token has one."""
    few = round(small * cells / tokens)
    source = pixels.sources(cells, tokens, few, small)
    assert int(source.min()) == 0 and int(source.max()) == few - 1 and bool((source.diff() >= -few).all())
    place = torch.stack([torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)], dim=1)
    chosen = middles(place, (tokens, 1), (small, 1))
    assert len(chosen) == small
    if cells % tokens == 0:
        parts = source.reshape(tokens, -1)[chosen]
        assert torch.equal(parts.flatten(), torch.arange(few))


def test_middles_where_rows_are_missing():
    """Of six by six tokens the first two rows are gone; three by three are two by three."""
    place = torch.cartesian_prod(torch.arange(2, 6), torch.arange(6))
    chosen = middles(place, (6, 6), (3, 3))
    assert place[chosen].tolist() == [[row, column] for row in (3, 5) for column in (1, 3, 5)]


@pytest.mark.parametrize("count, kept", [(192, 182), (128, 121), (64, 64)])
def test_counts_and_a_cheaper_tower(count, kept):
    method = methods.build("resize", {"keep": count / 576})
    assert method.schedule(shape(), 576) == [kept] * 32 and method.encoder_schedule(shape(), 576) == [kept + 1] * 24
    assert methods.build("resize", {"keep": 1}).encoder_schedule(shape(), 576) == [577] * 24
    with pytest.raises(MethodError, match="resize: the count depends on the height and width"):
        method.schedule(shape(), 577)


def test_implied_costs_have_the_smaller_tower():
    dimensions = load("llava-1.5-7b")
    whole = lengths_of(dimensions)
    found, _ = declared(methods.build("resize", {"keep": 64 / 576}), dimensions, whole)
    assert found.patches == 64 and set(found.vision) == {((1, 65),)} and found.visual == (64,) * 32
    assert found.projector == whole.projector, "copies are projected too"
    plain, _ = declared(methods.build("avgpool", {"keep": 64 / 576}), dimensions, whole)
    assert plain.patches == whole.patches == 576


def test_nothing_is_touched_at_full_size():
    model = tiny("llava")
    with pruned(model, methods.build("resize", {"keep": 1})):
        assert "forward" not in vars(model.model.vision_tower)
    with pruned(model, methods.build("resize", {"keep": 0.5})):
        assert isinstance(vars(model.model.vision_tower)["forward"], functools.partial)
    assert "forward" not in vars(model.model.vision_tower)
    assert "interpolate_pos_encoding" in inspect.signature(model.model.vision_tower.forward).parameters
