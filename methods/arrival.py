"""What a tower passed on, as the stream that enters the language model; for methods that prune inside the tower."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pruneval.methods.step import Reduction, Step, torch


def land(step: Step, in_order: bool) -> Reduction | None:
    """The reduction at layer 0 that lets the passed cells go on; None when all of them came through.

    Newlines, CLS tokens and tokens of cells that left are dropped. A passed cell without a token in the prompt (cut
    away as padding, resampled or pooled) is dropped too if cells of the same image have one and `in_order` is set; else
    it goes on as a token of its own.

    Args:
        step: the boundary at layer 0.
        in_order: whether tokens stand in the order of the prompt; otherwise tile by tile, as they left the tower.
    """
    passed = step.vision.passed()
    if passed is None:
        return None
    arrived = [tokens.to(step.visual.device) for tokens in step.vision.arrived()]
    tiles, parts = iter(range(len(passed))), []
    for count in step.vision.images:
        mine = list(itertools.islice(tiles, count))
        tokens = torch.cat([arrived[tile] for tile in mine])
        there = tokens >= 0
        if bool(there.all()) or (in_order and bool(there.any())):
            chosen = step.visual[tokens[there]]
            whole = there.new_zeros(len(chosen))
            parts.append((chosen.sort().values if in_order else chosen, whole, whole, None))
        else:
            carrier = _carrier(step, mine, tokens)
            values = torch.cat([passed[tile].features for tile in mine])
            parts.append((torch.where(there, step.visual[tokens], carrier), ~there, ~there, values[~there]))
    return stream(step, parts)


def _carrier(step: Step, tiles: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """The stream index that lends its kind to tokens of their own: the first of the image."""
    there = tokens[tokens >= 0]
    if len(there):
        return step.visual[there.min()]
    under = torch.isin(step.vision.tile_of().to(step.visual.device), step.visual.new_tensor(tiles))
    return step.visual[under.nonzero()[0, 0]]


def stream(
    step: Step, parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]
) -> Reduction:
    """Text and parts of it that are visual, each where its first token stood, in one stream.

    Args:
        step: the boundary.
        parts: (m,) stream indices in the order in which they go on; (m,) which of them carry a value; (m,) which of
            these are tokens of their own; the values in order, or None when there are none.
    """
    text = step.text
    keep = torch.cat([text, *(index for index, *_ in parts)])
    anchor = torch.cat([text, *(index.min().expand(len(index)) for index, *_ in parts)])
    none = torch.zeros_like(text, dtype=torch.bool)
    made = torch.cat([none, *(flag for _, flag, _, _ in parts)])
    own = torch.cat([none, *(flag for _, _, flag, _ in parts)])
    order = torch.sort(anchor, stable=True).indices
    values = [values for *_, values in parts if values is not None]
    if not values:
        return Reduction(keep[order])
    return Reduction(keep[order], torch.argsort(order)[made], torch.cat(values), own[made])
