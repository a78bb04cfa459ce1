"""VTW: all visual tokens go at one layer."""

from __future__ import annotations

import pytest
import tiny
import torch
from steps import shape, step

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.methods import MethodError
from pruneval.methods.vtw import equal_budget


@pytest.mark.parametrize(
    "params, layers, first",
    [({}, 32, 16), ({"keep": 0.5}, 28, 14), ({"layer": "15"}, 32, 15), ({"keep": 0.01}, 32, 1), ({"keep": 1}, 32, 32)],
)
def test_layers_before_k_see_everything_and_no_other(params, layers, first):
    method = methods.build("vtw", params)
    assert method.schedule(shape(layers), 576) == [576] * first + [0] * (layers - first)
    assert list(method.needs(shape(layers))) == [first] * (first < layers)


@pytest.mark.parametrize("preset, average", [("llava-1.5-7b@288", 288), ("llava-1.5-7b@270", 270)])
def test_published_settings(preset, average):
    method = methods.build("vtw", methods.method_class("vtw").presets[preset])
    assert sum(method.schedule(shape(), 576)) / 32 == average


def test_only_text_goes_on():
    assert methods.build("vtw").reduce(step(2, 4, 3, layer=16)).keep.tolist() == [0, 1, 6, 7, 8]


def test_withdrawal_before_the_first_layer_is_a_prompt_of_text_with_a_gap():
    """K = 0 under original positions: the language model on text embeddings alone, at the positions they had."""
    model, sample = tiny.shared(), tiny.prompt(5, 7)
    text = sample["input_ids"][0] != tiny.IMAGE
    with torch.no_grad():
        with pruned(model, methods.build("vtw", {"layer": 0})):
            out = model(**sample).logits
        embeds = model.get_input_embeddings()(sample["input_ids"][:, text])
        position = text.nonzero().T
        mask = torch.ones_like(position)
        hidden = model.model.language_model(inputs_embeds=embeds, position_ids=position, attention_mask=mask)
        torch.testing.assert_close(out, model.lm_head(hidden.last_hidden_state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "mode, expected", [("original", list(range(5)) + list(range(21, 28))), ("compact", [*range(12)])]
)
def test_positions(mode, expected):
    model = tiny.shared()
    with torch.no_grad(), pruned(model, methods.build("vtw", {"position_mode": mode})) as session:
        model(**tiny.prompt(5, 7))
    assert session.trace.entering(2).samples[0].position.tolist() == expected
    assert len(session.trace.entering(1).samples[0]) == 28


def test_the_equal_budget_rule():
    """A method that keeps half of the tokens from layer 2 on reads 17 / 32 of them."""
    assert equal_budget(0.5, 2, 32) == 17 and equal_budget(0, 5, 28) == 5 and equal_budget(1, 5, 28) == 28


@pytest.mark.parametrize("layer", ["soon", "-1", "1.5"])
def test_a_layer_is_a_whole_number(layer):
    with pytest.raises(MethodError, match="vtw: layer must be auto or a whole number"):
        methods.build("vtw", {"layer": layer})


def test_a_layer_the_model_has_not_is_refused():
    with pytest.raises(MethodError, match="vtw: layer must be between 0 and 24 for this model, not 26"):
        methods.build("vtw", {"layer": 26}).needs(shape(24))
