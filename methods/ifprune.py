"""IF-Prune, "Information-Flow Guided Token Pruning for Efficient Vision-Language Models" (CVPR 2026; the authors'
project page and supplement, their code was not read).

A small model reads the question and then the image, once, so that its states at the visual tokens know what is asked
for. A bottleneck trained on them says how much each goes beyond a prior that all tokens share
(`pruneval.methods.bottleneck`). The large model keeps the tokens with most of it from decoder layer `layer` on:
int(keep x N) of them, at least one, in order, with their position ids. Equal scores go to the lower index.

`checkpoint` holds the bottleneck's tensors and, where the small model was tuned with low-rank weights, those: for a
linear layer of its decoder "lora.layers.0.self_attn.q_proj.down" (r, in) and ".up" (r, out), the scale in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Ranking, Shape, Step, boundary, torch
from pruneval.methods.bottleneck import information
from pruneval.methods.helper import Reading
from pruneval.methods.trained import part, weights


@dataclass(frozen=True)
class IFPrune(Ranking):
    """Keeps a fraction `keep` from decoder layer `layer` on, by what a trained helper model's bottleneck lets through.

    `helper` names the small model (of the registry, or a folder), `checkpoint` a safetensors file.
    """

    card: ClassVar[Card] = Card(
        "ifprune",
        "IF-Prune",
        seam=("embed", "layer"),
        summary="Keeps the tokens that carry most information in a small model, which reads the question first.",
        paper="IF-Prune: Information-Flow Guided Token Pruning for Efficient Vision-Language Models",
        year=2026,
        repository="snap-research/EVLM-IF-Prune",
        prompt_aware=True,
        calibrated=True,
        provisional="the code was not available: the bottleneck's networks, its initial values and where low-rank "
        "weights sit are reconstructed from the supplement, and trained weights exist for the pocket models only",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "internvl2-26b@35%": {"layer": 9, "keep": 0.2},
        "internvl2-26b@9%": {"layer": 2, "keep": 0.05},
        "internvl2-26b@5%": {"layer": 0, "keep": 0.05},
        **{f"llava-1.5-7b@{count}": {"layer": 0, "keep": count / 576} for count in (192, 128, 64)},
    }

    helper: str = ""
    checkpoint: str = ""
    layer: int = 0
    keep: float = 0.05

    def ready(self) -> None:
        weights("ifprune", self.checkpoint)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("ifprune", self.layer, shape)
        lora = part(weights("ifprune", self.checkpoint), "lora.") if self.checkpoint else {}
        names = {key.rpartition(".")[0] for key in lora}
        if any(f"{name}.{end}" not in lora for name in names for end in ("down", "up")):
            raise MethodError("ifprune: every low-rank weight in the checkpoint needs its .down and its .up")
        pairs = {name: (lora[f"{name}.down"], lora[f"{name}.up"]) for name in sorted(names)}
        return {self.layer: Needs(helper=Reading(question_first=True, lora=pairs or None))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {self.layer: max(1, int(self.keep * n + 1e-9))}

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """The bottleneck's two networks, on every visual token; not known without weights."""
        if not self.checkpoint:
            return {}
        found = weights("ifprune", self.checkpoint)
        networks = [*part(found, "gate.").values(), *part(found, "logvar.").values()]
        return {"bottleneck": visual * sum(one.numel() for one in networks if one.ndim == 2)}

    def score(self, step: Step) -> torch.Tensor:
        states = step.helper.hidden[step.helper.visual]
        return information(weights("ifprune", self.checkpoint, str(states.device)), states)
