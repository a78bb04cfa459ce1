"""DyCoke (CVPR 2025, arXiv 2411.15024; KD-TAO/DyCoke at dd74634): temporal tokens before, cached tokens while decoding.

Before the language model a video loses tokens that repeat those of an earlier frame. Frame 2i + 1 is compared with
frame 2i, place by place, and keeps the tokens least like their partners (cosine); then, in groups of four, frame i + 2
with frame i, which is still whole. Nothing is averaged. Frames 0, 4, 8, ... stay whole, and so does, in the released
code's counting, the third frame of the last group. Positions are compact.

While decoding, the layers from `layer` on attend only to the visual tokens that the newest token attended to most in
the layer before. Caches keep everything, so a token may come back. A new choice is made when the scores' cosine with
those of the last choice is below `refresh`, and otherwise the released code attends to everything
(`otherwise` = "all") where the paper reuses the choice ("reuse").

The released code leaves a reduced frame's tokens in ascending similarity (`order` = "similarity"; "raster" sorts them),
and loses the last frame of an odd number altogether (`odd` = "drop"); here it stays whole. Published settings differ
between its files: 0.3 is what its README keeps of a frame and of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    DecodeStep,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    boundary,
    torch,
)

ROUNDING = 1e-9  # keeps exact products from falling to the other side of a whole number


@dataclass(frozen=True)
class DyCoke(Method):
    """Keeps a fraction `keep` (1 - K) of each compared frame, and at decode steps `decode_keep` (1 - P) of the cache.

    `decode_keep` = 0 stands for the same number as `keep`; 1 switches the second stage off.
    """

    card: ClassVar[Card] = Card(
        "dycoke",
        "DyCoke",
        seam=("embed", "decode"),
        summary="Drops video tokens that repeat an earlier frame's, then attends to few cached ones at decode steps.",
        paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
        year=2025,
        arxiv="2411.15024",
        repository="KD-TAO/DyCoke",
        commit="dd74634",
        prompt_aware=True,
    )
    positions: ClassVar[Positions] = "compact"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-onevision-7b@32frames": {"keep": 0.3, "layer": 3, "decode_keep": 0.3},
    }

    keep: float = 0.3
    layer: int = 3
    decode_keep: float = 0.0
    refresh: float = 0.9
    otherwise: str = "all"
    order: str = "similarity"
    odd: str = "keep"

    def check(self) -> None:
        if self.layer < 1:
            raise MethodError(f"dycoke: layer must be at least 1, because layer - 1 does the scoring, not {self.layer}")
        if not 0 <= self.decode_keep <= 1:
            raise MethodError(f"dycoke: decode_keep must be in [0, 1], not {self.decode_keep:g}")
        if self.otherwise not in ("all", "reuse"):
            raise MethodError(f"dycoke: otherwise must be all or reuse, not {self.otherwise!r}")
        if self.order not in ("similarity", "raster"):
            raise MethodError(f"dycoke: order must be similarity or raster, not {self.order!r}")
        if self.odd not in ("keep", "drop"):
            raise MethodError(f"dycoke: odd must be keep or drop, not {self.odd!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("dycoke", self.layer, shape)
        return {0: Needs(frames=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [n] * shape.layers

    def share(self, n: int, keep: float) -> int:
        """int(n * keep), which may be none."""
        return math.floor(n * keep + ROUNDING)

    def reduce(self, step: Step) -> Reduction | None:
        if self.keep == 1 or not step.clips:
            return None
        # places inside frames are all that moves: what stands between (newlines, text) keeps its place
        place = torch.arange(len(step.origin), device=step.origin.device)
        gone = torch.zeros_like(place, dtype=torch.bool)
        for clip in step.clips:
            for frame, chosen in zip(clip, self.chosen(step.hidden[clip]), strict=True):
                gone[frame] = True
                gone[frame[chosen]] = False
                place[frame[chosen]] = frame[: len(chosen)]
        left = (~gone).nonzero().squeeze(-1)
        if len(left) == len(gone):
            return None
        return Reduction(left[torch.sort(place[left], stable=True).indices])

    def chosen(self, video: torch.Tensor) -> list[torch.Tensor]:
        """The places of each frame of a video (F, P, d) that stay, in the order in which they go on."""
        frames, places, _ = video.shape
        wide = video.to(torch.promote_types(torch.float32, video.dtype))
        partner = {frame: frame - 1 for frame in range(1, frames, 2)}
        partner |= {first + 2: first for first in range(0, frames - 4, 4)}
        whole = torch.arange(places, device=video.device)
        stays = [whole] * frames
        for frame, earlier in partner.items():
            similar = torch.nn.functional.cosine_similarity(wide[frame], wide[earlier], dim=-1)
            least = torch.sort(similar, stable=True).indices[: self.share(places, self.keep)]
            stays[frame] = least.sort().values if self.order == "raster" else least
        if self.odd == "drop" and frames % 2 and frames > 1:
            stays[-1] = whole[:0]
        return stays

    def selecting(self, shape: Shape) -> tuple[int, ...]:
        return (self.layer,) if (self.decode_keep or self.keep) < 1 else ()

    def select(self, step: DecodeStep) -> torch.Tensor | None:
        score = step.attention.rows(-1)[:, 0].mean(0)[step.visual]
        before = step.memory.get("score")
        step.memory["score"] = score
        if before is not None and float(torch.nn.functional.cosine_similarity(score, before, dim=0)) >= self.refresh:
            return step.memory.get("chosen") if self.otherwise == "reuse" else None
        count = self.share(len(score), self.decode_keep or self.keep)
        step.memory["chosen"] = torch.sort(score, descending=True, stable=True).indices[:count]
        return step.memory["chosen"]
