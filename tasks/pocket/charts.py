"""Bar charts in the drawn world: coloured bars on its dark backgrounds, with a tick for every ten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pruneval.tasks.pocket.world import COLOURS, RGB, SIZE, Scene, render

FLOOR = 88
"""The row of pixels the bars stand on."""
UNIT = 0.8
"""Pixels per unit of value: a hundred is 80 pixels high."""


@dataclass(frozen=True)
class Chart:
    """Bars from left to right, colours and values in (0, 100], and the seed of the background."""

    colours: tuple[str, ...]
    values: tuple[int, ...]
    seed: int


def draw_chart(rng: np.random.Generator) -> Chart:
    """Three to five bars of different colours and different values, multiples of 5."""
    count = int(rng.integers(3, 6))
    colours = tuple(COLOURS[i] for i in rng.permutation(len(COLOURS))[:count])
    values = tuple(5 * int(v) for v in rng.permutation(np.arange(2, 21))[:count])
    return Chart(colours, values, int(rng.integers(2**31)))


def render_chart(chart: Chart) -> np.ndarray:
    """Paint a chart: uint8 array (96, 96, 3)."""
    canvas = render(Scene((), chart.seed)).copy()
    for tick in range(0, 101, 10):
        canvas[FLOOR - round(tick * UNIT), 2 : 8 if tick % 50 == 0 else 5] = 200
    canvas[FLOOR : FLOOR + 2, 8:] = 200
    width = (SIZE - 12) // len(chart.values)
    for place, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True)):
        left = 12 + place * width
        canvas[FLOOR - round(value * UNIT) : FLOOR, left : left + width - 4] = RGB[colour]
    return canvas
