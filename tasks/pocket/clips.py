"""The pocket world in motion: clips of eight frames in which things move, or appear one after another.

A frame has 96 x 96 pixels, like an image of the world. In a "move" clip one of two to four things moves in a straight
line and the others stand still; in an "appear" clip up to five things appear, each at a frame of its own, and stay to
the end or for two or three frames. ``ask`` makes questions about what moves, where to, in which order things appear and
how many there are. Nothing but numpy is needed, but for ``write_video``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pruneval.tasks.pocket.questions import NUMBERS, Question, phrase
from pruneval.tasks.pocket.world import (
    COLOURS,
    DIGITS,
    HELDOUT_PAIRS,
    MOST,
    RGB,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    _sprite,
    render,
)

FRAMES = 8
EVENTS = ("move", "appear")
SKILLS = ("moved", "direction", "order", "count")
DIRECTIONS = ("left", "right", "up", "down")
TURNS = ("first", "second", "last")
LEAST_MOVE, MOST_MOVE = 40, 64
"""Pixels that a thing moves over the whole clip."""

Spot = tuple[int, int] | None
"""(top, left) of a thing in a frame, in pixels, or None while it is not there."""


@dataclass(frozen=True)
class Actor:
    """One shape or digit and where it is in every frame."""

    kind: str
    colour: str
    size: int
    """Height in pixels."""
    path: tuple[Spot, ...]
    direction: str | None = None
    """Where it moves to; None if it stands still."""

    @property
    def is_digit(self) -> bool:
        return self.kind in DIGITS

    @property
    def start(self) -> int:
        """The first frame that shows it."""
        return next(i for i, spot in enumerate(self.path) if spot)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return 10 if self.is_digit else self.size


@dataclass(frozen=True)
class Clip:
    """What happens in a video, and the seed of its background; the actors of an "appear" clip stand in order."""

    event: str
    actors: tuple[Actor, ...]
    seed: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.actors[0].path)


def draw(rng: np.random.Generator, split: str = "train", event: str | None = None) -> Clip:
    """Draw a clip, of the event if one is given. Splits are those of ``world.draw``.

    All things of a clip differ in kind, so that a kind is a name. A "heldout" clip shows at least one pair of kind and
    colour that the other splits never show.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
    event = event or EVENTS[int(rng.integers(len(EVENTS)))]
    if event not in EVENTS:
        raise ValueError(f"unknown event {event!r}; expected one of {EVENTS}")
    most = MOST if event == "appear" else 4
    count = int(rng.integers(1 if event == "appear" else 2, most + 1))
    looks = _looks(rng, count, split == "heldout")
    sizes = [14 if kind in DIGITS else int(rng.integers(12, 15)) for kind, _ in looks]
    make = _moving if event == "move" else _appearing
    actors = [Actor(*look, size, *way) for look, size, way in zip(looks, sizes, make(rng, sizes), strict=True)]
    return Clip(event, tuple(actors), int(rng.integers(2**31)))


def render_clip(clip: Clip) -> np.ndarray:
    """Paint a clip: uint8 array (frames, 96, 96, 3), the same for equal clips."""
    ground = render(Scene((), clip.seed)).astype(np.float32)
    rng = np.random.default_rng(clip.seed + 1)
    colours = [np.asarray(RGB[a.colour], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32) for a in clip.actors]
    frames = ground[None] + 2 * rng.standard_normal((clip.frames, SIZE, SIZE, 1), np.float32)
    for actor, colour in zip(clip.actors, colours, strict=True):
        mask = _sprite(actor.kind, actor.size)[..., None]
        for frame, spot in zip(frames, actor.path, strict=True):
            if spot:
                window = frame[spot[0] : spot[0] + mask.shape[0], spot[1] : spot[1] + mask.shape[1]]
                window += mask * (colour - window)
    return np.clip(frames, 0, 255).astype(np.uint8)


def ask(clip: Clip, rng: np.random.Generator, skill: str) -> Question | None:
    """Ask a question of the skill, or return None if the clip allows none; its evidence are indices of actors."""
    makers = {"moved": _moved, "direction": _direction, "order": _order, "count": _count}
    if skill not in makers:
        raise ValueError(f"unknown skill {skill!r}; expected one of {SKILLS}")
    return makers[skill](clip, rng)


def write_video(path: Path, frames: np.ndarray, fps: int = 2) -> None:
    """Write uint8 frames (n, height, width, 3) as an H.264 file, nearly without loss (4:4:4 colour).

    Raises:
        ValueError: frames of another shape or type.
    """
    import av

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (n, height, width, 3), not {frames.dtype} {frames.shape}")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "6", "preset": "medium", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def _looks(rng: np.random.Generator, count: int, heldout: bool) -> list[tuple[str, str]]:
    looks: list[tuple[str, str]] = []
    if heldout:
        pairs = sorted(HELDOUT_PAIRS)
        looks.append(pairs[int(rng.integers(len(pairs)))])
    while len(looks) < count:
        look = str(rng.choice(DIGITS if rng.random() < 0.4 else SHAPES)), str(rng.choice(COLOURS))
        if all(look[0] != kind for kind, _ in looks) and (heldout or look not in HELDOUT_PAIRS):
            looks.append(look)
    return [looks[i] for i in rng.permutation(count).tolist()]


Way = tuple[tuple[Spot, ...], str | None]


def _moving(rng: np.random.Generator, sizes: list[int]) -> list[Way]:
    """The ways of things of which one moves; the others keep clear of all it passes."""
    mover = int(rng.integers(len(sizes)))
    direction = str(rng.choice(DIRECTIONS))
    length = int(rng.integers(LEAST_MOVE, MOST_MOVE + 1))
    first, last = int(rng.integers(0, 3)), int(rng.integers(FRAMES - 3, FRAMES))
    share = np.clip((np.arange(FRAMES) - first) / (last - first), 0, 1)
    moved = np.rint(share * length).astype(int) * (-1 if direction in ("left", "up") else 1)
    room = SIZE - sizes[mover]
    along = int(rng.integers(0, room - length + 1)) + (length if direction in ("left", "up") else 0)
    across = int(rng.integers(0, room + 1))
    horizontal = direction in ("left", "right")
    path = tuple((across, along + int(m)) if horizontal else (along + int(m), across) for m in moved)
    taken = [(*spot, sizes[mover]) for spot in path]
    ways: list[Way] = []
    for i, size in enumerate(sizes):
        if i == mover:
            ways.append((path, direction))
            continue
        spot = _free(rng, size, taken)
        taken.append((*spot, size))
        ways.append(((spot,) * FRAMES, None))
    return ways


def _appearing(rng: np.random.Generator, sizes: list[int]) -> list[Way]:
    """The ways of things that appear at different frames, in their order."""
    starts = np.sort(rng.permutation(FRAMES - 1)[: len(sizes)]).tolist()
    stay = rng.random() < 0.5
    taken: list[tuple[int, int, int]] = []
    ways: list[Way] = []
    for size, start in zip(sizes, starts, strict=True):
        spot = _free(rng, size, taken)
        taken.append((*spot, size))
        end = FRAMES if stay else start + int(rng.integers(2, 4))
        ways.append((tuple(spot if start <= i < end else None for i in range(FRAMES)), None))
    return ways


def _free(rng: np.random.Generator, size: int, taken: list[tuple[int, int, int]], gap: int = 6) -> tuple[int, int]:
    """A place at least ``gap`` pixels away from all that is taken, or, in a very full picture, a little less."""
    for tries in range(10_000):
        top, left = rng.integers(0, SIZE - size + 1, 2).tolist()
        near = gap - tries // 500
        if all(max(top - t - s, t - top - size, left - x - s, x - left - size) >= near for t, x, s in taken):
            return top, left
    raise RuntimeError("no room is left in the frame")


def _moved(clip: Clip, rng: np.random.Generator) -> Question | None:
    if clip.event != "move":
        return None
    mover = next(i for i, a in enumerate(clip.actors) if a.direction)
    actor, form = clip.actors[mover], rng.random()
    if form < 0.4:
        noun, options = ("number", DIGITS) if actor.is_digit else ("shape", SHAPES)
        return Question("moved", f"What {noun} moves in the video?", actor.kind, (mover,), options)
    if form < 0.7:
        return Question("moved", "What color is the object that moves?", actor.colour, (mover,), COLOURS)
    i = mover if rng.random() < 0.5 else int(rng.integers(len(clip.actors)))
    words = phrase(clip.actors[i].kind, clip.actors[i].colour if rng.random() < 0.5 else None)
    return Question("moved", f"Does the {words} move?", "yes" if i == mover else "no", (i,), ("yes", "no"))


def _direction(clip: Clip, rng: np.random.Generator) -> Question | None:
    if clip.event != "move":
        return None
    mover = next(i for i, a in enumerate(clip.actors) if a.direction)
    actor = clip.actors[mover]
    words = "object" if rng.random() < 0.4 else phrase(actor.kind, actor.colour if rng.random() < 0.5 else None)
    text = f"In which direction does the {words} move?"
    return Question("direction", text, str(actor.direction), (mover,), DIRECTIONS)


def _order(clip: Clip, rng: np.random.Generator) -> Question | None:
    if clip.event != "appear" or len(clip.actors) < 2:
        return None
    everyone = tuple(range(len(clip.actors)))
    if rng.random() < 0.4:
        i, j = rng.permutation(len(clip.actors))[:2].tolist()
        one, other = (phrase(clip.actors[k].kind, clip.actors[k].colour) for k in (i, j))
        text = f"Does the {one} appear before the {other}?"
        return Question("order", text, "yes" if i < j else "no", (i, j), ("yes", "no"))
    turn = str(rng.choice(TURNS))
    i = {"first": 0, "second": 1, "last": len(clip.actors) - 1}[turn]
    if rng.random() < 0.5:
        text = f"What color is the object that appears {turn}?"
        return Question("order", text, clip.actors[i].colour, everyone, COLOURS)
    return Question("order", f"Which object appears {turn}?", clip.actors[i].kind, everyone, (*SHAPES, *DIGITS))


def _count(clip: Clip, rng: np.random.Generator) -> Question | None:
    verb = "appear" if clip.event == "appear" else "are"
    text = f"How many objects {verb} in the video?"
    return Question("count", text, str(len(clip.actors)), tuple(range(len(clip.actors))), NUMBERS)
