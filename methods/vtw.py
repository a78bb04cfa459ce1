"""VTW, visual tokens withdrawal (AAAI 2025, arXiv 2405.05803, section 3; lzhxmu/VTW at a3d8cfc).

From decoder layer K on, no visual token takes part at all: layers before K read the whole prompt, layers from K on read
text only. Nothing is scored. The paper looks for K per model and task: the first one at which the mean divergence
KL(withdrawn || full) of the last position's next-token distribution over a few samples is below a threshold. Positions
stay as they are; the repository's other choice renumbers them.

The command line of the repository takes K = 16 and its class 15 on 32 layers; other papers run it at L / 2. Here K =
round(keep * L) unless `layer` gives it. K found on one task does not suit another: the authors advise 26 for TextVQA.
The repository's ablation that withdraws random tokens, text among them, is not offered: text may not be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Method, MethodError, Needs, Positions, Reduction, Shape, Step
from pruneval.methods.recipe import numbers, searched_for


@dataclass(frozen=True)
class VTW(Method):
    """Lets the first `keep` of the layers see the visual tokens, and no other; `layer` is the paper's K, or auto.

    A `recipe`, as the search writes it, gives K instead.
    """

    card: ClassVar[Card] = Card(
        "vtw",
        "VTW",
        seam=("layer",),
        summary="Withdraws all visual tokens at one layer, where the model has read what it needs from them.",
        paper="Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
        year=2025,
        arxiv="2405.05803",
        repository="lzhxmu/VTW",
        commit="a3d8cfc",
        calibrated=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@288": {"layer": "16"},
        "llava-1.5-7b@270": {"layer": "15"},
        "video-llava-7b@1024": {"layer": "16"},
    }

    keep: float = 0.5
    layer: str = "auto"
    recipe: str = ""
    position_mode: Positions = "original"

    def check(self) -> None:
        if self.recipe and self.layer != "auto":
            raise MethodError("vtw: give layer or a recipe, not both")
        if self.recipe:
            numbers("vtw", self.recipe, "layers", "layer")
        if self.layer != "auto" and not self.layer.isdecimal():
            raise MethodError(f"vtw: layer must be auto or a whole number from 0, not {self.layer!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        layer = self.withdrawal(shape)
        return {layer: Needs()} if layer < shape.layers else {}

    def withdrawal(self, shape: Shape) -> int:
        """K, the first layer without visual tokens; the number of layers when none is withdrawn.

        Raises: MethodError when the model has fewer layers than `layer`.
        """
        if self.recipe:
            searched_for("vtw", self.recipe, shape)
            return int(numbers("vtw", self.recipe, "layer")["layer"])
        if self.layer == "auto":
            return max(1, round(shape.layers * self.keep))
        if int(self.layer) > shape.layers:
            raise MethodError(f"vtw: layer must be between 0 and {shape.layers} for this model, not {self.layer}")
        return int(self.layer)

    def schedule(self, shape: Shape, n: int) -> list[int]:
        layer = self.withdrawal(shape)
        return [n] * layer + [0] * (shape.layers - layer)

    def reduce(self, step: Step) -> Reduction:
        return step.keep(step.visual[:0])


def equal_budget(fraction: float, layer: int, layers: int) -> int:
    """K at which withdrawal reads about as many tokens as a method that keeps `fraction` of them from `layer` on.

    The rule with which PACT's experiments compare the two (orailix/PACT at cf9a0c9).
    """
    return round(layers * (1 - (1 - fraction) * (layers - layer) / layers))
