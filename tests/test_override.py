"""Wrappers of a model's functions, nested in any order: each puts back what stood there before it, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from pruneval import methods
from pruneval.harness.attention import HeadAttention, Recorder
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.latency import split
from pruneval.harness.observed import observing
from pruneval.harness.override import override
from pruneval.harness.reuse import reusing
from pruneval.harness.search.prefix import shared
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject

Wrapper = Callable[[Any], AbstractContextManager]
WRAPPERS: dict[str, Wrapper] = {
    "reusing": reusing,
    "shared": shared,
    "split": split,
    "observing": lambda adapter: observing(adapter, dimensions_of(adapter.model.config)),
    "pruned": lambda adapter: pruned(adapter.model, methods.build("fastv"), adapter=adapter),
    "in the tower": lambda adapter: pruned(adapter.model, methods.build("tome"), adapter=adapter),
    "before the tower": lambda adapter: pruned(adapter.model, methods.build("resize"), adapter=adapter),
}
PRUNING = {"pruned", "in the tower", "before the tower"}
PAIRS = [pair for pair in itertools.product(WRAPPERS, repeat=2) if not set(pair) <= PRUNING]


def loaded(family: str) -> Any:
    tiny = subject(family)
    return tiny.adapter(tiny.model("sdpa"))


def functions(model: nn.Module) -> dict[Any, Any]:
    """Every function that stands in a module itself, and those of classes that are wrapped."""
    own = {(name, key): value for name, module in model.named_modules() for key, value in vars(module).items()}
    return {place: value for place, value in own.items() if callable(value)} | {
        "rows": HeadAttention.rows,
        "peek": Recorder.peek,
    }


@pytest.mark.parametrize("outer, inner", PAIRS)
def test_wrappers_nest(outer, inner):
    adapter = loaded("llava")
    before = functions(adapter.model)
    with WRAPPERS[outer](adapter):
        between = functions(adapter.model)
        assert between != before
        with WRAPPERS[inner](adapter):
            assert functions(adapter.model) != between
        assert functions(adapter.model) == between
    assert functions(adapter.model) == before


def test_a_wrapper_between_decoder_layers_stays():
    """Qwen3-VL's decoder has a function of its own that the adapter wraps."""
    adapter = loaded("qwen3_vl")
    text, mine = adapter.text_model, adapter.text_model._deepstack_process
    with ExitStack() as stack:
        override(text, "_deepstack_process", mine, stack)
        with pruned(adapter.model, methods.build("fastv"), adapter=adapter):
            assert text._deepstack_process != mine
        assert vars(text)["_deepstack_process"] == mine
    assert "_deepstack_process" not in vars(text)


def test_a_search_within_reuse_gives_the_same_answers():
    tiny = subject("llava")
    adapter, inputs = loaded("llava"), tiny.batch(*tiny.samples)

    def logits() -> torch.Tensor:
        with torch.no_grad(), pruned(adapter.model, methods.build("fastv"), adapter=adapter) as session:
            session.sample_keys = ["0"] * len(inputs["input_ids"])
            return adapter.model(**inputs).logits

    expected = logits()
    with reusing(adapter) as features:
        logits()
        with shared(adapter) as kept:
            kept.start("batch", methods.build("fastv"))
            assert torch.equal(logits(), expected)
        assert torch.equal(logits(), expected)
    assert features.misses == 1 and features.hits >= 1


@pytest.mark.parametrize("own", [True, False])
def test_what_stood_there_stands_there_again(own):
    class Owner:
        def name(self) -> str:
            return "class"

    owner = Owner()
    if own:
        owner.name = None  # a value too
    before = dict(vars(owner))
    with ExitStack() as outer:
        override(owner, "name", lambda: "outer", outer)
        with ExitStack() as inner:
            override(owner, "name", None, inner)
            assert owner.name is None
        assert owner.name() == "outer"
        with ExitStack() as inner:
            override(owner, "name", lambda: "inner", inner)
        assert owner.name() == "outer"
    assert vars(owner) == before
