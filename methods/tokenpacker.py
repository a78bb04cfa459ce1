"""TokenPacker, "TokenPacker: Efficient Visual Projector for Multimodal LLM" (IJCV 2025, arXiv 2407.02392;
CircleRadon/TokenPacker).

A trained projector. The grid of the tower's features X, resampled (bilinear) to a grid that is `scale` times coarser on
each side, gives one query per output token; keys and values are the tower's features of several levels M, side by side,
and a query attends only to the scale x scale cells of its own window w:

    q = LN(W_q resize(X)),    k = LN(MLP_k(M)),    v = LN(MLP_v(M)),    Z_w = MLP(MultiHead(q_w, k_w, v_w))

without a residual from q. `levels` are indices of the tower's hidden states, whose first is the embedding: 12, 16, 22
and 23 are the outputs of layers 11, 15, 21 and 22. LN has epsilon 1e-6, attention 8 heads.

`checkpoint` holds the projector's tensors as PyTorch names them (q_proj_1, k_proj_1, v_proj_1, ln_q_1, ln_k_1, ln_v_1,
clip_attn, mlp; prefixes are ignored); the language model trained with it is the model itself. The high-resolution
variant is not covered. Positions are compact. The model's own projector still runs, and is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Positions, Shape, Step, torch
from pruneval.methods.trained import Projector, mlp, part, weights

HEADS = 8
PARTS = ("q_proj_1", "k_proj_1", "v_proj_1", "ln_q_1", "ln_k_1", "ln_v_1", "clip_attn", "mlp")


@dataclass(frozen=True)
class TokenPacker(Projector):
    """Packs windows of `scale` x `scale` cells into one token each: 144, 64 or 36 of 576 for 2, 3 or 4."""

    card: ClassVar[Card] = Card(
        "tokenpacker",
        "TokenPacker",
        seam=("embed",),
        summary="A trained projector whose coarse tokens attend to the fine cells of their own window.",
        paper="TokenPacker: Efficient Visual Projector for Multimodal LLM",
        year=2024,
        arxiv="2407.02392",
        repository="CircleRadon/TokenPacker",
        merges=True,
        provisional="the tensors' names have not been compared with a released checkpoint",
    )
    positions: ClassVar[Positions] = "compact"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        f"llava-1.5-7b@{576 // scale**2}": {"scale": scale} for scale in (2, 3, 4)
    }

    checkpoint: str = ""
    scale: int = 2
    levels: str = "12,16,22,23"

    def check(self) -> None:
        if self.scale < 2:
            raise MethodError(f"tokenpacker: scale must be at least 2, not {self.scale}")
        parts = self.levels.split(",")
        if not all(one.strip().isdigit() and int(one) > 0 for one in parts):
            raise MethodError(f"tokenpacker: levels must be numbers from 1 like 12,16,22,23, not {self.levels!r}")

    @property
    def layers(self) -> list[int]:
        """The vision layers (0-based) whose outputs the levels are."""
        return [int(one) - 1 for one in self.levels.split(",")]

    def needs(self, shape: Shape) -> dict[int, Needs]:
        self.suits(shape)
        if max(self.layers) >= shape.vision_layers:
            raise MethodError(f"tokenpacker: levels go up to {shape.vision_layers} for this model, not {self.levels}")
        return {0: Needs(vision=tuple(sorted({*self.layers, shape.feature_layer})))}

    def side(self, n: int) -> int:
        side = math.isqrt(n)
        if side * side != n or side % self.scale:
            raise MethodError(f"tokenpacker: scale {self.scale} does not divide a grid of {side} x {side} cells")
        return side // self.scale

    def work(self, shape: Shape, visual: int, text: int) -> dict[str, int]:
        """The trained projector: keys and values of all cells, the rest of the packed tokens."""
        found = self._tensors("cpu")
        size = {name: sum(one.numel() for one in part(found, name).values() if one.ndim == 2) for name in PARTS}
        width, packed = found["clip_attn.out_proj.weight"].shape[0], self.side(visual) ** 2
        cells = visual * (size["k_proj_1"] + size["v_proj_1"] + 2 * width**2)
        return {
            "trained projector": cells + packed * (size["q_proj_1"] + 2 * width**2 + size["mlp"]) + 2 * visual * width
        }

    def project(self, step: Step, tile: int, side: int) -> torch.Tensor:
        cls, vision = int(step.vision.has_cls), step.vision
        single = vision.hidden(step.shape.feature_layer)[tile][cls:]
        levels = torch.cat([vision.hidden(layer)[tile][cls:] for layer in self.layers], dim=-1)
        return pack(self._tensors(str(single.device)), single, levels, vision.grids[tile][0], side)

    def _tensors(self, device: str) -> dict[str, torch.Tensor]:
        found = weights("tokenpacker", self.checkpoint, device)
        keys = {key: next((at for at in (key.find(name) for name in PARTS) if at >= 0), 0) for key in found}
        return {key[keys[key] :]: each for key, each in found.items()}


def pack(
    tensors: dict[str, torch.Tensor], single: torch.Tensor, levels: torch.Tensor, rows: int, side: int
) -> torch.Tensor:
    """(side side, d) tokens, in raster order.

    Args:
        tensors: the projector's, by name.
        single: (P, c) cells of one level, in raster order.
        levels: (P, m c) cells of all levels.
        rows: of the cells' square grid.
        side: of the tokens' square grid.

    Raises: MethodError when a tensor is missing or does not fit.
    """
    try:
        ends = tensors["clip_attn.in_proj_weight"].chunk(3), tensors["clip_attn.in_proj_bias"].chunk(3)
        exact = tensors["q_proj_1.weight"].dtype
        linear, width = torch.nn.functional.linear, len(tensors["clip_attn.out_proj.weight"])

        def norm(name: str, x: torch.Tensor) -> torch.Tensor:
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            return torch.nn.functional.layer_norm(x, (width,), weight, bias, eps=1e-6)

        grid = single.to(exact).unflatten(0, (rows, rows)).movedim(-1, 0)[None]
        coarse = torch.nn.functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        query = norm("ln_q_1", linear(coarse[0].flatten(1).T, tensors["q_proj_1.weight"]))
        key, value = (
            norm(f"ln_{one}_1", mlp("tokenpacker", part(tensors, f"{one}_proj_1."), levels)) for one in ("k", "v")
        )
        query, key, value = (
            linear(x, weight, bias).unflatten(-1, (HEADS, -1))
            for x, weight, bias in zip(
                (query, windows(key, rows, side), windows(value, rows, side)), *ends, strict=True
            )
        )
        # (Q, heads, d_h) against the (Q, cells, heads, d_h) of its window
        attention = (torch.einsum("qhd,qchd->qhc", query, key) / math.sqrt(query.shape[-1])).softmax(-1)
        mixed = torch.einsum("qhc,qchd->qhd", attention, value).flatten(1)
        out = linear(mixed, tensors["clip_attn.out_proj.weight"], tensors["clip_attn.out_proj.bias"])
        return mlp("tokenpacker", part(tensors, "mlp."), out)
    except KeyError as error:
        raise MethodError(f"tokenpacker: the checkpoint has no {error.args[0]}") from None
    except RuntimeError as error:
        raise MethodError(f"tokenpacker: the checkpoint is for another model: {error}") from None


def windows(cells: torch.Tensor, rows: int, side: int) -> torch.Tensor:
    """(P, c) cells of a square grid as (side side, b, c): the cells of each window, both in raster order."""
    scale = rows // side
    return cells.reshape(side, scale, side, scale, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
