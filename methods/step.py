"""What a method is shown at a boundary, and what it answers.

torch is imported when it is first used, so cards can be listed without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pruneval.methods.clip import Clip
    from pruneval.methods.helper import Helper, Reading
    from pruneval.methods.views import Attention, Sheets
else:

    class _LazyTorch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _LazyTorch("torch")


class MethodError(ValueError):
    """A method, a parameter or a reduction that makes no sense, said in one line."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that methods may depend on.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: of the language model.
        vision_layers: layers of the vision tower.
        feature_layer: the tower's layer (0-based) whose output is projected.
        has_cls: whether row 0 of a tile in the tower is a CLS token.
        tiled: whether one image or video may become several tiles.
        merge: cells of the tower that become one visual token.
        sheets: whether tiles are put together to larger grids, with newline tokens; then the view is a `views.Sheets`.
        whole: (cells, visual tokens) of each tile, where counts are declared for a prompt of whole tiles without
            newlines, as published costs assume; empty where the prompt's tiles are not known.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vision_layers: int = 0
    feature_layer: int = 0
    has_cls: bool = False
    tiled: bool = False
    sheets: bool = False
    merge: int = 1
    whole: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a method wants to see at one boundary; the engine records only what is asked for.

    Attributes:
        attention: decoder layers, all before the boundary, whose queries, keys and values it reads.
        next: whether it reads the attention that the layer at the boundary is about to compute.
        vision: vision-tower layers whose attention and output it reads.
        every_row: whether it reads all rows of attention there, even where the CLS token's would be one.
        frames: whether it reads how videos are made of frames (`Step.clips`).
        clip: whether it compares cells with the question in CLIP's space (`Step.clip`); only models that look through a
            CLIP tower, and whose text tower is at hand, have it.
        helper: how a helper model reads the prompt (`Step.helper`), for methods that have one.
        pixels: whether it reads the tiles' pixels (`Vision.pixels`); only towers that take whole tiles have them.
    """

    attention: tuple[int, ...] = ()
    next: bool = False
    vision: tuple[int, ...] = ()
    every_row: bool = False
    frames: bool = False
    clip: bool = False
    helper: Reading | None = None
    pixels: bool = False


@dataclass
class Step:
    """One sample at one boundary: the n tokens about to enter decoder layer `layer`. No padding, no batch dimension.

    Attributes:
        layer: the boundary, 0-based; 0 is the input of the language model.
        hidden: (n, d) hidden states.
        origin: (n,) where each token stood in the un-pruned prompt; tokens a method made itself have origins from the
            prompt length on.
        visual: (v,) stream indices of the visual tokens, ascending.
        total: N, visual tokens of the un-pruned prompt.
        shape: sizes of the model.
        embeddings: (S, d) the prompt's embeddings before layer 0, un-pruned; `origin` points into it.
        spans: where the images and videos stand in the un-pruned prompt, as (start, stop) origins. One that text
            interrupts has several; what was encoded outside the block is told apart only by the text between.
        generator: gives a private random generator (CPU), the same for this sample in any batch.
        seen: attention of the decoder layers asked for, by layer.
        vision: the vision tower's view, if asked for; a `Vision`, and of `Sheets` where `shape.sheets` says so.
        clips: if asked for, (F, P) origins of the tokens of each video's frames, as `Vision.clips`; some may be gone.
        clip: the question in CLIP's space, if asked for.
        upcoming: what `next` calls.
        helping: what `helper` calls.
        final_norm: the norm behind the last decoder layer, (..., d) -> (..., d).
        memory: what the method wants to remember until the next boundary of the same prompt.
    """

    layer: int
    hidden: Tensor
    origin: Tensor
    visual: Tensor
    total: int
    shape: Shape
    embeddings: Tensor
    spans: tuple[tuple[int, int], ...]
    generator: Callable[[], torch.Generator]
    seen: Mapping[int, Attention] = field(default_factory=dict)
    vision: Sheets = None  # type: ignore[assignment]  # there when needs() asks for it, like `clip`
    clips: Sequence[Tensor] = ()
    clip: Clip = None  # type: ignore[assignment]
    upcoming: Callable[[], Attention] | None = None
    helping: Callable[[], Helper] | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    final_norm: Callable[[Tensor], Tensor] = lambda hidden: hidden

    @property
    def next(self) -> Attention:
        """The attention that layer `layer` is about to compute on this stream; needs `Needs(next=True)`."""
        if self.upcoming is None:
            raise MethodError(f"the attention of layer {self.layer} was not asked for in needs()")
        return self.upcoming()

    @property
    def helper(self) -> Helper:
        """What the helper model makes of the sample; it runs when this is first read. Needs `Needs(helper=...)`."""
        if self.helping is None:
            raise MethodError(f"no helper was asked for in needs() at layer {self.layer}")
        return self.helping()

    @property
    def text(self) -> Tensor:
        """Stream indices of the tokens that are not visual, ascending."""
        flag = torch.ones(len(self.origin), dtype=torch.bool, device=self.origin.device)
        flag[self.visual] = False
        return flag.nonzero().squeeze(-1)

    @property
    def question(self) -> Tensor:
        """Stream indices of the text after the last visual token, ascending."""
        return torch.arange(int(self.visual[-1]) + 1, len(self.origin), device=self.origin.device)

    def keep(self, chosen: Tensor) -> Reduction:
        """The reduction that lets all text and the visual tokens number `chosen` (0..v-1) go on, order as it is."""
        index = torch.cat([self.text, self.visual[chosen.to(self.visual.device)]])
        return Reduction(index.sort().values)


@dataclass
class EncodeStep:
    """One tile inside the vision tower: behind layer `layer`, or behind the attention of that layer. No padding.

    Attributes:
        layer: the tower's layer, 0-based.
        hidden: (t, d_v) the tokens there; row 0 is the CLS token where there is one.
        cells: (t,) the cell each token is (or was, before others were merged into it), -1 for CLS.
        blocks: (t,) number of the visual token each cell becomes part of, -1 for CLS; cells of a block stay together.
        attention: that of the layer, over the tokens that entered it.
        total: P, cells of the un-pruned tile.
        tokens: visual tokens the un-pruned tile becomes.
        weight: (t,) how many tokens each counts as in attention, or None when all count as one.
        shape: sizes of the model.
        memory: what the method wants to remember of this tile until its next layer.
    """

    layer: int
    hidden: Tensor
    cells: Tensor
    blocks: Tensor
    attention: Attention
    total: int
    tokens: int
    shape: Shape
    weight: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> int:
        """Rows before the first cell: 1 with a CLS token, else 0."""
        return int(self.shape.has_cls)


@dataclass
class DecodeStep:
    """One sample's cache of one decoder layer, after a generated token went through the layer. No padding.

    Attributes:
        layer: the decoder layer; for `Method.select` the one that comes next.
        generated: t, tokens read after the prompt.
        attention: that of the newest tokens, usually one: `rows(-1)` is (H, 1, n) over the n cached tokens.
        visual: (v,) places of the visual tokens in the cache, ascending.
        entered: visual tokens that entered the layer with the prompt.
        shape: sizes of the model.
        memory: what the method wants to remember of this layer until the next token.
    """

    layer: int
    generated: int
    attention: Attention
    visual: Tensor
    entered: int
    shape: Shape
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reduction:
    """The stream that goes on.

    Attributes:
        keep: (m,) stream indices in the order in which tokens go on; every text token once. A token inherits origin,
            kind and position from its index.
        slots: (s,) places in `keep` that get a hidden state of their own (merged or recycled tokens).
        values: (s, d) those hidden states.
        added: (s,) which of them are tokens with an origin of their own: their index only lends kind and position.
        weights: (m,) how many tokens each counts as in the attention of all layers from here on, decoding included
            (log of it is added to the logits of its column); None leaves them as they are.
        compact: whether this reduction renumbers positions, where it differs from the method's `position_ids`.
        everywhere: whether the tokens that do not go on also leave the caches of earlier layers, once the prompt is
            read. Text stays there as everywhere.
    """

    keep: Tensor
    slots: Tensor | None = None
    values: Tensor | None = None
    added: Tensor | None = None
    weights: Tensor | None = None
    compact: bool | None = None
    everywhere: bool = False
