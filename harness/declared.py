"""The lengths that a method declares: what a model's usual lengths become under its schedules."""

from __future__ import annotations

from dataclasses import replace

from pruneval.harness.dimensions import Dimensions
from pruneval.harness.errors import UserError
from pruneval.harness.flops import Lengths
from pruneval.harness.scoring import helpers, scoring, shape_of
from pruneval.methods.base import Method, MethodError, Shape

TOWER_WHOLE = "what leaves inside the vision tower, which is counted whole"


def declared(
    method: Method, dimensions: Dimensions, whole: Lengths, helper: Dimensions | None = None
) -> tuple[Lengths, list[str]]:
    """The lengths of a sample with the method, and in words what of its cost is not in them.

    Args:
        method: the method.
        dimensions: the model.
        whole: the lengths of the un-pruned sample.
        helper: the method's helper model.

    Raises:
        UserError: when the method does not go with the model, or its counts depend on the sample.
    """
    shape = shape_of(dimensions, whole)
    try:
        method.needs(shape)  # refuses what the method cannot do on this model
        plan, about = _plan(method, shape, whole.given)
        lengths, left = _in_tower(method, shape, replace(whole, visual=plan))
        lengths = replace(lengths, scoring=scoring(method, dimensions, lengths))
        lengths = replace(lengths, helpers=helpers(method, dimensions, lengths, helper))
    except ValueError as error:
        raise UserError(str(error)) from error
    except NotImplementedError as error:
        raise UserError(f"{method.signature} declares no schedule for {dimensions.name}") from error
    lengths, open_end = _decoded(method, shape, lengths)
    if method.card.merges:
        open_end.append("merging: similarities, sums and the projection of merged tokens")
    if method.params.get("checkpoint") == "":
        open_end.append("what the method was trained for: no checkpoint was given")
    return lengths, about + left + open_end


def _plan(method: Method, shape: Shape, visual: int) -> tuple[tuple[int, ...], list[str]]:
    """Visual tokens that enter each decoder layer; in words, when they are only about what is declared."""
    try:
        return tuple(method.schedule(shape, visual)), []
    except MethodError as error:
        near = method.declarable()
        if near is None:
            raise
        return tuple(near.schedule(shape, visual)), [f"a few visual tokens more or fewer: {error}"]


def _in_tower(method: Method, shape: Shape, whole: Lengths) -> tuple[Lengths, list[str]]:
    """The vision lengths of a method that works inside the tower or before it, and what of them is not declared."""
    places = method.encoding(shape)
    if not places and not method.resizing(shape):
        return whole, []
    tiles = sum(many for many, _ in whole.vision[0])
    cells = whole.patches // tiles
    try:
        if any(len(groups) > 1 for groups in whole.vision):
            raise ValueError("its windows lose tokens unevenly")
        entering = method.encoder_schedule(shape, cells)
    except ValueError as error:
        return whole, [f"{TOWER_WHOLE}: {error}"]
    each = whole.projector // tiles
    lost = cells + shape.has_cls - entering[-1] if places and each in (cells, cells + shape.has_cls) else 0
    fed = [
        entering[min(layer + (places.get(layer) == "attention"), len(entering) - 1)] for layer in range(len(entering))
    ]
    tower = tuple(((tiles, size),) for size in entering)
    lengths = replace(whole, vision=tower, fed=tuple(tiles * n for n in fed), projector=tiles * (each - lost))
    return replace(lengths, patches=tiles * (entering[0] - shape.has_cls)), []


def _decoded(method: Method, shape: Shape, lengths: Lengths) -> tuple[Lengths, list[str]]:
    """The lengths with what the caches are declared to hold, and what of it is not declared."""
    left = []
    if method.selecting(shape):
        left.append("decode steps attend to fewer tokens than the caches hold: counted as if to all")
    try:
        steps = range(lengths.steps + 1)
        cached = tuple(tuple(method.caching(shape, lengths.visual, step)) for step in steps)
    except ValueError as error:
        return lengths, [*left, f"{error}: counted as if nothing did"]
    return (replace(lengths, cached=cached) if any(one != lengths.visual for one in cached) else lengths), left
