"""G-Prune (AAAI 2025, arXiv 2501.02268; jytmelon/G-Prune at 762c637).

The projected visual tokens are nodes of a graph in which tokens with a cosine of at least `similarity` are linked, and
every token with itself. A node's mass is the norm of its token. In each of `iterations` rounds it spreads over the
node's links, shared out by the softmax of cosine / `temperature`; what a node then holds, divided by the number of its
links, is its score. The division favours isolated tokens.

The base view of an image and its crops are two graphs (of InternVL: the thumbnail and all other tiles), a frame of a
video is one. As in the released code each keeps the fraction `keep`, rounded down, and newlines all go on besides; with
`newline` = drop they go, and `keep` is the fraction of all visual tokens that stays, rounded down and shared out by
size, as it is where there are no newlines. Everything is in float32: in half
precision the weakest links would have weight 0. Order is kept, positions are compact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    strongest,
    torch,
)
from pruneval.methods.salience import grids, spread

ROUNDING = 1e-9  # keeps exact products from falling to the next lower whole number


@dataclass(frozen=True)
class GPrune(Method):
    """Keeps a fraction `keep` of each graph; `newline` is keep or drop."""

    card: ClassVar[Card] = Card(
        "gprune",
        "G-Prune",
        seam=("embed",),
        summary="Spreads the norms of visual tokens over links between similar ones; keeps those that hold most.",
        paper="What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large "
        "Language Models from the Perspective of Graph",
        year=2025,
        arxiv="2501.02268",
        repository="jytmelon/G-Prune",
        commit="762c637",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {"llava-next-7b@50%": {"keep": 0.5}}

    keep: float = 0.5
    similarity: float = 0.5
    temperature: float = 0.03
    iterations: int = 5
    newline: Literal["keep", "drop"] = "keep"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.newline not in ("keep", "drop"):
            raise MethodError(f"gprune: newline must be keep or drop, not {self.newline!r}")
        if not -1 <= self.similarity <= 1:
            raise MethodError(f"gprune: similarity is a cosine, between -1 and 1, not {self.similarity:g}")
        if self.temperature <= 0 or self.iterations < 0:
            raise MethodError("gprune: temperature must be above 0, and iterations not negative")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,), frames=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        count = self.most(n)
        if shape.sheets and self.newline == "keep" and count < n:
            if not shape.whole:
                raise MethodError("gprune: with newline=keep the count depends on the rows of the image (newline=drop)")
            sizes = [tokens for _, tokens in shape.whole]
            graphs = [sizes[0], sum(sizes[1:])] if shape.whole[0][0] == sizes[0] else sizes
            count = sum(self.most(size) for size in graphs if size)
        return [count] * shape.layers

    def most(self, n: int) -> int:
        """How many of n tokens stay: rounded down, at least one."""
        return n if self.keep == 1 else max(1, int(n * self.keep + ROUNDING))

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the cosines and the rounds, as if all visual tokens were one graph."""
        return {"cosines of visual tokens": visual**2 * shape.hidden, "rounds": visual**2 * self.iterations}

    def reduce(self, step: Step) -> Reduction | None:
        count = self.most(step.total)
        if count >= step.total:
            return None
        graphs, score = self.graphs(step), self.score(step)
        shares = spread(count, [len(graph) for graph in graphs])
        newlines = step.visual[:0]
        if step.shape.sheets and self.newline == "keep":
            shares = [self.most(len(graph)) for graph in graphs]
            newlines = step.vision.is_newline().nonzero().squeeze(-1)
        chosen = [graph[strongest(score[graph], share)] for graph, share in zip(graphs, shares, strict=True)]
        rest = score.isnan().nonzero().squeeze(-1)[: max(0, count - sum(shares))]
        return step.keep(torch.cat([*chosen, newlines if len(newlines) else rest]))

    def graphs(self, step: Step) -> list[torch.Tensor]:
        """Numbers 0..N-1 of the tokens of each graph; newlines and CLS tokens are in none."""
        areas = [area.tokens for area in grids(step)]
        if step.shape.sheets:
            return [area for area in areas if len(area)]
        seen = torch.cat([step.visual[:0], *(clip.flatten() for clip in step.clips)])
        graphs, first = [], 0
        for tiles in step.vision.images:
            mine = areas[first : first + tiles]
            moving = bool(torch.isin(step.visual[mine[0]], seen).any())
            graphs += mine if moving or tiles == 1 else [torch.cat(mine[:-1]), mine[-1]]
            first += tiles
        return graphs

    def score(self, step: Step) -> torch.Tensor:
        """(N,) what each token holds in the end, by number of links; nan outside the graphs."""
        tokens = step.hidden[step.visual]
        tokens = tokens.to(torch.promote_types(torch.float32, tokens.dtype))
        out = tokens.new_full((step.total,), float("nan"))
        for graph in self.graphs(step):
            out[graph] = self.mass(tokens[graph])
        return out

    def mass(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) the scores of a graph of tokens (n, d)."""
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        cosine = unit @ unit.T
        linked = cosine >= self.similarity
        linked.fill_diagonal_(True)
        flow = cosine.div_(self.temperature).masked_fill_(~linked, float("-inf")).softmax(-1)
        mass = tokens.norm(dim=-1)
        for _ in range(self.iterations):
            mass = mass @ flow
        return mass / linked.sum(-1)
