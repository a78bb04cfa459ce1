"""First stage: teach the SigLIP tower to see, in whole images, in crops and in frames of clips.

There is no CLS token: after the last layer, which feeds the projector, every patch must say which kind and colour of
thing it holds (or none), and in which row and column of its view it is; the layer below must, too, at half the weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, SiglipVisionModel

from pruneval.tasks.pocket import clips, optim, world
from pruneval.tasks.pocket.clips import Clip
from pruneval.tasks.pocket.onevision import build
from pruneval.tasks.pocket.onevision.build import CELLS, TILE
from pruneval.tasks.pocket.world import COLOURS, KINDS, PATCH, SIZE, Scene

Box = tuple[str, str, float, float, float, float]
"""Kind, colour, top, left, height and width of a thing, in pixels of the image."""

HOLDS = 0.15
"""Share of a patch that a thing's box must cover for the patch to hold it."""
SHOWS = 0.4
"""Share of a thing that a view must show for its patches to be asked about its kind."""
UNASKED = -100


def boxes(scene: Scene) -> list[Box]:
    """The boxes of a scene's things."""
    return [
        (t.kind, t.colour, t.row * PATCH + t.dy, t.col * PATCH + t.dx, t.size, 10 if t.is_digit else t.size)
        for t in scene.things
    ]


def frame_boxes(clip: Clip, frame: int) -> list[Box | None]:
    """The boxes of a clip's actors in a frame; None for one that is not there."""
    return [
        (a.kind, a.colour, *spot, a.size, a.width) if (spot := a.path[frame]) else None for a in clip.actors
    ]  # fmt: skip


def coverage(found: Sequence[Box | None], view: int) -> np.ndarray:
    """Share of each patch of a view that each box covers: (boxes, 8, 8). View 0 is the whole image, 1-4 its crops."""
    scale = TILE / SIZE if view == 0 else 2 * TILE / SIZE
    corner = (0, 0) if view == 0 else ((view - 1) // 2 * TILE, (view - 1) % 2 * TILE)
    edges = np.arange(CELLS + 1) * PATCH
    cover = np.zeros((len(found), CELLS, CELLS))
    for i, box in enumerate(found):
        if box is not None:
            top, left, height, width = (scale * x for x in box[2:])
            sides = []
            for start, length, first in ((top, height, corner[0]), (left, width, corner[1])):
                start -= first
                sides.append(np.clip(np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start), 0, None))
            cover[i] = np.outer(*sides) / PATCH**2
    return cover


def labels(found: Sequence[Box | None], view: int) -> tuple[np.ndarray, np.ndarray]:
    """Kind and colour per patch (64,) of a view: 0 for background, ``UNASKED`` where a thing is hardly in it."""
    kind, colour = np.zeros(CELLS**2, np.int64), np.zeros(CELLS**2, np.int64)
    if not any(found):
        return kind, colour
    cover = coverage(found, view)
    scale = (TILE if view == 0 else 2 * TILE) / SIZE
    most, which = cover.max(0).ravel(), cover.argmax(0).ravel()
    for i, box in enumerate(found):
        if box is not None:
            mine = (which == i) & (most >= HOLDS)
            shown = cover[i].sum() * PATCH**2 / (scale**2 * box[4] * box[5])
            kind[mine] = KINDS.index(box[0]) + 1 if shown >= SHOWS else UNASKED
            colour[mine] = COLOURS.index(box[1]) + 1
    edge = (most > 0) & (most < HOLDS)
    kind[edge] = colour[edge] = UNASKED
    return kind, colour


class Seer(nn.Module):
    """The tower and the heads that teach it; only the tower is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(build.tower_config())
        width = self.tower.config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads = nn.ModuleDict(
            {"kind": nn.Linear(width, len(KINDS) + 1), "colour": nn.Linear(width, len(COLOURS) + 1)}
            | {"row": nn.Linear(width, CELLS), "col": nn.Linear(width, CELLS)}
        )

    def forward(self, views: Tensor, kind: Tensor, colour: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures for views (n, 3, 64, 64) with patch labels (n, 64)."""
        states = self.tower(views, output_hidden_states=True).hidden_states
        at = torch.arange(CELLS**2).expand(len(views), -1).flatten()
        kind, colour = kind.flatten(), colour.flatten()
        loss, seen = views.new_zeros(()), {}
        for norm, layer, weight in zip(self.norms, (-1, -2), (1.0, 0.5), strict=True):
            x = norm(states[layer]).flatten(0, 1)
            out = {name: head(x) for name, head in self.heads.items()}
            loss = loss + weight * (
                F.cross_entropy(out["kind"], kind, _less_ground(len(KINDS)))
                + F.cross_entropy(out["colour"], colour, _less_ground(len(COLOURS)))
                + 0.2 * F.cross_entropy(out["row"], at // CELLS)
                + 0.2 * F.cross_entropy(out["col"], at % CELLS)
            )
            if layer == -1:
                right = out["kind"].argmax(-1) == kind
                seen["kind"] = right[kind > 0].float().mean().item()
                seen["colour"] = (out["colour"].argmax(-1) == colour)[colour > 0].float().mean().item()
                seen["ground"] = right[kind == 0].float().mean().item()
        seen["loss"] = loss.item()
        return loss, seen


def _less_ground(names: int) -> Tensor:
    """Weights of labels: background counts a tenth."""
    return torch.tensor([0.1] + [1.0] * names)


def batch(rng: np.random.Generator, images: int, shots: int, split: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    """Views (5 ``images`` + ``shots``, 3, 64, 64), kinds and colours (.., 64), of new scenes and single frames."""
    scenes = [world.draw(rng, split) for _ in range(images)]
    films = [clips.draw(rng, split) for _ in range(shots)]
    moments = [int(rng.integers(film.frames)) for film in films]
    pictures = np.stack([world.render(s) for s in scenes])
    stills = np.stack([clips.render_clip(f)[m] for f, m in zip(films, moments, strict=True)])
    marks = [labels(boxes(s), view) for s in scenes for view in range(5)]
    marks += [labels(frame_boxes(f, m), 0) for f, m in zip(films, moments, strict=True)]
    kind, colour = (torch.from_numpy(np.stack(x)) for x in zip(*marks, strict=True))
    return (
        torch.cat([build.views(channels_first(pictures)).flatten(0, 1), build.frames(channels_first(stills))]),
        kind,
        colour,
    )


def channels_first(images: np.ndarray) -> Tensor:
    """Uint8 (n, height, width, 3) as a tensor (n, 3, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def train(
    llava: LlavaForConditionalGeneration, work: Path, steps: int, images: int, shots: int, seed: int,
    log: Callable[[dict[str, Any]], None],
) -> SiglipVisionModel:  # fmt: skip
    """Train the tower, or go on from the checkpoint in ``work``; returns it in evaluation mode."""
    torch.manual_seed(seed)
    seer = Seer()
    held = batch(np.random.default_rng([seed, 1, 0]), 32, 32, "test")
    build.adopt_tower(seer.tower, llava, held[0][:64])
    optimisers = optim.Optimisers(seer, "tower.encoder", steps, muon=3e-3, adam=2e-3, cooldown=0.7)
    path, first = work / "vision.pt", 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        seer.load_state_dict(kept["model"])
        optimisers.load(kept["optimisers"])
        first = kept["step"]
    start = time.time()
    data = optim.ahead(lambda step: batch(np.random.default_rng([seed, 0, step]), images, shots), first, steps)
    for step, inputs in enumerate(data, first):
        loss, _ = seer(*inputs)
        loss.backward()
        optimisers.step(step)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            with torch.no_grad():
                whole = seer(*(x[: 32 * 5].unflatten(0, (32, 5))[:, 0] for x in held))[1]
                seen = seer(*held)[1] | {"small": whole["kind"]}
            log({"stage": "vision", "step": step + 1, "seconds": round(time.time() - start), **seen})
        if (step + 1) % 100 == 0 or step + 1 == steps:
            optim.save(path, model=seer.state_dict(), optimisers=optimisers.state(), step=step + 1)
    return seer.tower.eval()
