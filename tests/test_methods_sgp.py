"""SGP: the sums of the card's example, its layers and counts, what it costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from steps import Rows, shape, step

from pruneval import methods
from pruneval.harness import measure
from pruneval.harness.conformance import CHECKS, Case, verdicts
from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.harness.subjects import adapter, subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.sgp import certainty, received

PRESETS = methods.method_class("sgp").presets


def helper(maps, visual, answered=None) -> SimpleNamespace:
    """A helper with these attention maps, one (H, n, n) per layer."""
    maps = [torch.as_tensor(each, dtype=torch.float64) for each in maps]
    none = torch.zeros(0, len(visual), dtype=torch.float64)
    return SimpleNamespace(
        visual=torch.tensor(visual),
        length=maps[0].shape[-1],
        layers=len(maps),
        attention=lambda layer: Rows(maps[layer]),
        answered=none if answered is None else torch.tensor(answered, dtype=torch.float64),
    )


TOY = [[[9.0, 9.0, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0], [0.5, 0.2, 9.0, 9.0], [0.1, 0.3, 9.0, 9.0]]]


def test_the_cards_example():
    """Rows .5 .2 and .1 .3 of the question, .2 .1 of the answer."""
    found = received(helper([TOY], [0, 1], [[0.2, 0.1]]), "paper")
    torch.testing.assert_close(found, torch.tensor([0.8, 0.6], dtype=torch.float64))


def test_the_released_code_adds_the_row_of_the_last_visual_token():
    found = received(helper([TOY], [0, 1], [[0.2, 0.1]]), "code")
    torch.testing.assert_close(found, torch.tensor([1.05, 1.35], dtype=torch.float64))


def test_layers_heads_and_answer_tokens_are_summed():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    answered = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    found = received(helper(maps, [1, 2, 3], answered.tolist()), "paper")
    torch.testing.assert_close(found, maps[:, :, 4:, 1:4].sum((0, 1, 2)) + answered.sum(0))


def test_the_most_attended_stay_in_order():
    sample = step(2, 4, 1, layer=12, helping=lambda: helper([[[[1.0, 3, 2, 4, 0]] * 5]], [0, 1, 2, 3]))
    assert methods.build("sgp", {"keep": 0.5}).reduce(sample).keep.tolist() == [0, 1, 3, 5, 6]


@pytest.mark.parametrize(
    "preset, layer, mean",
    [("internvl2-26b@64%", 19, 0.6375), ("internvl2-26b@35%", 9, 0.35), ("internvl2-26b@9%", 2, 0.0896)],
)  # fmt: skip
def test_published_layers_and_averages(preset, layer, mean):
    method = methods.build("sgp", PRESETS[preset])
    assert list(method.needs(shape(48))) == [layer]
    plan = method.schedule(shape(48), 256 * 400)
    assert plan[layer - 1] == 256 * 400 > plan[layer]
    assert sum(plan) / 48 / (256 * 400) == pytest.approx(mean, abs=1e-4)


def test_counts_are_rounded_down_as_tensors_are():
    """The card's correction: 29 of 100 at 0.29, where Python's product is 28.999."""
    count = {n: methods.build("sgp", {"keep": 0.29, "depth": 0}).counts(shape(), n)[0] for n in (100, 1)}
    assert count == {100: 29, 1: 1} and int(100 * 0.29) == 28


def test_keeping_all_does_not_ask_the_helper():
    assert methods.build("sgp", {"keep": 1}).reduce(step(1, 5, 1, layer=12)) is None
    with pytest.raises(MethodError, match="no helper was asked for"):
        methods.build("sgp", {"keep": 0.5}).reduce(step(1, 5, 1, layer=12))


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_the_engines_promises(family):
    found = list(verdicts(Case("sgp", subject(family), given=(("answer", 4), ("rows", "paper")))))
    assert [verdict for verdict in found if verdict.status == "fail"] == []
    assert {verdict.check for verdict in found if verdict.status == "pass"} == set(CHECKS) - {"tower"}


def test_the_cards_certainty():
    """p = .9, .4 gives .6; .8 and .5 with few tokens give .4."""
    shown = []
    view = SimpleNamespace(
        confidence=torch.tensor([0.9, 0.4], dtype=torch.float64),
        agreement=lambda chosen: shown.append(chosen.tolist()) or torch.tensor([0.8, 0.5], dtype=torch.float64),
    )
    assert certainty(view, torch.arange(40.0)) == pytest.approx(0.5)
    assert shown == [[38, 39]]


def test_a_certain_helper_answers_early():
    """Above the threshold its ids are taken; what the model is given to compute stays the same."""
    model, one = tiny("llava"), subject("llava")
    inputs, found = one.batch(*one.samples), {}
    for limit in (0.0, 0.9, 1.0):
        method = methods.build("sgp", {"exit": limit, "answer": 4})
        with torch.no_grad(), pruned(model, method, adapter=adapter(model)) as session:
            model(**inputs)
            found[limit] = (session.early, session.trace.budget(1).per_layer)
            model(**one.text)
            assert session.early == {}
    assert set(found[0.0][0]) == {0, 1} and found[0.9][0] == found[1.0][0] == {}
    answer = tiny("llava", seed=1).generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    assert [ids.tolist() for ids in found[0.0][0].values()] == answer.tolist()
    assert found[0.0][1] == found[1.0][1]


def test_the_helper_is_part_of_the_cost():
    """Pruning saves less than the helper takes: the card's 81.5 % of 117.7 T are 81.4 T and a helper of 14.5 T."""
    given = {"helper": "internvl2-2b", **PRESETS["internvl2-26b@35%"]}
    found = measure.implied("internvl2-26b", "sgp", given, convention="true", visual_tokens=1792)
    assert set(found["helpers"]) == {"helper reads", "helper answers with 32 tokens", "rows of the helper"}
    assert found["tflops"] == found["tflops_with_helpers"] > found["helper_tflops"] > 8
    printed = measure.implied("internvl2-26b", "sgp", given, visual_tokens=1792)
    assert printed["tflops_with_helpers"] == pytest.approx(printed["tflops"] + printed["helper_tflops"])
    longer = measure.implied("internvl2-26b", "sgp", given | {"answer": 64}, visual_tokens=1792)
    assert longer["helper_tflops"] > printed["helper_tflops"]
    checked = measure.implied("internvl2-26b", "sgp", given | {"exit": 0.8}, visual_tokens=1792)
    assert 0 < checked["helpers"]["helper reads its answer again"] < 0.2 * checked["helpers"]["helper reads"]
    with pytest.raises(UserError, match="sgp: its cost needs the dimensions of a helper model"):
        measure.implied("internvl2-26b", "sgp")


def test_parameters():
    for given, message in (
        ({"rows": "all"}, "sgp: rows must be code or paper, not 'all'"),
        ({"depth": 1}, r"sgp: depth must be in \[0, 1\), not 1"),
        ({"exit": 2}, r"sgp: exit must be in \[0, 1\], not 2"),
        ({"answer": 0}, "sgp: answer must be at least 1, not 0"),
    ):
        with pytest.raises(MethodError, match=message):
            methods.build("sgp", given)
