"""What a promise is checked on: a method on a model with prompts, how the two are asked, and what a check may raise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruneval import methods
from pruneval.harness.adapters import Adapter, adapter_for
from pruneval.harness.session import Session, pruned
from pruneval.methods.base import Method

NEW = 3
"""Tokens generated per prompt."""

Inputs = dict[str, Any]


class Broken(AssertionError):
    """A promise does not hold; the message says what was seen."""


class NotApplicable(Exception):
    """The promise makes no sense for the pair; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A model to check on, with prompts.

    Attributes:
        name: for the table.
        model: kernel -> the model under that attention kernel.
        samples: single prompts of different lengths, each with images or videos; the first with one.
        batch: samples -> one left-padded batch.
        text: a prompt without images, or None.
        tolerance: largest difference between logits that should be equal, relative to their spread.
        adapter: the adapter of a model, with whatever its methods need besides.
        plain: what the plain model under the default kernel says to some inputs, once it has been asked.
    """

    name: str
    model: Callable[[str], nn.Module]
    samples: tuple[Inputs, ...]
    batch: Callable[..., Inputs]
    text: Inputs | None = None
    tolerance: float = 1e-6
    adapter: Callable[[nn.Module], Adapter] = adapter_for
    plain: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Case:
    """One method on one subject. `given` are parameters besides `keep`."""

    name: str
    subject: Subject
    keep: float = 0.4
    given: tuple[tuple[str, Any], ...] = ()

    def method(self, keep: float | None = None, **params: Any) -> Method:
        """The method at this case's budget (or at `keep`)."""
        known = {item.name for item in dataclasses.fields(methods.method_class(self.name))}
        budget = {"keep": self.keep if keep is None else keep} if "keep" in known else {}
        return methods.build(self.name, budget | dict(self.given) | {k: v for k, v in params.items() if k in known})

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model under the default kernel."""
        return self.subject.model("sdpa")

    def pruned(self, method: Method, model: nn.Module | None = None) -> AbstractContextManager[Session]:
        """The block in which the subject's model (or `model`) is pruned."""
        model = self.model if model is None else model
        return pruned(model, method, adapter=self.subject.adapter(model))


def generate(model: Any, inputs: Inputs, **options: Any) -> Any:
    """Greedy generation of `NEW` tokens with the logits of every step and the cache."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> Tensor:
    """(B, NEW, vocabulary) logits of a generation."""
    return torch.stack(out.logits, dim=1)


def plain(case: Case, name: str, inputs: Inputs) -> Tensor:
    """The plain model's logits for these inputs, which it is asked for once."""
    if name not in case.subject.plain:
        case.subject.plain[name] = steps(generate(case.model, inputs))
    return case.subject.plain[name]


def same(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    """Raises: Broken when logits differ by more than `tolerance` times their spread."""
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    finite = expected.isfinite() & found.isfinite()
    spread = float(expected[finite].std()) if bool(finite.any()) else 1.0
    worst = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    if worst > tolerance * max(spread, 1e-12):
        raise Broken(f"{what}: logits differ by {worst:.2g} (spread {spread:.2g})")
