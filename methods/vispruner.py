"""VisPruner (Beyond Text-Visual Attention, ICCV 2025, arXiv 2412.01818v2 and later; Theia-4869/VisPruner at aefa01a).

Before the language model, each tile keeps int(T * important) of its T tokens by attention from the CLS token (layer
whose output is projected, mean over heads) and the others for their difference. What attention left over stands in
order of attention and is thinned out round by round: it is split into even and odd places, and the (at most 8) even
ones most similar to some odd one go, until the count is met; what is left of the even ones then stands first, the most
similar ahead. Similarity is the cosine of the tower's outputs, before the projector. Nothing is merged, order is kept.

Without a CLS token the score is the attention a cell receives on average; cells that become one token are averaged in
score and output. The authors store no `important` per setting; it is 0.5 or 0.75 in their examples. Their code can't
halve a list of odd length or delete more than there are even places; here the even side has the odd one and at most it
goes. A tile's share follows the tokens it has (in the code it is the same for all, padding may be chosen); newlines go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Step, torch
from pruneval.methods.salience import Area, PerTile, token_salience, tower_means

AT_ONCE = 8  # tokens deleted per round


@dataclass(frozen=True)
class VisPruner(PerTile):
    """Keeps a fraction `keep` of each tile's tokens; of these the fraction `important` by attention (1 is FasterVLM).

    `newline` is drop or keep: beyond the budget, those of rows in which a token stays.
    `per_tile`, if given, is how many of every tile stay.
    """

    card: ClassVar[Card] = Card(
        "vispruner",
        "VisPruner",
        seam=("embed",),
        summary="Keeps tokens the CLS token attends to, and of the rest those that are not near-duplicates.",
        paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        year=2025,
        arxiv="2412.01818",
        repository="Theia-4869/VisPruner",
        commit="aefa01a",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160)},
    }

    important: float = 0.5

    def check(self) -> None:
        super().check()
        if not 0 <= self.important <= 1:
            raise MethodError(f"vispruner: important must be in [0, 1], not {self.important:g}")

    def score(self, step: Step) -> torch.Tensor:
        return token_salience(step)

    def choose(self, step: Step, shares: list[tuple[Area, int]]) -> list[torch.Tensor]:
        score, features, chosen = self.score(step), tower_means(step), []
        for tile, share in shares:
            ranked = tile.tokens[torch.sort(score[tile.tokens], descending=True, stable=True).indices]
            first = int(share * self.important)
            chosen += [ranked[:first], distinct(features, ranked[first:], share - first)]
        return chosen


def distinct(features: torch.Tensor, rest: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the tokens `rest`, best first, after near-duplicates went; features (N, d) are those of all tokens."""
    precise = features.to(torch.promote_types(torch.float32, features.dtype))
    unit = torch.nn.functional.normalize(precise, dim=-1)
    while len(rest) > max(count, 1):
        even, odd = rest[0::2], rest[1::2]
        similar = (unit[even] @ unit[odd].T).amax(1)
        gone = min(AT_ONCE, len(rest) - count, len(even))
        rest = torch.cat([even[torch.sort(similar, descending=True, stable=True).indices[gone:]], odd])
    return rest[:count]
