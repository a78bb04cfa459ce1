"""PruneVid (ACL 2025, arXiv 2412.16117; Visual-AI/PruneVid at b12600c): merge what lasts, then keep what is asked for.

Before the language model the frames of a video are clustered into segments (density peaks of frame means, refined to
unbroken runs). A place whose tokens stay alike through a segment (mean pairwise cosine above `static`) becomes one
token, the mean; the segment's other tokens are dynamic. The static tokens of a segment, and the dynamic ones of each
frame, are then merged spatially: more than 14 become `spatial` times as many clusters, each its mean. A segment's
static tokens go before its dynamic ones; positions are compact.

Behind decoder layer `layer` the fraction `keep` of each segment's static and of each frame's dynamic tokens stays, by
the highest attention that any head of any text token after the last visual one gives them there. Survivors keep their
positions, and the caches of layers up to `layer` lose the others too (`earlier` = "full" leaves them).

Clusters go on in the order of their centres, and ties of density go to the lower index where the released code adds
noise; a group keeps at least one token where it may lose all (`least` = 0). A frame alone in its segment is dynamic.
An image has nothing to merge, and is one group. Newlines and CLS tokens of videos stay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    boundary,
    strongest,
    torch,
)
from pruneval.methods.sparsevlm import density_peaks

ROUNDING = 1e-9  # keeps exact products from falling to the other side of a whole number
NEIGHBOURS = 7
SMALL = 14  # groups up to this size are not merged spatially


@dataclass(frozen=True)
class PruneVid(Method):
    """Keeps a fraction `keep` (alpha) of the merged tokens; 1 switches the whole method off.

    `stages` is both, merge (what happens before the language model only) or select (behind layer `layer` only).
    """

    card: ClassVar[Card] = Card(
        "prunevid",
        "PruneVid",
        seam=("embed", "layer", "decode"),
        summary="Merges tokens that last or repeat in a video, then keeps those the question looks at, in all caches.",
        paper="PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
        year=2025,
        arxiv="2412.16117",
        repository="Visual-AI/PruneVid",
        commit="b12600c",
        prompt_aware=True,
        merges=True,
    )
    positions: ClassVar[Positions] = "original"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "pllava-7b@16frames": {"keep": 0.4, "layer": 10, "static": 0.8, "temporal": 0.25, "spatial": 0.5},
    }

    keep: float = 0.4
    layer: int = 10
    static: float = 0.8
    temporal: float = 0.25
    spatial: float = 0.5
    stages: str = "both"
    earlier: str = "shrunk"
    least: int = 1

    def check(self) -> None:
        for name in ("temporal", "spatial"):
            if not 0 < getattr(self, name) <= 1:
                raise MethodError(f"prunevid: {name} must be in (0, 1], not {getattr(self, name):g}")
        if self.stages not in ("both", "merge", "select"):
            raise MethodError(f"prunevid: stages must be both, merge or select, not {self.stages!r}")
        if self.earlier not in ("shrunk", "full"):
            raise MethodError(f"prunevid: earlier must be shrunk or full, not {self.earlier!r}")
        if self.least not in (0, 1):
            raise MethodError(f"prunevid: least must be 0 or 1, not {self.least}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        needs = {0: Needs(frames=True)}
        if self.stages != "merge":
            boundary("prunevid", self.layer, shape)
            boundary("prunevid", self.layer + 1, shape)
            needs[self.layer + 1] = Needs(attention=(self.layer,))
        return needs

    def schedule(self, shape: Shape, n: int) -> list[int]:
        """Of an image, which nothing is merged in."""
        if self.stages == "merge":
            return [n] * shape.layers
        return [n] * (self.layer + 1) + [self.share(n)] * (shape.layers - self.layer - 1)

    def caching(self, shape: Shape, entered: Sequence[int], generated: int) -> list[int]:
        return [min(entered)] * shape.layers if self.earlier == "shrunk" else list(entered)

    def share(self, n: int) -> int:
        """Tokens that stay of a group of n."""
        return min(n, max(self.least, math.floor(n * self.keep + ROUNDING)))

    def reduce(self, step: Step) -> Reduction | None:
        if self.keep == 1 and self.stages != "merge":
            return None
        return self._merge(step) if step.layer == 0 else self._select(step)

    # Before the language model

    def _merge(self, step: Step) -> Reduction | None:
        device, groups = step.origin.device, []
        clips = step.clips if self.stages != "select" else ()
        inside = torch.cat([clip.flatten() for clip in step.clips]) if step.clips else step.visual[:0]
        for start, stop in step.spans:
            image = step.visual[(step.visual >= start) & (step.visual < stop)]
            if not bool(torch.isin(image, inside).any()):
                groups.append(image)
        rest = torch.ones(len(step.origin), dtype=torch.bool, device=device)
        if clips:
            rest[inside] = False
        order = [rest.nonzero().squeeze(-1)]
        place, made, merged = list(order), [torch.zeros_like(order[0])], [step.hidden[:0]]
        for clip in clips:
            for first, stop in self.segments(step.hidden[clip].mean(1)):
                for where, tokens in self.parts(step.hidden, clip[first:stop]):
                    groups.append(torch.stack([members[0] for members in tokens]))
                    order.append(groups[-1])
                    place.append(where.expand(len(tokens)))
                    sizes = torch.tensor([len(members) for members in tokens], device=device)
                    made.append((sizes > 1).long())
                    merged += [step.hidden[members].mean(0, keepdim=True) for members in tokens if len(members) > 1]
        if self.stages == "select":
            groups += [frame for clip in step.clips for frame in clip]
        step.memory["groups"] = groups
        keep, at = torch.cat(order), torch.sort(torch.cat(place), stable=True).indices
        if len(keep) == len(rest) and bool((keep[at].diff() == 1).all()):
            return None
        back = torch.empty_like(at)
        back[at] = torch.arange(len(at), device=device)
        slots = back[torch.cat(made).nonzero().squeeze(-1)]
        return Reduction(keep[at], slots, torch.cat(merged), compact=True)

    def segments(self, frames: torch.Tensor) -> list[tuple[int, int]]:
        """The segments of a video with frame means (F, d), as (first, stop)."""
        clusters = max(1, math.floor(len(frames) * self.temporal + ROUNDING))
        labels = refined(density_peaks(frames, clusters, NEIGHBOURS)[1].tolist())
        edges = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
        return list(itertools.pairwise(edges))

    def parts(self, hidden: torch.Tensor, segment: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The groups of a segment (w, P) of stream indices: static tokens, then each frame's dynamic ones.

        Returns:
            Of each group where it stands, and of each of its tokens the indices of those it is the mean of.
        """
        lasting = steady(hidden[segment], self.static)
        parts = []
        still = segment[:, lasting]
        if still.shape[1]:
            parts.append(
                (segment[0, 0], [still[:, places].flatten() for places in self.grouped(hidden[still].mean(0))])
            )
        for frame in segment:
            moving = frame[~lasting]
            if len(moving):
                parts.append((frame[0], [moving[places] for places in self.grouped(hidden[moving])]))
        return parts

    def grouped(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Which of some tokens (m, d) become one, each cluster with its centre first, by ascending centres."""
        count = math.floor(len(tokens) * self.spatial + ROUNDING)
        if len(tokens) <= SMALL or count == len(tokens):
            return list(torch.arange(len(tokens), device=tokens.device).split(1))
        centres, member = density_peaks(tokens, max(1, count), NEIGHBOURS)
        found = []
        for cluster in torch.sort(centres).indices.tolist():
            others = (member == cluster).nonzero().squeeze(-1)
            others = others[others != centres[cluster]]
            found.append(torch.cat([centres[cluster : cluster + 1], others]))
        return found

    # Behind the selecting layer

    def score(self, step: Step) -> torch.Tensor:
        """(v,) the highest attention from any head of any text token of the question."""
        rows = step.question if len(step.question) else step.text[-1:]
        blocks = [block.amax((0, 1)) for block in step.seen[self.layer].blocks(rows)]
        return torch.stack(blocks).amax(0)[step.visual]

    def _select(self, step: Step) -> Reduction | None:
        score, origin = self.score(step), step.origin[step.visual]
        stays = torch.ones(len(origin), dtype=torch.bool, device=origin.device)
        for group in step.memory["groups"]:
            mine = torch.isin(origin, group).nonzero().squeeze(-1)
            stays[mine] = False
            stays[mine[strongest(score[mine], self.share(len(mine)))]] = True
        if bool(stays.all()):
            return None
        kept = step.keep(stays.nonzero().squeeze(-1)).keep
        return Reduction(kept, compact=False, everywhere=self.earlier == "shrunk")


def steady(frames: torch.Tensor, least: float) -> torch.Tensor:
    """(P,) at which places the tokens of frames (w, P, d) are on average more than `least` alike (cosine)."""
    count = len(frames)
    if count == 1:
        return torch.zeros(frames.shape[1], dtype=torch.bool, device=frames.device)
    wide = frames.to(torch.promote_types(torch.float32, frames.dtype))
    total = torch.nn.functional.normalize(wide, dim=-1).sum(0).square().sum(-1)
    return (total - count) / (count * (count - 1)) > least


def refined(labels: list[int]) -> list[int]:
    """Frames' clusters as unbroken runs: of each cluster the longest runs stay, if longer than one frame; the frames of
    other runs join the longer of the nearest such runs on either side (the earlier one of equals). Without any, all
    frames are one.
    """
    runs = [(label, len(list(run))) for label, run in itertools.groupby(labels)]
    longest: dict[int, int] = {}
    for label, size in runs:
        longest[label] = max(size, longest.get(label, 0))
    stays = [i for i, (label, size) in enumerate(runs) if size == longest[label] and size > 1]
    out: list[int] = []
    for i, (_, size) in enumerate(runs):
        before = [j for j in stays if j <= i][-1:]
        after = [j for j in stays if j >= i][:1]
        home = max([*before, *after], key=lambda j: (runs[j][1], -j), default=0)
        out += [runs[i if i in stays else home][0]] * size
    return out
