"""RCom (Recoverable Compression, AAAI 2025, arXiv 2409.01179; banjiuyufen/Recoverable-Compression at d927594).

Before the language model, each image keeps the tokens with outlying CLS attention, recovers those that the question
points at, and folds the rest into a few tokens and one more. In the last layer of the tower, with heads put together,

    a = softmax_j(q_cls . k_j / sqrt(d_v))    without the CLS column,
    t_j = cos(text, h_j) / sqrt(p)            in CLIP's space,

where h_j is the layer's output (without the tower's last norm) and the text is read as the code does: padded, at the
last position, not where CLIP would pool. How many tokens are taken is the share of outliers of a list of scores (local
outlier factor in one dimension, over 1.5); which ones are then simply the largest:

1. V, the largest a (20 neighbours; at least one).
2. T, the largest t among the others (20 neighbours, with V's t set to the smallest).
3. of the rest R, centres with the largest a (10 neighbours). Each adds to itself the a-weighted sum of the 32 tokens
   of R that are nearest by the cosine of their keys + 50 t_j; a token may be added to several.
4. the a-weighted sum of the rest that is no centre is one more token; it goes too when there are no centres.

Order: V and T as in the image, the centres from the largest a down, the last token. Positions are compact. Features are
those of the layer that is projected.

`version=released` repeats two slips of the code: keys are looked up by numbers within R in the whole image, and the
share of centres is of the features' width instead of R. The code reads the prompt's first line, which holds no
question; here the question is read. `count=keep` is ours: of a fixed number of tokens half are V, a quarter T, the
others centres and the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.arrival import stream
from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    kept,
    strongest,
    torch,
)
from pruneval.methods.lof import local_outliers
from pruneval.methods.prumerge import absorb, single_head
from pruneval.methods.salience import tower_features

NEAREST = 32  # tokens that a centre takes in
TEXT = 50  # weight of the question in what is near


@dataclass(frozen=True)
class RCom(Method):
    """Keeps as many tokens as stand out, or with `count=keep` a fraction `keep` of each image's.

    `version` is paper, or released: with the code's slips.
    """

    card: ClassVar[Card] = Card(
        "rcom",
        "RCom",
        seam=("embed",),
        summary="Keeps tokens with outlying CLS attention, recovers those the question points at, merges the rest.",
        paper="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
        year=2025,
        arxiv="2409.01179",
        repository="banjiuyufen/Recoverable-Compression",
        commit="d927594",
        prompt_aware=True,
        clip=True,
        merges=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@outliers": {},
        "llava-1.5-7b@released": {"version": "released"},
    }

    keep: float = 0.1
    count: Literal["outliers", "keep"] = "outliers"
    version: Literal["paper", "released"] = "paper"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.count not in ("outliers", "keep"):
            raise MethodError(f"rcom: count must be outliers or keep, not {self.count!r}")
        if self.version not in ("paper", "released"):
            raise MethodError(f"rcom: version must be paper or released, not {self.version!r}")
        if self.count == "outliers" and self.keep != RCom.keep:
            raise MethodError("rcom: the sample decides how many tokens stay; for a budget set count=keep as well")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        if shape.tiled or not shape.has_cls:
            raise MethodError("rcom: defined for models that see an image as one tile with a CLS token")
        return {0: Needs(vision=(shape.feature_layer, shape.vision_layers - 1), clip=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.count == "outliers":
            raise MethodError("rcom: with count=outliers the count depends on the sample")
        return [kept(n, self.keep)] * shape.layers

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Nothing but what CLIP does; the CLS row and the centres' cosines are not counted."""
        return {}

    def reduce(self, step: Step) -> Reduction | None:
        tiles = torch.arange(len(step.visual), device=step.visual.device).split(len(step.visual) // step.vision.tiles)
        if self.count == "keep" and kept(len(tiles[0]), self.keep) == len(tiles[0]):
            return None
        unit = torch.nn.functional.normalize
        output = torch.cat([each[1:] for each in step.vision.hidden(step.shape.vision_layers - 1)])
        cells = unit(step.clip.project(output, norm=False), dim=-1)
        toward = cells @ unit(step.clip.padded, dim=-1) / cells.shape[-1] ** 0.5
        (salience, keys), features = single_head(step), tower_features(step)
        parts = []
        for mine in tiles:
            chosen, rest, centres = self.choose(salience[mine], toward[mine], features.shape[-1])
            order, values = torch.cat([chosen, rest[centres], rest[centres[:1]]]), None
            made = torch.arange(len(order), device=order.device) >= len(chosen)
            if len(centres):
                left = mine[rest]
                known = keys[left if self.version == "paper" else mine[: len(left)]]
                taken = absorb(features[left], known, salience[left], centres, NEAREST, TEXT * toward[left])
                values = step.vision.project(taken)
            parts.append((step.visual[mine[order]], made, made & (made.cumsum(0) == made.sum()), values))
        reduction = stream(step, parts)
        return reduction if reduction.slots is not None or len(reduction.keep) < len(step.origin) else None

    def choose(
        self, salience: torch.Tensor, toward: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one image of P cells with features of this width: the cells of V and T, the rest R (both ascending), and
        which of R are centres, the most salient first.
        """
        fixed = split(kept(len(toward), self.keep)) if self.count == "keep" else None
        cells = torch.arange(len(toward), device=toward.device)
        first = strongest(salience, fixed[0] if fixed else max(1, int(len(toward) * local_outliers(salience, 20))))
        others = cells[~torch.isin(cells, first)]
        lowered = toward.clone()
        lowered[first] = toward.min()
        count = fixed[1] if fixed else int(len(others) * local_outliers(lowered, 20))
        chosen = torch.cat([first, others[strongest(toward[others], count)]]).sort().values
        rest = cells[~torch.isin(cells, chosen)]
        whole = len(rest) if self.version == "paper" else width
        count = fixed[2] if fixed else min(len(rest), int(whole * local_outliers(salience[rest], 10)))
        return chosen, rest, torch.sort(salience[rest], descending=True, stable=True).indices[:count]


def split(total: int) -> tuple[int, int, int]:
    """Of a fixed number of tokens: those of V, of T, and centres (the last token comes with them)."""
    seen, recovered = max(1, round(total / 2)), round(total / 4)
    left = total - seen - recovered
    return (seen, recovered, left - 1) if left > 1 else (seen + left, recovered, 0)
