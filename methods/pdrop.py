"""PyramidDrop (CVPR 2025, arXiv 2410.17247, section 3.2; Cooperx521/PyramidDrop at 6444f30).

The language model is cut into stages; at the end of each, a fixed share of the image tokens is dropped, so the number
left shrinks like a pyramid. Tokens are ranked by the attention of the last instruction token, averaged over heads.
Following the released code, that attention is the one the first layer of the *next* stage is about to compute on the
un-pruned stream, counts come from the original number of tokens, survivors keep their order, and position ids are
renumbered after every stage, so that while decoding a token's position equals the length of that stage's cache.

The code lists boundaries for 32 layers (8, 16, 24) and has no rule for other depths; here stage s starts at s *
floor(L / 4), which gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    MethodError,
    Needs,
    Positions,
    Ranking,
    Shape,
    Step,
    boundary,
    torch,
)


@dataclass(frozen=True)
class PDrop(Ranking):
    """Keeps int(N * keep^s) visual tokens in stage s; `keep` is the paper's lambda.

    `layers` lists the boundaries ("8,16,24", ascending), or is "auto" for four stages of equal length.
    """

    card: ClassVar[Card] = Card(
        "pdrop",
        "PyramidDrop",
        seam=("layer",),
        summary="Drops a fixed share of the visual tokens at the end of each of four stages of the language model.",
        paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        year=2025,
        arxiv="2410.17247",
        repository="Cooperx521/PyramidDrop",
        commit="6444f30",
        prompt_aware=True,
    )

    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@270": {},
        # The author's boundaries for low budgets and his 64; the others solve for the average over layers.
        "llava-1.5-7b@192": {"layers": "2,8,16", "keep": 0.56},
        "llava-1.5-7b@128": {"layers": "2,8,16", "keep": 0.42},
        "llava-1.5-7b@64": {"layers": "2,8,16", "keep": 0.19},
        "llava-next-7b@640": {"layers": "2,8,16", "keep": 0.42},
        "llava-next-7b@320": {"layers": "2,8,16", "keep": 0.192},
    }

    keep: float = 0.5
    layers: str = "auto"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.layers != "auto":
            stages = self._listed()
            if not stages or stages != sorted(set(stages)) or stages[0] < 0:
                raise MethodError(f"pdrop: layers must be auto or ascending numbers like 8,16,24, not {self.layers!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        for layer in self.boundaries(shape):
            boundary("pdrop", layer, shape)
        return {layer: Needs(next=True) for layer in self.boundaries(shape)}

    def boundaries(self, shape: Shape) -> list[int]:
        """First layer of every stage but the first."""
        if self.layers != "auto":
            return self._listed()
        return sorted({stage * (shape.layers // 4) for stage in (1, 2, 3)} - {0})

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {layer: max(1, int(n * self.keep**stage)) for stage, layer in enumerate(self.boundaries(shape), start=1)}

    def score(self, step: Step) -> torch.Tensor:
        return step.next.rows(-1)[:, 0].mean(0)[step.visual]

    def _listed(self) -> list[int]:
        try:
            return [int(part) for part in self.layers.replace("[", "").replace("]", "").split(",")]
        except ValueError:
            return []
