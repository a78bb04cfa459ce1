"""Faults that other repositories' versions of these methods have, each built here and told apart from ours.

A property says what must hold of a method; it holds of ours and fails of the variant.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from steps import Rows, step

from pruneval import methods
from pruneval.harness.conformance import CHECKS, Broken, Case
from pruneval.harness.subjects import subject
from pruneval.methods.base import Method, Reduction, Step, strongest
from pruneval.methods.dart import DART
from pruneval.methods.fastv import FastV
from pruneval.methods.fitprune import FitPrune

Property = Callable[[Method], None]


def variant(kind: type[Method], **overrides: Any) -> type[Method]:
    """The method with functions of its own."""
    return type(kind.__name__, (kind,), overrides)


# FitPrune: an ascending sort of which the first are kept, instead of deleted (UniPruneBench)


def the_attended_stay(method: Method) -> None:
    """Visual tokens 1 and 3 get nearly all attention, of visual rows and of the question; half of four stay."""
    full = torch.zeros(2, 6, 6, dtype=torch.float64)
    full[:, :, :4] = torch.tensor([0.01, 0.5, 0.02, 0.4])
    one = step(0, 4, 2, layer=1, layers=4, total=16, seen={0: Rows(full)})
    assert method.reduce(one).keep.tolist() == [1, 3, 4, 5]


def inverted(self: FitPrune, step: Step) -> Reduction:
    count = self._goes_on(step.layer, len(step.visual))
    return step.keep(torch.sort(self.score(step), stable=True).indices[:count])


# FastV: tokens go on in the order of their scores (UniPruneBench), or all rows score (EffiVLM-Bench)

ROWS = torch.tensor([0.3, 0.1, 0.05, 0.4, 0.2])  # the last row's attention to five visual tokens


def attention(others: torch.Tensor) -> Rows:
    """(2, 8, 8): one text token, five visual ones, two more of text; every row but the last is like `others`."""
    full = torch.zeros(2, 8, 8, dtype=torch.float64)
    full[:, :, 1:6] = others
    full[:, -1, 1:6] = ROWS
    return Rows(full)


def order_is_kept(method: Method) -> None:
    keep = method.reduce(step(1, 5, 2, layer=2, seen={1: attention(ROWS)})).keep
    assert sorted(keep.tolist()) == keep.tolist()


def the_last_row_alone_scores(method: Method) -> None:
    kept = [
        method.reduce(step(1, 5, 2, layer=2, seen={1: attention(others)})).keep.tolist()
        for others in (torch.zeros(5), ROWS.flip(0), torch.full((5,), 0.2))
    ]
    assert kept[0] == kept[1] == kept[2] == [0, 1, 4, 6, 7]


def unsorted(self: FastV, step: Step) -> Reduction:
    count = self.counts(step.shape, step.total)[step.layer]
    best = torch.sort(self.score(step), descending=True, stable=True).indices[:count]
    return Reduction(torch.cat([step.text[: step.visual[0]], step.visual[best], step.question]))


def all_rows(self: FastV, step: Step) -> torch.Tensor:
    return step.seen[self.layer - 1].received().mean(0)[step.visual]


# DART: the tokens most like the pivots instead of the least


def duplicates_go(method: Method) -> None:
    """Token 0 is the pivot; 2 is nearly its copy, 3 its opposite."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64)[None, :, None]
    one = step(0, 4, 1, layer=2, hidden=hidden, seen={1: SimpleNamespace(key=key)})
    assert method.reduce(one).keep.tolist() == [0, 3, 4]


def most_alike(self: DART, step: Step, pivots: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(step.hidden, dim=-1)
    alike = (unit[step.visual] @ unit[pivots].T).masked_fill(torch.isin(step.visual, image)[:, None], -2)
    taken = torch.cat([image, *(strongest(column, self.each(len(step.visual))) for column in alike.unbind(1))])
    return taken.unique()


FAULTS: dict[str, tuple[Property, type[Method], dict[str, Any], dict[str, Any]]] = {
    "fitprune keeps what it should delete": (
        the_attended_stay, FitPrune, {"recipe": str(tiny.RECIPE), "keep": 0.2}, {"reduce": inverted},
    ),
    "fastv in the order of scores": (order_is_kept, FastV, {"keep": 0.4}, {"reduce": unsorted}),
    "fastv with the mean of all rows": (the_last_row_alone_scores, FastV, {"keep": 0.4}, {"score": all_rows}),
    "dart keeps duplicates": (
        duplicates_go, DART, {"image_pivots": 1, "text_pivots": 0, "keep": 0.25}, {"chosen": most_alike},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_property_tells_the_fault_apart(fault):
    holds, kind, params, overrides = FAULTS[fault]
    holds(kind(**params))
    with pytest.raises(AssertionError):
        holds(variant(kind, **overrides)(**params))


@pytest.mark.parametrize("fault", ["fastv in the order of scores", "fastv with the mean of all rows"])
def test_the_variants_differ_in_nothing_else(fault):
    """As many tokens, and where nothing tells rows or order apart the same ones: the fault alone is caught."""
    _, kind, params, overrides = FAULTS[fault]
    rising = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05])
    full = torch.zeros(2, 8, 8, dtype=torch.float64)
    full[:, :, 1:6] = rising
    one = step(1, 5, 2, layer=2, seen={1: Rows(full)})
    found = [method.reduce(one).keep.tolist() for method in (kind(**params), variant(kind, **overrides)(**params))]
    assert found[0] == found[1] == [0, 1, 2, 6, 7]


def test_the_engines_own_check_catches_a_wrong_order(monkeypatch):
    """Masking what was dropped gives the same answer only while the others keep their places."""
    case = Case("fastv", subject("llava"))
    CHECKS["masking"](case)
    monkeypatch.setattr(FastV, "reduce", unsorted_by_image)
    with pytest.raises(Broken, match="dropping against masking"):
        CHECKS["masking"](case)


def unsorted_by_image(self: FastV, step: Step) -> Reduction:
    """The same fault where a prompt has several images and text between them: visual places hold a permutation."""
    count = self.counts(step.shape, step.total)[step.layer]
    best = step.visual[torch.sort(self.score(step), descending=True, stable=True).indices[:count]]
    keep = torch.cat([step.text, best.sort().values]).sort().values
    visual = torch.isin(keep, best)
    keep[visual] = best
    return Reduction(keep)


def test_every_fault_is_one_of_a_registered_method():
    assert {kind for _, kind, _, _ in FAULTS.values()} <= {methods.method_class(name) for name in methods.names()}
