"""What a pruned run of every family multiplies and stores is what the ledger and the formula say of its lengths."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pruneval import methods
from pruneval.harness import kv_cache, subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.declared import declared
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.flops import ledger, lengths_of
from pruneval.harness.observed import observing
from pruneval.harness.scoring import scoring, shape_of
from pruneval.harness.session import pruned

COUNTED = (
    "patch_embedding", "vision_linear", "vision_attention", "projector", "scoring",
    "llm_linear", "llm_attention_square", "head_last",
)  # fmt: skip
OWN = {"dart": "cosines to the pivots", "pact": "distances of keys"}
"""Matrix products of methods that are no attention rows, by the name under which they are declared."""
EXACT = ("vanilla", "random", "uniform", "fastv", "pdrop", "visionzip", "vtw", "gsearch", "psigmoid", "st3", "dart")
"""Methods for which nothing may be left over; others have products of their own, declared or small."""
RECIPE = Path(__file__).with_name("fitprune_four_layers.json")
NEW = 3


@functools.cache
def _dimensions(family):
    return dimensions_of(subjects.tiny(family, "eager").config)


@functools.cache
def _adapter(family, kernel):
    return subjects.adapter(subjects.tiny(family, kernel))


def _method(family, name):
    given = {"recipe": str(RECIPE)} if name == "fitprune" else dict(subjects.PARAMS.get(name, ()))
    method = methods.build(name, given)
    reason = _adapter(family, "eager").supports(method)
    if reason:
        pytest.skip(reason)
    return method


def _sample(family, number=-1):
    sample = subjects.subject(family).samples[number]
    return {name: part.double() if part.is_floating_point() else part for name, part in sample.items()}


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_the_ledger_of_the_observed_lengths_is_what_torch_counts(family, name):
    model, dimensions, method = subjects.tiny(family, "eager"), _dimensions(family), _method(family, name)
    if any(needs.clip or needs.helper for needs in method.needs(shape_of(dimensions)).values()):
        pytest.skip(f"{name}: another model runs besides, whose price is not this one's")
    adapter = _adapter(family, "eager")
    sample = _sample(family)  # made with the model itself, which must not be counted
    with torch.no_grad(), pruned(model, method, adapter=adapter) as session:
        with observing(adapter, dimensions) as seen, FlopCounterMode(display=False) as counter:
            model(**sample, logits_to_keep=1)
        lengths = seen.lengths(session.trace)
    macs = ledger(dimensions, lengths).total(*COUNTED)
    if name in OWN:
        macs += next(work.macs for work in scoring(method, dimensions, lengths) if work.name == OWN[name])
    left = 1 - 2 * macs / counter.get_total_flops()
    own = sum(work.macs for work in scoring(method, dimensions, lengths)) if hasattr(method, "work") else 0
    # similarities of merged tokens weigh most on models as narrow as these
    most = 1e-3 if name in EXACT else 2e-2 + 2 * own / counter.get_total_flops()
    assert -1e-3 < left < most


@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_parameters_and_shape_follow_from_the_config(family):
    model, dimensions = subjects.tiny(family, "eager"), _dimensions(family)
    assert sum(dimensions.params.values()) == sum(part.numel() for part in model.parameters())
    assert adapter_for(model).shape == shape_of(dimensions)


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_the_cache_holds_what_the_formula_says(family, name):
    """After the prefill and after three tokens, layer by layer, in bytes; and no tensor is a view of a larger one."""
    model, decoder, method = _adapter(family, "sdpa").model, _dimensions(family).decoder, _method(family, name)
    sample = _sample(family)
    with torch.no_grad(), pruned(model, method, adapter=_adapter(family, "sdpa")) as session:
        cache = model(**sample, logits_to_keep=1).past_key_values
        trace = session.trace
        stored = [trace.stored(layer, 0).width for layer in range(trace.layers)]
        assert kv_cache.held(cache) == [kv_cache.kv_bytes(decoder, [tokens], 8) for tokens in stored]
        assert kv_cache.resident(cache) == kv_cache.held(cache)
        if name == "random":
            assert sum(stored) < trace.layers * sample["input_ids"].shape[1]
        out = model.generate(**sample, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        stored = [session.trace.stored(layer).width + NEW - 1 for layer in range(trace.layers)]
    assert kv_cache.held(out.past_key_values) == [kv_cache.kv_bytes(decoder, [tokens], 8) for tokens in stored]
    assert kv_cache.resident(out.past_key_values) == kv_cache.held(out.past_key_values)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("st3", {"first": 1, "stride": 1, "keep": 0.3, "every": 2, "span": 6, "decode_keep": 0.4}),
        ("prunevid", {"layer": 1}),
        ("fastv", {}),
    ],
    ids=["st3", "prunevid", "fastv"],
)
def test_declared_caches_are_those_of_the_trace(name, params):
    model, method, steps = subjects.tiny("llava"), methods.build(name, params), 8
    with torch.no_grad(), pruned(model, method) as session:
        model.generate(**_sample("llava", 0), max_new_tokens=steps, do_sample=False)
    trace, visual = session.trace, lambda layout: int(layout.samples[0].visual.sum())
    entered = [visual(trace.entering(layer)) for layer in range(trace.layers)]
    for step in range(steps):
        held = [visual(trace.stored(layer, step)) for layer in range(trace.layers)]
        assert method.caching(session.shape, entered, step) == held
    assert (held != entered) == (name != "fastv")


@pytest.mark.parametrize("params", [{}, {"keep": 0.25}], ids=str)
def test_the_declared_tower_is_the_observed_one(params):
    model, dimensions, method = subjects.tiny("llava"), _dimensions("llava"), methods.build("tome", params)
    with torch.no_grad(), pruned(model, method) as session, observing(session.adapter, dimensions) as seen:
        model(**_sample("llava", 0), logits_to_keep=1)
    observed = seen.lengths(session.trace)
    found, _ = declared(method, dimensions, lengths_of(dimensions, text=observed.text))
    assert (found.vision, found.fed) == (observed.vision, observed.fed)
    assert (found.visual, found.projector) == (observed.visual, observed.projector)
