"""FitPrune (AAAI 2025, arXiv 2409.10197; ywh187/FitPrune at d28e418).

Every layer deletes its least attended visual tokens. How many is a recipe, fitted offline so that the attention mass
visual tokens exchange among themselves and receive from the text stays close to the un-pruned model's, for a given cut
of the visual tokens' FLOPs. Within layer l the maximum over heads is taken first, G = max_h A; a token's score is the
product of what it receives from visual rows (mean) and from the text rows after the image (sum); the d_l lowest go.

Deleting behind the attention of layer l is deleting before layer l + 1: nothing that stays has read the deleted ones'
feed-forward output. Only the cost differs: here layer l's output projection and feed-forward still run on them.

The recipes the repository ships for LLaVA-1.5-7B are in `data/`. For other token counts the same shares of what enters
a layer are deleted, as the authors advise; for cuts between two shipped ones the survivors are interpolated (ours).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Attention, Card, Method, MethodError, Needs, Reduction, Shape, Step, strongest, torch
from pruneval.methods.recipe import read_recipe


@dataclass(frozen=True)
class FitPrune(Method):
    """Leaves a share `keep` of the visual tokens' FLOPs; the paper's reduction ratio is 1 - keep.

    `recipe` names the shipped table or a JSON file {"layers": L, "tokens": N, "deleted": {"60": [d_0, ...], ...}} by
    reduction in percent.
    """

    card: ClassVar[Card] = Card(
        "fitprune",
        "FitPrune",
        seam=("layer",),
        summary="Deletes in every layer as many of the least attended tokens as an offline fit of attention allows.",
        paper="Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
        year=2025,
        arxiv="2409.10197",
        repository="ywh187/FitPrune",
        commit="d28e418",
        prompt_aware=True,
        calibrated=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@541": {"keep": 0.9},
        "llava-1.5-7b@493": {"keep": 0.8},
        "llava-1.5-7b@424": {"keep": 0.7},
        "llava-1.5-7b@362": {"keep": 0.6},
        "llava-1.5-7b@302": {"keep": 0.5},
        "llava-1.5-7b@274": {"keep": 0.45},
        "llava-1.5-7b@245": {"keep": 0.4},
        "llava-1.5-7b@188": {"keep": 0.3},
        "llava-1.5-7b@131": {"keep": 0.2},
        "llava-1.5-7b@73": {"keep": 0.1},
    }

    keep: float = 0.4
    recipe: str = "llava-1.5-7b"

    def check(self) -> None:
        most = self._table[2][-1][0]
        if 1 - self.keep > most + 1e-9:
            raise MethodError(f"fitprune: the recipes of {self.recipe} end at keep = {1 - most:g}, not {self.keep:g}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        layers = self._table[0]
        if layers != shape.layers:
            raise MethodError(
                f"fitprune: the recipes of {self.recipe} are for {layers} layers, this model has {shape.layers}; "
                "give recipe=path.json"
            )
        left = self._left
        return {layer: Needs(attention=(layer - 1,)) for layer in range(1, layers) if left[layer] < left[layer - 1]}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        asked, current, entering = self.needs(shape), n, []
        for layer in range(shape.layers):
            current = self._goes_on(layer, current) if layer in asked else current
            entering.append(current)
        return entering

    def reduce(self, step: Step) -> Reduction | None:
        count = self._goes_on(step.layer, len(step.visual))
        return None if count == len(step.visual) else step.keep(strongest(self.score(step), count))

    def score(self, step: Step) -> torch.Tensor:
        """(v,) what each visual token receives from visual tokens times what it receives from the text after them."""
        attention = step.seen[step.layer - 1]
        own = received(attention, step.visual)[step.visual] / len(step.visual)
        return own * received(attention, step.question)[step.visual] if len(step.question) else own

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the rows read; all text counts as standing after the image."""
        entering = self.schedule(shape, visual)
        return {
            f"rows of layer {layer - 1}": shape.heads * shape.head_dim * (entering[layer - 1] + text) ** 2
            for layer in self.needs(shape)
        }

    def _goes_on(self, layer: int, entered: int) -> int:
        """Of the tokens that entered layer - 1, how many enter `layer`."""
        before, after = self._left[layer - 1], self._left[layer]
        return max(1, entered - entered * (before - after) // before)

    @functools.cached_property
    def _table(self) -> tuple[int, int, list[tuple[float, list[int]]]]:
        """Layers, tokens, and (reduction, what enters each layer), by falling budget."""
        data = read_recipe("fitprune", self.recipe)
        try:
            layers, tokens = int(data["layers"]), int(data["tokens"])
            rows = [(float(ratio) / 100, [int(d) for d in deleted]) for ratio, deleted in data["deleted"].items()]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise MethodError(f"fitprune: {self.recipe} must have layers, tokens and deleted by percent") from None
        for _, deleted in rows:
            if len(deleted) != layers or min(deleted) < 0 or sum(deleted) >= tokens:
                raise MethodError(f"fitprune: a row of {self.recipe} must name {layers} deletions, fewer than {tokens}")
        return layers, tokens, sorted([(0.0, [tokens] * layers), *((ratio, _left(d, tokens)) for ratio, d in rows)])

    @functools.cached_property
    def _left(self) -> list[int]:
        """Tokens that enter each layer of the recipe's model, at this budget."""
        rows, ratio = self._table[2], 1 - self.keep
        for (low, more), (high, fewer) in itertools.pairwise(rows):
            if ratio <= high + 1e-9:
                part = min(1.0, (ratio - low) / (high - low))
                return [round(a + (b - a) * part) for a, b in zip(more, fewer, strict=True)]
        return rows[-1][1]


def received(attention: Attention, rows: torch.Tensor) -> torch.Tensor:
    """(n,) sum over the query rows of the strongest head's attention to each token."""
    return torch.stack([block.amax(0).sum(0) for block in attention.blocks(rows)]).sum(0)


def _left(deleted: list[int], tokens: int) -> list[int]:
    entering = [tokens]
    for count in deleted[:-1]:
        entering.append(entering[-1] - count)
    return entering
