"""Second stage: fit the projector to pocket-llava's decoder; and, later, put places back into what it makes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pruneval.tasks.pocket import vision, world
from pruneval.tasks.pocket.onevision.build import CELLS
from pruneval.tasks.pocket.onevision.language import Log, Model, Pool
from pruneval.tasks.pocket.onevision.packing import VIEW, Writer
from pruneval.tasks.pocket.onevision.vision import HOLDS, boxes, coverage


@torch.no_grad()
def _lessons(
    llava: LlavaForConditionalGeneration, places: dict[str, Tensor], images: Pool, number: int, ground: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cells that hold things, and ``ground`` others per image: features, goals, which hold.

    The goal of a cell that holds a thing is the mean of pocket-llava's projected patches that hold it, plus, in the
    whole view, the vectors ``places`` for where it is; that of another, pocket-llava's patch at its place.
    """
    near = (np.arange(CELLS) * 2 + 1) * world.GRID // (2 * CELLS)
    fine = (np.arange(2 * CELLS) * 2 + 1) * world.GRID // (4 * CELLS)
    at = [np.add.outer(near * world.GRID, near).ravel()]
    at += [np.add.outer(fine[r : r + CELLS] * world.GRID, fine[c : c + CELLS]).ravel() for r in (0, 8) for c in (0, 8)]
    place = np.concatenate(at)
    features, goals, holds = [], [], []
    for first in range(0, number, 64):
        scenes = images.things[first : first + 64]
        out = llava.model.vision_tower(
            vision.pixels(np.stack([world.render(s) for s in scenes])), output_hidden_states=True
        )
        patches = llava.model.multi_modal_projector(out.hidden_states[vision.FEATURE][:, 1:])
        for i, scene in enumerate(scenes):
            cover = np.concatenate([coverage(boxes(scene), view).reshape(-1, VIEW) for view in range(5)], axis=1)
            empty = rng.permutation(np.nonzero(cover.max(0) == 0)[0])[:ground]
            cells, goal = [empty], [patches[i, place[empty]]]
            for thing, held in zip(scene.things, cover, strict=True):
                mine = np.nonzero(held >= HOLDS)[0]
                cells.append(mine)
                own = patches[i, list(world.patches(thing))].mean(0).repeat(len(mine), 1)
                own[torch.from_numpy(mine < VIEW)] += sum(
                    places[word] for word in (thing.vertical, thing.horizontal) if word
                )  # fmt: skip
                goal.append(own)
            chosen = np.concatenate(cells)
            features.append(images.features[first + i, chosen])
            goals.append(torch.cat(goal))
            holds.append(torch.arange(len(chosen)) >= len(empty))
    return torch.cat(features), torch.cat(goals), torch.cat(holds)


def align(
    model: Model, writer: Writer, llava: LlavaForConditionalGeneration, images: Pool, steps: int, seed: int, log: Log
) -> None:
    """Fit the projector: what it makes of a cell should be what pocket-llava's makes of the same place or thing.

    That alone left the decoder at chance about places (it may read them off the numbers of tokens, which are others
    here), so cells of the whole view also point at the words for their place. Differences are
    measured in units of the spread of things in every direction, so that place counts as much as kind and colour.
    """
    rng = np.random.default_rng([seed, 3])
    table = model.model.language_model.embed_tokens.weight.detach()
    words = {word: table[writer.encode(word)[0]] for word in ("top", "bottom", "left", "right")}
    size = table[[writer.encode(word)[0] for word in world.COLOURS]].norm(dim=-1).mean()
    places = {word: 4 * size * F.normalize(vector, dim=0) for word, vector in words.items()}
    features, goals, holds = _lessons(llava, places, images, min(768, len(images.things)), 16, rng)
    things = goals[holds] - goals[holds].mean(0)
    values, vectors = torch.linalg.eigh(things.T @ things / len(things))
    unit = vectors / (values + 0.01 * values.mean()).sqrt()
    projector = model.model.multi_modal_projector
    optimiser = torch.optim.AdamW(projector.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(len(features), size=3072))
        off = ((projector(features[rows].float()) - goals[rows]) @ unit).pow(2).mean(-1)
        held = off[holds[rows]].mean()
        loss = held + 0.2 * off[~holds[rows]].mean()
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 0.01 + (steps - step) / (0.7 * steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log({"stage": "align", "step": step + 1, "loss": loss.item(), "things": held.item()})


def put_places_back(model: Model, writer: Writer, images: Pool, steps: int, seed: int, log: Log) -> None:
    """Put places back: cells of the whole view point at the words for where their thing is; all else stays.

    The decoder's first course does not ask the projector for places while it does not read them, and they fade: from
    0.95 (of four quarters, read off the tower's features by a linear map) to 0.76 behind the projector. A decoder
    that is then shown whole views only learns to read them within a hundred steps.
    """
    rng = np.random.default_rng([seed, 6])
    table = model.model.language_model.embed_tokens.weight.detach()
    words = {word: table[writer.encode(word)[0]] for word in ("top", "bottom", "left", "right")}
    middle = torch.stack(list(words.values())).mean(0)
    features, shifts, number = [], [], min(900, len(images.things))
    for i, scene in enumerate(images.things[:number]):
        cover = np.concatenate([coverage(boxes(scene), view).reshape(-1, VIEW) for view in range(5)], axis=1)
        empty = rng.permutation(np.nonzero(cover.max(0) == 0)[0])[:8]
        features.append(images.features[i, empty])
        shifts.append(torch.zeros(len(empty), table.shape[1]))
        for thing, held in zip(scene.things, cover, strict=True):
            cells = np.nonzero(held >= HOLDS)[0]
            there = [F.normalize(words[word] - middle, dim=0) for word in (thing.vertical, thing.horizontal) if word]
            shift = torch.stack(there).sum(0) if there else torch.zeros(table.shape[1])
            features.append(images.features[i, cells])
            shifts.append(torch.from_numpy(cells < VIEW)[:, None] * shift)
    inputs, shift = torch.cat(features).float(), torch.cat(shifts)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        now = projector(inputs)
        held = now[shift.norm(dim=-1) > 0]
        goals = now + 0.7 * (held - held.mean(0)).norm(dim=-1).mean() * shift
    optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(len(inputs), size=2048))
        loss = (projector(inputs[rows]) - goals[rows]).pow(2).sum(-1).mean()
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (steps - step) / (0.75 * steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    log({"stage": "projector", "step": steps, "loss": loss.item()})
