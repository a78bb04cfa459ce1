"""Weights that a method was trained with, and projectors that stand in for the model's own.

Weights lie in a safetensors file, which the parameter `checkpoint` names: a path, or the short name of one that comes
with the package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pruneval.methods.base import Method, MethodError, Reduction, Shape, Step, kept, torch
from pruneval.methods.recipe import file_of
from pruneval.methods.uniform import centres

if TYPE_CHECKING:
    from torch import Tensor


def weights(name: str, path: str, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint, in float32 or their higher precision; read once as long as the file is the same.

    Raises: MethodError when there is no such file, or it can't be read.
    """
    if not path:
        raise MethodError(f"{name}: it was trained, and needs its weights: parameter checkpoint, a safetensors file")
    file = file_of(name, path)
    try:
        return _read(str(file), file.stat().st_mtime_ns, device)
    except FileNotFoundError:
        raise MethodError(f"{name}: there is no checkpoint {path}") from None
    except Exception as error:  # the library has an exception of its own
        reason = " ".join(str(error).split())
        raise MethodError(f"{name}: the checkpoint {path} can't be read as safetensors: {reason}") from None


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: int, device: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(path, device=device)
    return {key: part.to(torch.promote_types(torch.float32, part.dtype)) for key, part in tensors.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}


def mlp(name: str, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(..., c) through linear layers with GELU between them.

    Args:
        name: of the method, for messages.
        tensors: "0.weight", "0.bias", "2.weight", ..., as `nn.Sequential` numbers linear layers and activations.
        x: the input.

    Raises: MethodError when a layer is missing or does not fit.
    """
    numbers = sorted({int(key.split(".")[0]) for key in tensors})
    for number in numbers:
        weight, bias = tensors.get(f"{number}.weight"), tensors.get(f"{number}.bias")
        if weight is None or weight.shape[1] != x.shape[-1]:
            size = "is missing" if weight is None else f"takes {weight.shape[1]} features, not {x.shape[-1]}"
            raise MethodError(f"{name}: the checkpoint is for another model: layer {number} {size}")
        x = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        x = torch.nn.functional.gelu(x) if number != numbers[-1] else x
    return x


class Projector(Method):
    """A trained projector with fewer outputs than there are cells, in place of the model's own.

    Every image's square grid becomes a smaller square of tokens, which stand at the centres of their windows. Only for
    models in which an image is one such grid: a projector was trained with its model.
    """

    checkpoint: str

    def side(self, n: int) -> int:
        """Tokens on a side of the smaller square, of an image of n tokens. Raises: MethodError."""
        raise NotImplementedError

    def project(self, step: Step, tile: int, side: int) -> Tensor:
        """(side * side, d) the tokens of one image."""
        raise NotImplementedError

    def suits(self, shape: Shape) -> None:
        """Refuses models that cut images, or have no weights. Raises: MethodError."""
        if shape.tiled or shape.sheets or shape.merge > 1:
            name = self.card.name
            raise MethodError(f"{name}: it was trained on one square grid per image, and this model cuts or merges it")
        weights(self.card.name, self.checkpoint)

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [self.side(n) ** 2] * shape.layers

    def reduce(self, step: Step) -> Reduction | None:
        rows, columns = step.vision.grids[0]
        if rows != columns:
            raise MethodError(
                f"{self.card.name}: it was trained on a square grid, this one has {rows} x {columns} cells"
            )
        side = self.side(rows * columns)
        if side == rows:
            return None
        middle = (centres(rows, side)[:, None] * columns + centres(columns, side)).flatten()
        chosen = torch.cat([tile * rows * columns + middle for tile in range(step.vision.tiles)])
        keep = step.keep(chosen).keep
        values = torch.cat([self.project(step, tile, side) for tile in range(step.vision.tiles)])
        if values.shape[1] != step.shape.hidden:
            raise MethodError(
                f"{self.card.name}: the checkpoint is for another model: it gives {values.shape[1]} features, "
                f"not {step.shape.hidden}"
            )
        slots = torch.searchsorted(keep, step.visual[chosen.to(keep.device)])
        return Reduction(keep, slots, values, torch.zeros(len(slots), dtype=torch.bool))


def square(n: int, keep: float) -> int:
    """The side of the largest square of at most a fraction `keep` of n tokens."""
    return math.isqrt(kept(n, keep))
