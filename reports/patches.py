"""Pictures of what a method keeps: every tile, once per reduction, and where two methods agree."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DROPPED, KEPT, MERGED = 0, 1, 2
VEIL = (0.97, 0.97, 0.98, 0.84)
TINTS = {MERGED: (0.90, 0.62, 0.0, 0.45)}
ONLY = {"both": (0.0, 0.62, 0.45, 0.40), "first": (0.0, 0.45, 0.70, 0.50), "second": (0.84, 0.37, 0.0, 0.50)}
GAP, SIDE = 0.06, 240
"""Space between tiles as a share of a tile, and the pixels a tile is drawn with at least."""


@dataclass(frozen=True)
class Stage:
    """The visual tokens behind one reduction."""

    title: str
    state: np.ndarray
    """(N,) one of DROPPED, KEPT, MERGED for each visual token of the un-pruned prompt."""


@dataclass(frozen=True)
class Shown:
    """One method on one question."""

    label: str
    answer: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Canvas:
    """The tiles laid out side by side, and where each token stands on them."""

    picture: np.ndarray
    """(height, width, 3) in [0, 1]."""
    boxes: np.ndarray
    """(N, 4) top, left, bottom, right in pixels; -1 for tokens without a place (newlines)."""


def canvas(tiles: Sequence[np.ndarray], boxes: np.ndarray) -> Canvas:
    """Put the tiles on one canvas.

    Args:
        tiles: (height, width, 3) each, in [0, 1].
        boxes: (N, 5) tile, top, left, bottom, right as shares of the tile; NaN for tokens without a place.
    """
    height = max(SIDE, *(tile.shape[0] for tile in tiles))
    width = max(round(height * max(tile.shape[1] / tile.shape[0] for tile in tiles)), 1)
    across = math.ceil(math.sqrt(len(tiles)))
    down = math.ceil(len(tiles) / across)
    gap = round(GAP * height) * (len(tiles) > 1)
    picture = np.ones((down * (height + gap) - gap, across * (width + gap) - gap, 3))
    corners = []
    for at, tile in enumerate(tiles):
        top, left = at // across * (height + gap), at % across * (width + gap)
        rows = np.arange(height) * tile.shape[0] // height
        columns = np.arange(width) * tile.shape[1] // width
        picture[top : top + height, left : left + width] = tile[rows][:, columns]
        corners.append((top, left))
    placed = np.full((len(boxes), 4), -1, dtype=int)
    for token, (tile_of, *share) in enumerate(boxes):
        if not np.isnan(tile_of):
            top, left = corners[int(tile_of)]
            edges = np.array(share) * [height, width, height, width] + [top, left, top, left]
            placed[token] = np.round(edges).astype(int)
    return Canvas(picture, placed)


def draw(on: Canvas, shown: Sequence[Shown], question: str, reference: str = "", gold: str = "") -> Figure:
    """One row of pictures per method, one picture per reduction; with two methods, a last row where they agree.

    Args:
        on: the tiles.
        shown: one or two methods.
        question: the text that was asked.
        reference: the unpruned model's answer.
        gold: the right answer.
    """
    from matplotlib.figure import Figure

    across = max(1 + len(one.stages) for one in shown)
    rows = len(shown) + (len(shown) == 2)
    aspect = on.picture.shape[0] / on.picture.shape[1]
    size = min(3.2, 14 / across)
    figure = Figure(figsize=(max(6.0, size * across), size * aspect * rows + 0.9 + 0.35 * rows), layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for row, one in zip(panels, shown, strict=False):
        row[0].imshow(on.picture)
        row[0].axis("off")
        row[0].set_title(textwrap.fill(f"{one.label} {one.answer!r}", 48), fontsize=8)
        for panel, stage in zip(row[1:], one.stages, strict=False):
            kept = int((stage.state != DROPPED).sum())
            merged = int((stage.state == MERGED).sum())
            title = f"{stage.title}\n{kept} of {len(stage.state)}" + (f", {merged} merged (orange)" if merged else "")
            _panel(panel, on, [VEIL if s == DROPPED else TINTS.get(s) for s in stage.state], title)
    if len(shown) == 2:
        _overlap(panels[-1], on, shown)
    head = f"{textwrap.fill(question, 110)}\nunpruned: {reference!r}" + (f"; right: {gold!r}" if gold else "")
    figure.suptitle(head, fontsize=9)
    return figure


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Tokens both methods let through as a share of those at least one does; 1 where neither does."""
    one, other = first != DROPPED, second != DROPPED
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else 1.0


def _overlap(row: Sequence[Axes], on: Canvas, shown: Sequence[Shown]) -> None:
    first, second = (_last(one, len(on.boxes)) for one in shown)
    tints = [
        ONLY["both"] if a and b else ONLY["first"] if a else ONLY["second"] if b else VEIL
        for a, b in zip(first != DROPPED, second != DROPPED, strict=True)
    ]
    title = f"in the end: Jaccard {jaccard(first, second):.2f}\ngreen both, blue first only, orange second only"
    _panel(row[0], on, tints, title)


def _last(one: Shown, tokens: int) -> np.ndarray:
    return one.stages[-1].state if one.stages else np.full(tokens, KEPT)


def _panel(panel: Axes, on: Canvas, tints: Sequence[tuple[float, ...] | None], title: str) -> None:
    veil = np.zeros((*on.picture.shape[:2], 4))
    for (top, left, bottom, right), tint in zip(on.boxes, tints, strict=True):
        if top >= 0 and tint is not None:
            veil[top:bottom, left:right] = tint
    panel.imshow(on.picture)
    panel.imshow(veil)
    panel.axis("off")
    panel.set_title(title, fontsize=8)
