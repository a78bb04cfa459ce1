"""CDPruner (Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, NeurIPS 2025,
arXiv 2506.10967, section 3; Theia-4869/CDPruner at 9541616).

Before the language model, each tile keeps the tokens that a determinantal point process conditioned on the question
prefers: different from each other, and relevant. With x_i the projected tokens and p_i their cells in CLIP's space,

    q_i = mean over the question's segments m of -cos(p_i, t_m)
    r_i = (q_i - min q + 1e-6) / (max q - min q)
    L_ij = r_i cos(x_i, x_j) r_j

and tokens are picked greedily, each the one that makes det(L) of the picked largest (fast greedy MAP). The minus is
meant: CLIP's patches resemble a text least where its object is. The order is kept, positions are compact.

The released code takes min and max over the whole batch of tiles; here they are those of one image. Where all cells are
equally relevant, r = 1. Beyond the rank of L the code repeats tokens or stops short; here what depends linearly on the
picked ones (to rounding) comes last, the most relevant first. A tile's share follows the tokens it has in the prompt.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Needs, Shape, Step, kept, torch
from pruneval.methods.salience import Area, PerTile, tower_features


@dataclass(frozen=True)
class CDPruner(PerTile):
    """Keeps a fraction `keep` of each tile's tokens.

    `newline` is drop (as the released code) or keep: beyond the budget, those of rows in which a token stays.
    `per_tile`, if given, is how many of every tile stay.
    """

    card: ClassVar[Card] = Card(
        "cdpruner",
        "CDPruner",
        seam=("embed",),
        summary="Picks tokens one by one that are relevant to the question in CLIP's space and unlike those picked.",
        paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
        year=2025,
        arxiv="2506.10967",
        repository="Theia-4869/CDPruner",
        commit="9541616",
        prompt_aware=True,
        clip=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"per_tile": count // 5} for count in (640, 320, 160)},
    }

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,), clip=True)}

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of picking, for one tile: cosines to each picked token, and what earlier ones explain."""
        count = min(visual, self.per_tile) if self.per_tile else kept(visual, self.keep)
        return {"greedy selection": visual * (count * shape.hidden + count * (count - 1) // 2)}

    def score(self, step: Step) -> torch.Tensor:
        unit = torch.nn.functional.normalize
        cells, texts = unit(step.clip.project(tower_features(step)), dim=-1), unit(step.clip.segments, dim=-1)
        return -(cells @ texts.T).mean(-1)

    def choose(self, step: Step, shares: list[tuple[Area, int]]) -> list[torch.Tensor]:
        toward, hidden = self.score(step), step.hidden[step.visual]
        tiles, chosen = iter(shares), []
        for count in step.vision.images:
            mine = list(itertools.islice(tiles, count))
            image = torch.cat([tile.tokens for tile, _ in mine])
            relevance = torch.zeros_like(toward)
            relevance[image] = scaled(toward[image])
            chosen += [tile.tokens[greedy(hidden[tile.tokens], relevance[tile.tokens], n)] for tile, n in mine]
        return chosen


def scaled(toward: torch.Tensor) -> torch.Tensor:
    """Relevance from 0 (almost) to 1; 1 for all where there is no difference."""
    low, high = toward.aminmax()
    return torch.ones_like(toward) if low == high else (toward - low + 1e-6) / (high - low)


def greedy(tokens: torch.Tensor, relevance: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) indices of the picked tokens of (n, d), in the order in which they are picked; ties go to the lower.

    Args:
        tokens: (n, d) features.
        relevance: (n,) how relevant each is.
        count: how many are picked.
    """
    precise = tokens.to(torch.promote_types(torch.float32, tokens.dtype))
    unit = torch.nn.functional.normalize(precise, dim=-1) * relevance[:, None].to(precise)
    gain = relevance.to(precise).square() * unit.any(-1)  # how much larger det(L) would be with the token
    floor, free = gain * 8 * torch.finfo(gain.dtype).eps, torch.ones_like(gain, dtype=torch.bool)
    explained, picked = unit.new_empty(count, len(unit)), list[int]()
    for turn in range(count):
        best = gain.masked_fill(~free | (gain <= floor), -1).argmax()
        if not bool(free[best] & (gain[best] > floor[best])):
            rest = torch.sort(relevance.masked_fill(~free, -1), descending=True, stable=True).indices
            return torch.cat([gain.new_tensor(picked, dtype=torch.long), rest[: count - turn]])
        explained[turn] = (unit @ unit[best] - explained[:turn, best] @ explained[:turn]) / gain[best].sqrt()
        gain = gain - explained[turn].square()
        free[best] = False
        picked.append(int(best))
    return gain.new_tensor(picked, dtype=torch.long)
