"""First stage: teach the CLIP tower to see.

Two layers are read by every patch: the layer that feeds the projector (``vision_feature_layer=-2``) and the one below
it. Each patch must say which kind and colour of thing it holds (or none) and in which row and column it is. The CLS
token, at the feature layer and after the last one, must name every pair of kind and colour in the image: to do so its
attention has to find the things.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from pruneval.tasks.pocket import optim
from pruneval.tasks.pocket.world import COLOURS, GRID, KINDS, MOST, PATCH, SIZE, Scene, draw, patches, render

MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
TOKENS = GRID * GRID
PAIRS = len(KINDS) * len(COLOURS)
LABELS = PAIRS + len(KINDS) + len(COLOURS)
FEATURE = -2


def config() -> CLIPVisionConfig:
    """The tower's dimensions."""
    return CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=128,
    )  # fmt: skip


def pixels(images: np.ndarray) -> Tensor:
    """What the processor makes of uint8 images (n, 96, 96, 3): float32 (n, 3, 96, 96)."""
    scaled = (images.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind and colour per patch (144,), 0 for background, and the multi-hot contents of the image (LABELS,)."""
    kind, colour = np.zeros(TOKENS, np.int64), np.zeros(TOKENS, np.int64)
    contents = np.zeros(LABELS, np.float32)
    for thing in scene.things:
        k, c = KINDS.index(thing.kind), COLOURS.index(thing.colour)
        held = list(patches(thing))
        kind[held], colour[held] = k + 1, c + 1
        contents[[k * len(COLOURS) + c, PAIRS + k, PAIRS + len(KINDS) + c]] = 1
    return kind, colour, contents


class Seer(nn.Module):
    """The tower and the heads that teach it; only the tower is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config())
        width = self.tower.config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.patch_heads = nn.ModuleDict(
            {"kind": nn.Linear(width, len(KINDS) + 1), "colour": nn.Linear(width, len(COLOURS) + 1)}
            | {"row": nn.Linear(width, GRID), "col": nn.Linear(width, GRID)}
        )
        self.cls_heads = nn.ModuleList(nn.Linear(width, LABELS + MOST) for _ in range(2))
        weight = torch.ones(len(KINDS) + 1)
        weight[0] = 0.1
        self.register_buffer("kind_weight", weight)
        weight = torch.ones(len(COLOURS) + 1)
        weight[0] = 0.1
        self.register_buffer("colour_weight", weight)

    def forward(
        self, images: Tensor, kind: Tensor, colour: Tensor, contents: Tensor, count: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures for images (n, 3, 96, 96), patch labels (n, 144), contents (n, LABELS), count (n,)."""
        states = self.tower(images, output_hidden_states=True).hidden_states
        n = len(images)
        at = torch.arange(TOKENS).expand(n, -1)
        loss, seen = images.new_zeros(()), {}
        for norm, layer, weight in zip(self.norms[:2], (FEATURE, FEATURE - 1), (1.0, 0.5), strict=True):
            x = norm(states[layer][:, 1:])
            out = {name: head(x).flatten(0, 1) for name, head in self.patch_heads.items()}
            loss = loss + weight * (
                F.cross_entropy(out["kind"], kind.flatten(), self.kind_weight)
                + F.cross_entropy(out["colour"], colour.flatten(), self.colour_weight)
                + 0.2 * F.cross_entropy(out["row"], (at // GRID).flatten())
                + 0.2 * F.cross_entropy(out["col"], (at % GRID).flatten())
            )
            if layer == FEATURE:
                held = kind.flatten() > 0
                seen["kind"] = (out["kind"].argmax(-1) == kind.flatten())[held].float().mean().item()
                seen["colour"] = (out["colour"].argmax(-1) == colour.flatten())[held].float().mean().item()
                seen["ground"] = (out["kind"].argmax(-1) == 0)[~held].float().mean().item()
        for norm, head, layer, weight in zip(self.norms[2:], self.cls_heads, (FEATURE, -1), (1.0, 0.5), strict=True):
            out_cls = head(norm(states[layer][:, 0]))
            bce = F.binary_cross_entropy_with_logits(out_cls[:, :LABELS], contents)
            loss = loss + weight * (20 * bce + 0.3 * F.cross_entropy(out_cls[:, LABELS:], count))
            if layer == FEATURE:
                said, true = out_cls[:, :PAIRS] > 0, contents[:, :PAIRS] > 0
                seen["f1"] = (2 * (said & true).sum() / (said.sum() + true.sum()).clamp(min=1)).item()
        seen["loss"] = loss.item()
        return loss, seen


def batch(rng: np.random.Generator, size: int, split: str = "train") -> tuple[Tensor, ...]:
    """Images and labels of ``size`` fresh scenes, in the order of ``Seer.forward``."""
    scenes = [draw(rng, split) for _ in range(size)]
    kind, colour, contents = (torch.from_numpy(np.stack(x)) for x in zip(*map(labels, scenes), strict=True))
    count = torch.tensor([len(s.things) - 1 for s in scenes])
    return pixels(np.stack([render(s) for s in scenes])), kind, colour, contents, count


def train(work: Path, steps: int, size: int, seed: int, log: Callable[[dict[str, Any]], None]) -> CLIPVisionModel:
    """Train the tower, or go on from the checkpoint in ``work``; returns it in evaluation mode."""
    torch.manual_seed(seed)
    seer = Seer()
    optimisers = optim.Optimisers(seer, "tower.encoder", steps, muon=3e-3, adam=2e-3)
    path, first = work / "vision.pt", 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        seer.load_state_dict(kept["model"])
        optimisers.load(kept["optimisers"])
        first = kept["step"]
    start, held = time.time(), batch(np.random.default_rng([seed, 1, 0]), 128, "test")
    data = optim.ahead(lambda step: batch(np.random.default_rng([seed, 0, step]), size), first, steps)
    for step, inputs in enumerate(data, first):
        loss, _ = seer(*inputs)
        loss.backward()
        optimisers.step(step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            with torch.no_grad():
                seen = seer(*held)[1]
            log({"stage": "vision", "step": step + 1, "seconds": round(time.time() - start), **seen})
        if (step + 1) % 200 == 0 or step + 1 == steps:
            optim.save(path, model=seer.state_dict(), optimisers=optimisers.state(), step=step + 1)
    return seer.tower.eval()
