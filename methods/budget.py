"""The setting of a method that meets a budget, found from its declared schedule.

Papers write "192 tokens" and mean different things; `solve` takes the currency by name and finds the method's knob
(`Method.knob`, usually `keep`) by bisection. What no knob of the method can reach is refused with the nearest it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pruneval.methods import build, method_class
from pruneval.methods.base import MethodError, Shape

Cost = Callable[[list[int]], float]

TOLERANCE = 0.25  # a setting further from the target than this share of it does not meet it


def solve(
    name: str,
    params: Mapping[str, Any],
    shape: Shape,
    n: int,
    currency: str,
    target: float,
    cost: Cost | None = None,
) -> dict[str, Any]:
    """The parameters with which a method meets a budget as closely as whole tokens allow.

    Args:
        name: of the method.
        params: its other parameters; the knob may not be among them.
        shape: of the model.
        n: visual tokens of the prompt.
        currency: "avg_in", "kept_after" or "final" (visual tokens), or any other name together with `cost`.
        target: in that currency.
        cost: the price of a schedule (visual tokens per layer), not falling when more tokens stay.

    Returns:
        `params` and the knob, the shortest decimal number that gives the best schedule.

    Raises:
        MethodError: when the method has no knob or no schedule, or can't reach the target; says what it can reach.
    """
    knob = method_class(name).knob
    if knob not in method_class(name).__dataclass_fields__:
        raise MethodError(f"{name}: has no single parameter that sets a budget")
    if knob in params:
        raise MethodError(f"{name}: {knob} is what is looked for, it can't be given")
    price = cost or PRICES.get(currency)
    if price is None:
        raise MethodError(f"unknown currency {currency!r}; known: {', '.join(PRICES)}, others need a cost")

    def value(setting: float) -> float:
        return price(build(name, {**params, knob: setting}).schedule(shape, n))

    low = _lowest(value)
    floor, ceiling = value(low), value(1.0)
    slack = 1e-9 * abs(target)
    if not floor - slack <= target <= ceiling + slack:
        said, end = ("above", floor) if target < floor else ("below", ceiling)
        raise MethodError(f"{name}: {currency} of {target:g} can't be reached, every setting is {said} it ({end:g})")
    above = _edge(value, low, 1.0, lambda found: found >= target - slack)
    best = above
    if above > low:
        below = math.nextafter(above, 0)
        if target - value(below) <= value(above) - target:
            best = below
    found = value(best)
    if abs(found - target) > TOLERANCE * abs(target):
        raise MethodError(f"{name}: {currency} of {target:g} can't be reached, the nearest setting gives {found:g}")
    first = _edge(value, low, best, lambda other: other >= found)
    after = _edge(value, best, 1.0, lambda other: other > found)
    return {**params, knob: _shortest(first, after, lambda setting: value(setting) == found)}


def _mean(schedule: list[int]) -> float:
    return sum(schedule) / len(schedule)


def _last(schedule: list[int]) -> float:
    return float(schedule[-1])


PRICES: dict[str, Cost] = {"avg_in": _mean, "kept_after": _last, "final": _last}


def _edge(value: Callable[[float], float], low: float, high: float, passes: Callable[[float], bool]) -> float:
    """The smallest setting between `low` and `high` whose value passes; `high` when none does."""
    if passes(value(low)):
        return low
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        if passes(value(middle)):
            high = middle
        else:
            low = middle


def _lowest(value: Callable[[float], float]) -> float:
    """The smallest setting the method takes. Raises: MethodError when it takes none below 1."""
    low, high = 0.0, 1.0
    error: MethodError | None = None
    middle = 1e-9
    while low < middle < high:
        try:
            value(middle)
            high = middle
            if error is None:
                return middle
        except MethodError as refusal:
            low, error = middle, refusal
        middle = (low + high) / 2
    if high == 1 and error is not None:
        raise error
    return high


def _shortest(first: float, after: float, fits: Callable[[float], bool]) -> float:
    """The number with the fewest decimals in [first, after), near its middle."""
    middle = (first + after) / 2
    for digits in range(1, 17):
        for setting in (round(middle, digits), math.floor(after * 10**digits) / 10**digits):
            if first <= setting <= after and 0 < setting <= 1 and fits(setting):
                return setting
    return first
