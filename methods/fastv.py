"""FastV, "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764, section 4.1; pkunlp-icler/FastV at
d165972).

After the first K layers, image tokens are ranked by the attention they received in the layer before, and the lowest
are dropped once; the following layers compute on what is left. Following the released code, the ranking uses the last
prompt token's row, averaged over heads, with the softmax over the full row; survivors keep their order and their
position ids; the choice is made at prefill and kept while decoding (the repository's KV-cache variant). The paper's
text speaks of the attention from all later tokens: `rows=mean_text` averages over the text after the image instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Ranking, Shape, Step, boundary, kept, torch


@dataclass(frozen=True)
class FastV(Ranking):
    """Keeps a fraction `keep` of the visual tokens from decoder layer `layer` (the paper's K) on."""

    card: ClassVar[Card] = Card(
        "fastv",
        "FastV",
        seam=("layer",),
        summary="Drops the visual tokens the last prompt token attends to least, once, after the first layers.",
        paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        year=2024,
        arxiv="2403.06764",
        repository="pkunlp-icler/FastV",
        commit="d165972",
        prompt_aware=True,
    )

    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        # The paper's rates, and tokens left after the prune as other papers' tables count them.
        **{f"llava-1.5-7b@{keep:.3g}%": {"keep": keep / 100} for keep in (50, 25, 12.5)},
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64)},
        **{f"llava-next-7b@{count}": {"keep": count / 2880} for count in (640, 320, 160)},
    }

    layer: int = 2
    keep: float = 0.5
    rows: str = "last"

    def check(self) -> None:
        if self.layer < 1:
            raise MethodError(f"fastv: layer must be at least 1, because layer - 1 does the scoring, not {self.layer}")
        if self.rows not in ("last", "mean_text"):
            raise MethodError(f"fastv: rows must be last or mean_text, not {self.rows!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("fastv", self.layer, shape)
        return {self.layer: Needs(attention=(self.layer - 1,))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {self.layer: kept(n, self.keep)}

    def score(self, step: Step) -> torch.Tensor:
        rows = step.question if self.rows == "mean_text" else [len(step.origin) - 1]
        return step.seen[self.layer - 1].received(rows).mean(0)[step.visual]
