"""DART, duplication-aware reduction of tokens (EMNLP 2025, arXiv 2502.11494; ZichenWen1/DART, ZichenWen1/EPIC at
b2ed9cd).

After K layers, a few tokens become pivots: the visual and the question tokens with the largest keys (L1 norm over all
key heads, rotary embedding applied). Going through the pivots one by one, each takes the q candidates that resemble it
least, by the cosine of the hidden states behind layer K - 1 after the model's final norm. Visual pivots and what was
taken go on, in their order and with their positions: the least duplicated tokens, not the most important ones.

With q = floor(keep * N / pivots) the count is visual pivots + pivots * q: 196, 132 and 68 of 576 where the papers write
192, 128 and 64. The code goes through its pivots in the order of a Python set (`order=set`), which depends on the
interpreter and changes a few tokens; the default is ascending, visual pivots first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, Method, MethodError, Needs, Reduction, Shape, Step, boundary, strongest, torch


@dataclass(frozen=True)
class DART(Method):
    """Keeps about a fraction `keep` of the visual tokens from decoder layer `layer` (the paper's K) on.

    `image_pivots` and `text_pivots` say how many there are of each; a shorter question has fewer.
    """

    card: ClassVar[Card] = Card(
        "dart",
        "DART",
        seam=("layer",),
        summary="Picks a few tokens with large keys and keeps the visual tokens that resemble them least.",
        paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        year=2025,
        arxiv="2502.11494",
        repository="ZichenWen1/DART",
        commit="EPIC b2ed9cd",
        prompt_aware=True,
        provisional="the method's own repository was not read, only its authors' later code and reimplementations",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@192": {"keep": 192 / 576},
        "llava-1.5-7b@128": {"keep": 128 / 576},
        "llava-1.5-7b@64": {"keep": 64 / 576},
    }

    layer: int = 2
    keep: float = 128 / 576
    image_pivots: int = 4
    text_pivots: int = 4
    order: str = "sorted"

    def check(self) -> None:
        if self.layer < 1:
            raise MethodError(f"dart: layer must be at least 1, because layer - 1 gives the keys, not {self.layer}")
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise MethodError("dart: image_pivots must be at least 1 and text_pivots at least 0")
        if self.order not in ("sorted", "set"):
            raise MethodError(f"dart: order must be sorted or set, not {self.order!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        boundary("dart", self.layer, shape)
        return {self.layer: Needs(attention=(self.layer - 1,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        """For questions of at least `text_pivots` tokens; a shorter one keeps fewer."""
        count = self.image_pivots + self.each(n) * (self.image_pivots + self.text_pivots)
        count = n if self.keep == 1 else min(n, count)
        return [n] * self.layer + [count] * (shape.layers - self.layer)

    def each(self, n: int) -> int:
        """q, the candidates each pivot takes."""
        pivots = self.image_pivots + self.text_pivots
        return max(0, min(int(n * self.keep / pivots + 1e-9), (n - self.image_pivots) // pivots))

    def reduce(self, step: Step) -> Reduction | None:
        if self.keep == 1 or len(step.visual) <= self.image_pivots:
            return None
        norm = _precise(step.seen[self.layer - 1].key).abs().sum((0, 2))
        image = step.visual[strongest(norm[step.visual], self.image_pivots)]
        text = step.question[strongest(norm[step.question], self.text_pivots)]
        chosen = self.chosen(step, self._visited(norm, image, text), image)
        return None if len(chosen) == len(step.visual) else step.keep(chosen)

    def chosen(self, step: Step, pivots: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Numbers (0..v-1) of the visual tokens that go on, ascending.

        Args:
            step: the sample.
            pivots: (p,) stream indices, in the order in which pivots choose.
            image: stream indices of the visual ones.
        """
        unit = torch.nn.functional.normalize(_precise(step.final_norm(step.hidden)), dim=-1)
        distance = -(unit[step.visual] @ unit[pivots].T)
        free = ~torch.isin(step.visual, image)
        for column in distance.unbind(1):
            free[strongest(column.masked_fill(~free, float("-inf")), self.each(len(step.visual)))] = False
        return (~free).nonzero().squeeze(-1)

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the cosines between visual tokens and pivots."""
        return {"cosines to the pivots": visual * (self.image_pivots + self.text_pivots) * shape.hidden}

    def _visited(self, norm: torch.Tensor, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.order == "sorted":
            return torch.cat([image, text])
        falling = [part[torch.sort(norm[part], descending=True, stable=True).indices] for part in (image, text)]
        return torch.tensor(list(set(torch.cat(falling).tolist())), device=image.device)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))
