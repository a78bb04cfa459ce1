"""DivPrune (CVPR 2025, arXiv 2503.02175, section 3; vbdi/divprune at 799e2d9).

Keeps the visual tokens whose smallest mutual distance is largest (max-min diversity), greedily: first the token whose
nearest neighbour is farthest, then, again and again, the one farthest from its nearest neighbour among those picked.
The distance is 1 - cosine of the projected tokens at the input of the language model; attention plays no part.

Following the released code, newlines are candidates like any other (identical, so one stays until distances run out),
the selection is over all tokens of an image or video, base view and crops together, and positions are compact. The code
knows prompts with one image; of several, each has its share here (`scope=prompt` selects over all of them), and so has
a video, over all frames. Distances are taken in float32, and what was picked is not looked at again. A community port
to Qwen2.5-VL keeps `original` positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.base import Card, Method, MethodError, Needs, Positions, Reduction, Shape, Step, kept, torch
from pruneval.methods.grids import images
from pruneval.methods.salience import spread

BLOCK = 1024  # rows of the distance matrix held at once


@dataclass(frozen=True)
class DivPrune(Method):
    """Keeps a fraction `keep` of the visual tokens; `scope` is image or prompt: what is selected from at a time."""

    card: ClassVar[Card] = Card(
        "divprune",
        "DivPrune",
        seam=("embed",),
        summary="Picks visual tokens one by one, each as different as can be from those already picked.",
        paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        year=2025,
        arxiv="2503.02175",
        repository="vbdi/divprune",
        commit="799e2d9",
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "llava-1.5-7b@56": {"keep": 0.098},
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64, 32)},
        **{f"llava-next-7b@{count}": {"keep": count / 2880} for count in (640, 320, 160)},
        "llava-next-video-7b@115": {"keep": 0.1},
    }

    keep: float = 0.5
    scope: Literal["image", "prompt"] = "image"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.scope not in ("image", "prompt"):
            raise MethodError(f"divprune: scope must be image or prompt, not {self.scope!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(frames=self.scope == "image")}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [kept(n, self.keep)] * shape.layers

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the cosines: between all tokens, and to those picked."""
        return {"cosines of visual tokens": visual * (visual + kept(visual, self.keep)) * shape.hidden}

    def reduce(self, step: Step) -> Reduction | None:
        count = kept(step.total, self.keep)
        if count >= step.total:
            return None
        groups = images(step) if self.scope == "image" else [torch.arange(step.total, device=step.visual.device)]
        shares = spread(count, [len(mine) for mine in groups], least=1)
        hidden = step.hidden[step.visual]
        chosen = [mine[max_min(hidden[mine], share)] for mine, share in zip(groups, shares, strict=True)]
        return step.keep(torch.cat(chosen))


def max_min(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) indices of the picked tokens of (n, d), in the order in which they are picked; ties go to the lower."""
    precise = tokens.to(torch.promote_types(torch.float32, tokens.dtype))
    unit = torch.nn.functional.normalize(precise, dim=-1)
    picked = [_isolated(unit)]
    nearest = torch.full_like(unit[:, 0], float("inf"))
    for _ in range(count - 1):
        last = picked[-1]
        nearest = torch.minimum(nearest, 1 - unit @ unit[last])
        nearest[last] = float("-inf")  # and stays there: never picked again, however close the others are
        picked.append(_first(nearest))
    return torch.stack(picked)


def _isolated(unit: torch.Tensor) -> torch.Tensor:
    """Index of the token whose nearest neighbour is farthest."""
    nearest = []
    for rows in torch.arange(len(unit), device=unit.device).split(BLOCK):
        distance = 1 - unit[rows] @ unit.T
        distance[torch.arange(len(rows), device=unit.device), rows] = float("inf")
        nearest.append(distance.amin(1))
    return _first(torch.cat(nearest))


def _first(distance: torch.Tensor) -> torch.Tensor:
    """Index of the largest distance, of the first where rounding alone tells some apart: two tokens that are each
    other's nearest have the same one, and so have copies.
    """
    slack = 64 * torch.finfo(distance.dtype).eps
    return (distance >= distance.max() - slack).int().argmax()
