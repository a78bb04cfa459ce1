"""LLaVA-PruMerge+ (ICCV 2025, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge at 097c041, what its `forward` calls).

As PruMerge, with tokens at even steps beside those that stand out. Of N tokens, n of which stand out, the steps are
s = int(int(N / n) / 3) and the tokens 0, s, 2s, ... below N - 1 that are not kept yet are kept too, after the others:
about three more for each. When more than a third stands out, the released code fails; here steps are at least 1. With
`count=keep` (the tables with fixed numbers, as reimplemented for EffiVLM-Bench) the outliers are kept, or the strongest
where the budget B has no room for all, and then tokens at steps of N // B until it is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, torch
from pruneval.methods.prumerge import PruMerge
from pruneval.methods.salience import outliers


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Keeps a fraction `keep` of each tile's tokens (`count=keep`), or what stands out and evenly spaced tokens
    (`count=outliers`).

    `order` is score or raster.
    """

    card: ClassVar[Card] = Card(
        "prumerge_plus",
        "LLaVA-PruMerge+",
        seam=("embed",),
        summary="PruMerge with evenly spaced tokens beside the outliers of the CLS attention.",
        paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        year=2025,
        arxiv="2403.15388",
        repository="42Shawn/LLaVA-PruMerge",
        commit="097c041",
        merges=True,
        reorders=True,
    )

    def centres(self, weight: torch.Tensor, count: int | None) -> torch.Tensor:
        n, found = len(weight), outliers(weight)
        strongest = super().centres(weight, found if count is None else min(found, count))
        stop, room = (n - 1, n) if count is None else (n, count - len(strongest))
        if room == 0:
            return strongest
        step = max(1, n // found // 3) if count is None else max(1, n // count)
        even = torch.arange(0, stop, step, device=weight.device)
        return torch.cat([strongest, even[~torch.isin(even, strongest)][:room]])
