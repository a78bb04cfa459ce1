"""The pocket world: small coloured shapes and digits on a dark, noisy, mostly irrelevant picture.

An image has 96 x 96 pixels and is read as 12 x 12 patches of 8 pixels. A thing (a shape or a digit) is 12 to 14
pixels large and lies inside a block of 2 x 2 patches, so it is held by 4 of the 144 patches; one to five things per
scene leave at least 86 % of the picture empty but for gradients, noise, faint lines and soft blobs that mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIZE = 96
PATCH = 8
GRID = SIZE // PATCH
BLOCK = 2
"""Side, in patches, of the block that holds a thing."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
RGB = {
    "red": (224, 48, 48),
    "green": (52, 190, 70),
    "blue": (66, 104, 240),
    "yellow": (228, 208, 52),
    "purple": (178, 66, 206),
    "white": (226, 226, 226),
}
MOST = 5
"""The largest number of things in a scene."""

HELDOUT_PAIRS = frozenset(
    {("circle", "green"), ("square", "purple"), ("triangle", "blue"), ("cross", "yellow"), ("ring", "red")}
    | {("2", "white"), ("5", "green"), ("8", "purple")}
)
"""Pairs of kind and colour that no training or test scene shows: every held-out scene shows at least one."""

SPLITS = ("train", "test", "heldout")

_FONT = {
    "0": "01110 10001 10001 10001 10001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11111 00010 00100 00110 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}


@dataclass(frozen=True)
class Thing:
    """One shape or digit; ``row`` and ``col`` are the first patch row and column of its 2 x 2 block (0 to 10)."""

    kind: str
    colour: str
    row: int
    col: int
    dy: int
    """Pixels from the top of the block to the top of the sprite."""
    dx: int
    size: int
    """Height of the sprite in pixels."""

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS

    @property
    def vertical(self) -> str | None:
        """ "top", "bottom", or None across the middle line."""
        return None if self.row == GRID // 2 - 1 else ("top" if self.row < GRID // 2 - 1 else "bottom")

    @property
    def horizontal(self) -> str | None:
        """ "left", "right", or None across the middle line."""
        return None if self.col == GRID // 2 - 1 else ("left" if self.col < GRID // 2 - 1 else "right")

    @property
    def quadrant(self) -> str | None:
        """ "top left" and so on, or None if the thing lies across a middle line."""
        if self.vertical is None or self.horizontal is None:
            return None
        return f"{self.vertical} {self.horizontal}"


@dataclass(frozen=True)
class Scene:
    """The things of an image, in reading order, and the seed of its background."""

    things: tuple[Thing, ...]
    seed: int


def patches(thing: Thing) -> tuple[int, ...]:
    """Row-major indices, in the 12 x 12 grid, of the four patches that hold the thing."""
    return tuple((thing.row + r) * GRID + thing.col + c for r in range(BLOCK) for c in range(BLOCK))


def draw(rng: np.random.Generator, split: str = "train", count: int | None = None) -> Scene:
    """Draw a scene of ``count`` things (one to five, evenly, by default).

    "train" and "test" differ by the caller's seeds only. A "heldout" scene shows at least one pair of kind and colour
    that neither of them ever shows, and, half of the time, a layout they never show: three or more things, all of
    them in the same half of the image.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
    heldout = split == "heldout"
    half = int(rng.integers(4)) if heldout and rng.random() < 0.5 else None
    if count is None:
        count = int(rng.integers(1, MOST + 1)) if half is None else int(rng.integers(3, MOST + 1))
    while True:
        places = _places(rng, count, half)
        if heldout or count < 3 or not _one_half(places):
            break
    looks = _looks(rng, count, heldout)
    things = [_thing(rng, *look, *place) for look, place in zip(looks, places, strict=True)]
    things.sort(key=lambda t: (t.row, t.col))
    return Scene(tuple(things), int(rng.integers(2**31)))


def render(scene: Scene) -> np.ndarray:
    """Paint a scene: uint8 array (96, 96, 3), the same for equal scenes."""
    canvas = _background(scene.seed)
    shade = np.random.default_rng(scene.seed + 1)
    for thing in scene.things:
        mask = _sprite(thing.kind, thing.size)
        top, left = thing.row * PATCH + thing.dy, thing.col * PATCH + thing.dx
        window = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
        colour = np.asarray(RGB[thing.colour], np.float32) + shade.uniform(-14, 14, 3).astype(np.float32)
        window += mask[..., None] * (colour - window)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _places(rng: np.random.Generator, count: int, half: int | None) -> list[tuple[int, int]]:
    """Blocks (row, col) at least one free patch apart; ``half`` 0-3 keeps them in the top, bottom, left or right."""
    middle, last = GRID // 2 - 1, GRID - BLOCK
    rows = (0, middle - 1) if half == 0 else (middle + 1, last) if half == 1 else (0, last)
    cols = (0, middle - 1) if half == 2 else (middle + 1, last) if half == 3 else (0, last)
    while True:
        found: list[tuple[int, int]] = []
        for _ in range(60):
            row, col = int(rng.integers(rows[0], rows[1] + 1)), int(rng.integers(cols[0], cols[1] + 1))
            if all(abs(row - r) > BLOCK or abs(col - c) > BLOCK for r, c in found):
                found.append((row, col))
                if len(found) == count:
                    return found


def _one_half(places: list[tuple[int, int]]) -> bool:
    middle = GRID // 2 - 1
    rows, cols = zip(*places, strict=True)
    return max(rows) < middle or min(rows) > middle or max(cols) < middle or min(cols) > middle


def _looks(rng: np.random.Generator, count: int, heldout: bool) -> list[tuple[str, str]]:
    """Kinds and colours; now and then one that is there already, so that counting has something to count."""
    looks: list[tuple[str, str]] = []
    if heldout:
        pairs = sorted(HELDOUT_PAIRS)
        looks.append(pairs[int(rng.integers(len(pairs)))])
    while len(looks) < count:
        kind = str(rng.choice(DIGITS if rng.random() < 0.4 else SHAPES))
        colour = str(rng.choice(COLOURS))
        if looks and rng.random() < 0.35:
            other = looks[int(rng.integers(len(looks)))]
            kind, colour = (other[0], colour) if rng.random() < 0.5 else (kind, other[1])
        if heldout or (kind, colour) not in HELDOUT_PAIRS:
            looks.append((kind, colour))
    return looks


def _thing(rng: np.random.Generator, kind: str, colour: str, row: int, col: int) -> Thing:
    side = BLOCK * PATCH
    if kind in DIGITS:
        return Thing(kind, colour, row, col, int(rng.integers(0, 3)), int(rng.integers(2, 5)), 14)
    size = int(rng.integers(12, 15))
    return Thing(
        kind, colour, row, col, int(rng.integers(0, side - size + 1)), int(rng.integers(0, side - size + 1)), size
    )


@lru_cache(maxsize=64)
def _sprite(kind: str, size: int) -> np.ndarray:
    """Coverage mask in [0, 1]: (14, 10) for a digit, (size, size), anti-aliased, for a shape."""
    if kind in DIGITS:
        rows = [[float(c) for c in row] for row in _FONT[kind].split()]
        return np.kron(np.asarray(rows, np.float32), np.ones((2, 2), np.float32))
    fine = 8
    axis = (np.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius = np.hypot(y, x)
    inside = {
        "circle": radius <= 1,
        "square": np.maximum(abs(y), abs(x)) <= 0.92,
        "triangle": abs(x) <= (y + 1) / 2,
        "cross": np.minimum(abs(y), abs(x)) <= 0.24,
        "ring": (radius <= 1) & (radius >= 0.58),
    }[kind]
    return inside.reshape(size, fine, size, fine).mean((1, 3)).astype(np.float32)


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """A fixed sheet of unit noise, (1024, 1024), that backgrounds are cut from."""
    return np.random.default_rng(20).standard_normal((1024, 1024)).astype(np.float32)


def _background(seed: int) -> np.ndarray:
    """A dark gradient with noise, faint lines and soft blobs: float32 (96, 96, 3)."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = rng.uniform(22, 52, 3)
    slope_y, slope_x = rng.uniform(-10, 10, 2)
    canvas += (slope_y * axis[:, None] + slope_x * axis[None, :])[..., None]
    for _ in range(int(rng.integers(1, 4))):
        cy, cx, width = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.1, 0.35)
        blob = np.exp(-((axis - cy) ** 2)[:, None] / width**2) * np.exp(-((axis - cx) ** 2)[None, :] / width**2)
        canvas += blob[..., None] * rng.uniform(-16, 22, 3).astype(np.float32)
    for _ in range(int(rng.integers(1, 5))):
        steps = np.arange(2 * SIZE)
        angle, y0, x0 = rng.uniform(0, np.pi), rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        y = (y0 + (steps - SIZE) * np.sin(angle)).astype(int)
        x = (x0 + (steps - SIZE) * np.cos(angle)).astype(int)
        keep = (y >= 0) & (y < SIZE) & (x >= 0) & (x < SIZE)
        canvas[y[keep], x[keep]] += np.float32(rng.uniform(10, 24))
    y, x = rng.integers(0, 1024 - SIZE, 2)
    strength = np.float32(rng.uniform(3, 8))
    canvas += strength * _noise()[y : y + SIZE, x : x + SIZE, None]
    return canvas
