"""The parameters of a method from the command line: `--preset`, `--set`, `--budget`, in this order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pruneval import methods
from pruneval.harness import measure
from pruneval.harness.errors import UserError, unknown
from pruneval.harness.flops import lengths_of
from pruneval.harness.scoring import shape_of
from pruneval.methods.budget import solve

CURRENCIES = ("avg_in", "kept_after", "final", "tflops", "kv_bytes")


def parameters(pairs: Sequence[str]) -> dict[str, str]:
    """`["keep=0.5"]` as a dictionary; types are the method's business. Raises: UserError."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes NAME=VALUE, not {pair!r}")
        if name in found:
            raise UserError(f"--set {name} was given twice")
        found[name] = value
    return found


def choose(method: str, preset: str | None, given: Mapping[str, Any], budget: str | None, model: str) -> dict[str, Any]:
    """A method's parameters.

    Args:
        method: its name.
        preset: one of its published settings, or None.
        given: parameters that replace those of the preset.
        budget: "avg_in=128" in one of `CURRENCIES`, or None. The method's knob is solved for it on the prompt that the
            model's published costs assume (for an image of another size, tokens follow the same fractions).
        model: a shipped model's name or a folder.

    Raises:
        UserError: an unknown name, or a budget the method can't reach, with what it can.
    """
    if method not in methods.names():
        raise unknown("method", method, methods.names())
    params: dict[str, Any] = {}
    if preset is not None:
        presets = methods.method_class(method).presets
        if preset not in presets:
            raise unknown("preset", preset, presets) if presets else UserError(f"{method} has no presets")
        params |= presets[preset]
    params |= given
    return _solved(method, params, *asked(budget), model) if budget is not None else params


def asked(budget: str) -> tuple[str, float]:
    """A text like avg_in=128 as currency and target. Raises: UserError."""
    currency, equals, text = budget.partition("=")
    if not equals:
        raise UserError(f"--budget takes CURRENCY=VALUE, as avg_in=128, not {budget!r}")
    if currency not in CURRENCIES:
        raise unknown("currency", currency, CURRENCIES)
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not (0 < target < math.inf):
        raise UserError(f"--budget {currency} must be a number above 0, not {text!r}")
    return currency, target


def _solved(method: str, params: dict[str, Any], currency: str, target: float, model: str) -> dict[str, Any]:
    dimensions = measure.dimensions_for(model)
    whole = lengths_of(dimensions)

    def price(plan: list[int]) -> float:
        return measure.cost(dimensions, replace(whole, visual=tuple(plan)))[currency]

    try:
        return solve(
            method, params, shape_of(dimensions, whole), whole.given, currency, target,
            price if currency in ("tflops", "kv_bytes") else None,
        )  # fmt: skip
    except methods.MethodError as error:
        raise UserError(str(error)) from error
