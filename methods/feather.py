"""FEATHER (ICCV 2025, arXiv 2412.13180; markendo/FEATHER at c2a09b2).

The attention of the last prompt token favours late image tokens because of rotary embedding alone. FEATHER scores
without it: queries and keys of layer K - 1 before rotation, the last prompt row, softmax over the visual columns only,
mean over heads. At the first boundary the best tokens go on together with a uniform grid (every `stride`-th row and
column of the image), so that no region is lost; at the second, deeper one the survivors compete again and keep the
square of the fraction.

The code's boundaries are 8 and 16 on 32 layers, here L / 4 and L / 2. It knows one square image; here the grid is laid
over every image, tile or frame as its tokens stand: the tiles of an image that is put together from crops form one
grid, and tokens without a place in it (newlines, CLS) are no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Reduction,
    Shape,
    Step,
    boundary,
    strongest,
    torch,
)


@dataclass(frozen=True)
class Feather(Method):
    """Keeps a fraction `keep` and a grid at the first of two boundaries, `keep` squared of those at the second.

    `layers` lists the boundaries ("8,16"), or is "auto" for a quarter and half of the layers.
    """

    card: ClassVar[Card] = Card(
        "feather",
        "FEATHER",
        seam=("layer",),
        summary="Ranks by attention without rotary embedding, adds a uniform grid, and prunes once more further up.",
        paper="Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
        year=2025,
        arxiv="2412.13180",
        repository="markendo/FEATHER",
        commit="c2a09b2",
        prompt_aware=True,
    )

    keep: float = 0.3
    layers: str = "auto"
    stride: int = 3

    def check(self) -> None:
        if self.stride < 1:
            raise MethodError(f"feather: stride must be at least 1, not {self.stride}")
        if self.layers != "auto":
            listed = self._listed()
            if len(listed) != 2 or not 1 <= listed[0] < listed[1]:
                raise MethodError(f"feather: layers must be auto or two numbers like 8,16, not {self.layers!r}")

    def boundaries(self, shape: Shape) -> tuple[int, int]:
        """The two boundaries. Raises: MethodError when the model has no such layers."""
        first, second = self._listed() if self.layers != "auto" else (shape.layers // 4, shape.layers // 2)
        if not 1 <= first < second:
            raise MethodError(f"feather: {shape.layers} layers are too few")
        boundary("feather", second, shape)
        return first, second

    def needs(self, shape: Shape) -> dict[int, Needs]:
        first, second = self.boundaries(shape)
        return {
            first: Needs(attention=(first - 1,), vision=(shape.feature_layer,)),
            second: Needs(attention=(second - 1,)),
        }

    def schedule(self, shape: Shape, n: int) -> list[int]:
        if self.keep == 1:
            return [n] * shape.layers
        raise MethodError("feather: how many tokens stay depends on how many of the best lie on the grid")

    def reduce(self, step: Step) -> Reduction | None:
        first, _ = self.boundaries(step.shape)
        size = len(step.visual)
        if self.keep == 1:
            return None
        if step.layer != first:
            count = max(1, int(size * self.keep**2 + 1e-9))
            return None if count == size else step.keep(strongest(self.score(step), count))
        stays = on_grid(places(step), self.stride)
        stays[strongest(self.score(step), max(1, int(size * self.keep + 1e-9)))] = True
        return None if bool(stays.all()) else step.keep(stays.nonzero().squeeze(-1))

    def score(self, step: Step) -> torch.Tensor:
        """(v,) attention of the last prompt token among the visual tokens, without rotary embedding."""
        row = step.seen[step.layer - 1].unrotated().rows(-1)[:, 0, step.visual]
        return (row / row.sum(-1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)).mean(0)

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """Multiply-adds of the two rows, at most."""
        row = shape.heads * shape.head_dim * (visual + text)
        return {f"one row of layer {layer - 1}": row for layer in self.boundaries(shape)}

    def _listed(self) -> list[int]:
        try:
            return [int(part) for part in self.layers.strip("[]").split(",")]
        except ValueError:
            return []


def places(step: Step) -> torch.Tensor:
    """(N, 2) row and column of each visual token in the grid it stands in; (-1, -1) for tokens outside a grid."""
    vision = step.vision
    device = step.visual.device
    if step.shape.sheets:
        return vision.place_of().to(device).masked_fill(vision.is_newline().to(device)[:, None], -1)
    rasters = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in vision.grids]
    cells = [hidden.new_zeros(len(hidden) - int(vision.has_cls)) for hidden in vision.hidden(step.shape.feature_layer)]
    found = torch.full((len(step.visual), 2), -1, device=device)
    found[~vision.to_tokens(cells).isnan().to(device)] = torch.cat(rasters).reshape(-1, 2).to(device)
    return found


def on_grid(place: torch.Tensor, stride: int) -> torch.Tensor:
    """(N,) which tokens lie on every `stride`-th row and column.

    Args:
        place: (N, 2) rows and columns; negative ones lie on no grid.
        stride: distance of the rows and of the columns.
    """
    return ((place % stride == 0) & (place >= 0)).all(-1)
