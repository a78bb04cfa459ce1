"""Tokens that count as several in attention, and attention without rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from test_engine import Probe, generate, steps

from pruneval.harness.errors import UserError
from pruneval.harness.layout import Layout, Tokens
from pruneval.harness.session import pruned
from pruneval.harness.stream import Stream
from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step

SAMPLES = (tiny.prompt(5, 7, 1, 1), tiny.prompt(9, 3, 1, 3))
LAYER = 3  # the last: what copies see of each other matters to no later layer


@dataclass(frozen=True)
class Copied(Method):
    """Lets every second visual token count as two: by its weight, or as a copy at the same position."""

    card: ClassVar[Card] = Card("copied", "Copied", seam=("layer",), summary="")
    weighted: bool = True

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {LAYER: Needs()}

    def reduce(self, step: Step) -> Reduction:
        twice = step.visual[1::2]
        everything = torch.arange(len(step.origin))
        if self.weighted:
            return Reduction(everything, weights=torch.ones(len(everything)).index_fill(0, twice, 2))
        keep, order = torch.cat([everything, twice]).sort(stable=True)
        slots = (order >= len(everything)).nonzero().squeeze(-1)
        return Reduction(keep, slots, step.hidden[keep[slots]], torch.ones(len(slots), dtype=torch.bool))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_weight_of_two_is_a_copy(kernel):
    model, inputs = tiny.shared(kernel), tiny.batch(*SAMPLES)
    plain = steps(generate(model, inputs))
    answers = []
    for weighted in (True, False):
        with pruned(model, Copied(weighted)) as session:
            answers.append(steps(generate(model, inputs)))
            assert len(session.trace.layouts) == 1
    torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)
    assert (answers[0] - plain).abs().amax() > 1e-3


def test_weights_show_in_the_rows_methods_read_afterwards():
    model, found = tiny.shared("eager"), {}

    def see(step: Step) -> Reduction | None:
        if step.layer == 1:
            return Reduction(torch.arange(len(step.origin)), weights=torch.arange(1.0, len(step.origin) + 1))
        found["seen"], found["next"] = step.seen[1].rows(-1), step.next.rows([-1, 3])
        return None

    with torch.no_grad(), pruned(model, Probe({1: Needs(), 2: Needs(attention=(1,), next=True)}, see)):
        out = model(**SAMPLES[0], output_attentions=True)
    torch.testing.assert_close(found["seen"], out.attentions[1][0, :, -1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["next"], out.attentions[2][0][:, [-1, 3]], rtol=1e-5, atol=1e-5)


def test_kernels_without_additive_masks_refuse_weights():
    tokens = Tokens(torch.arange(2), torch.ones(2) > 0, torch.zeros(2) > 0, torch.arange(2), torch.tensor([1.0, 2]))
    with pytest.raises(UserError, match="flash_attention_2 has not"):
        Stream(Layout(1, (tokens,)), "flash_attention_2", None, torch.tensor([1]), torch.device("cpu"))


@pytest.mark.parametrize("pruning", [False, True])
def test_rotary_embedding_can_be_taken_off_and_put_on(pruning):
    """Taken off, queries and keys are the projections of the layer's normed input."""
    model, found = tiny.shared(), []
    norm = model.model.language_model.layers[2]
    attention = norm.self_attn

    def see(step: Step) -> Any:
        if step.layer == 1:
            return step.keep(torch.arange(0, len(step.visual), 3)) if pruning else None
        if step.layer == 2:
            step.memory["coming"] = norm.input_layernorm(step.hidden), step.next
            return None
        (normed, coming), seen = step.memory["coming"], step.seen[2]
        found.append(seen)
        for one in (coming, seen):
            bare = one.unrotated()
            query = attention.q_proj(normed).unflatten(-1, (4, -1)).transpose(0, 1)
            key = attention.k_proj(normed).unflatten(-1, (2, -1)).transpose(0, 1)
            torch.testing.assert_close(bare.query, query, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bare.key, key, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one.rotated(query), one.query, rtol=1e-5, atol=1e-5)
            assert (one.query - query).abs().amax() > 1e-2
        return None

    asked = {1: Needs(), 2: Needs(next=True), 3: Needs(attention=(2,))}
    with torch.no_grad(), pruned(model, Probe(asked, see)):
        model(**tiny.batch(*SAMPLES))
    assert len(found) == 2
