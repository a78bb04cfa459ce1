"""The contract between a pruning method and the engine, at two heights.

The usual method subclasses `Ranking`: it states how many visual tokens go on from which decoder layer (`counts`) and gives one number per visual token
(`score`). The odd one (merging, recycling, several kinds of rows) subclasses `Method` and answers with a `Reduction`. Both see one sample at a time,
without padding; gathering, batches, positions, masks and the KV cache are the engine's work.

Methods are frozen dataclasses: their parameters are the constructor and nothing else reaches them. They keep no state; what must live between two
layers of one prompt goes into `step.memory`.

torch is imported when it is first used, so cards can be listed without it: method files take `torch` from here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _LazyTorch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _LazyTorch("torch")

__all__ = [
    "Attention",
    "Card",
    "Method",
    "MethodError",
    "Needs",
    "Ranking",
    "Reduction",
    "Shape",
    "Step",
    "Vision",
    "kept",
    "strongest",
    "torch",
]


class MethodError(ValueError):
    """A method, a parameter or a reduction that makes no sense, said in one line."""


@dataclass(frozen=True)
class Card:
    """What a method is and where it comes from. `provisional` says why a method is not yet the paper's, or is empty."""

    name: str
    title: str
    seam: tuple[str, ...]  # where tokens go: "vision", "embed", "layer", "decode"
    summary: str
    paper: str = ""
    year: int | None = None
    arxiv: str = ""
    repository: str = ""
    commit: str = ""
    prompt_aware: bool = False
    merges: bool = False
    calibrated: bool = False
    provisional: str = ""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that methods may depend on.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: of the language model.
        vision_layers: layers of the vision tower.
        feature_layer: the tower's layer (0-based) whose output is projected.
        has_cls: whether row 0 of a tile in the tower is a CLS token.
        tiled: whether one image may become several tiles.
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


@dataclass(frozen=True)
class Needs:
    """What a method wants to see at one boundary; the engine records only what is asked for.

    Attributes:
        attention: decoder layers, all before the boundary, whose queries, keys and values it reads.
        next: whether it reads the attention that the layer at the boundary is about to compute.
        vision: vision-tower layers whose attention and output it reads.
    """

    attention: tuple[int, ...] = ()
    next: bool = False
    vision: tuple[int, ...] = ()


class Attention(Protocol):
    """One layer's attention for one sample, computed row by row on demand. Softmax runs over the full row, in float32.

    Attributes:
        query: (H, n, d_h), after rotary embedding.
        key: (H_kv, n, d_h), after rotary embedding; use `keys()` for all H heads.
        value: (H_kv, n, d_h).
        origin: (n,) the origins of the n tokens (decoder layers), or None (vision tower).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    origin: Tensor | None

    def rows(self, index: Tensor | Sequence[int] | int) -> Tensor:
        """Attention of the query rows `index`, shape (H, r, n)."""

    def received(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Mean over the query rows `index` (default all) of the attention each token receives, shape (H, n); no full map is held."""


class Vision(Protocol):
    """What the vision tower saw of one sample: `tiles` crops of P cells each, in the order of the tower.

    Attributes:
        tiles: number of crops over all images of the sample.
        has_cls: whether row 0 of every tile is a CLS token (then rows 1..P are the cells).
        images: tiles of each image, in prompt order.
        grid: (rows, columns) of a tile's cells.
    """

    tiles: int
    has_cls: bool
    images: tuple[int, ...]
    grid: tuple[int, int]

    def attention(self, layer: int) -> list[Attention]:
        """Attention of a vision layer, one per tile; rows include the CLS token."""

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P or P + 1, d_v) per tile."""

    def project(self, hidden: Tensor) -> Tensor:
        """(m, d_v) tower outputs through the projector: (m, d)."""

    def to_tokens(self, cells: Tensor, fill: float = float("nan")) -> Tensor:
        """(tiles, P) numbers on cells as (N,) numbers on the prompt's visual tokens; tokens without a cell (newlines) get `fill`."""


@dataclass
class Step:
    """One sample at one boundary: the n tokens that are about to enter decoder layer `layer`. No padding, no batch dimension.

    Attributes:
        layer: the boundary, 0-based; 0 is the input of the language model.
        hidden: (n, d) hidden states.
        origin: (n,) where each token stood in the un-pruned prompt; tokens of the method's own making have origins from the prompt length on.
        visual: (v,) stream indices of the visual tokens, ascending.
        total: N, visual tokens of the un-pruned prompt.
        shape: sizes of the model.
        seen: attention of the decoder layers asked for, by layer.
        vision: the vision tower's view, if asked for.
        embeddings: (S, d) the prompt's embeddings before layer 0, un-pruned; `origin` points into it.
        spans: unbroken runs of visual tokens in the un-pruned prompt, as (start, stop) origins.
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
    vision: Vision | None = None
    upcoming: Callable[[], Attention] | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def next(self) -> Attention:
        """The attention that layer `layer` is about to compute on this stream; needs `Needs(next=True)`."""
        if self.upcoming is None:
            raise MethodError(f"the attention of layer {self.layer} was not asked for in needs()")
        return self.upcoming()

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
        """The reduction that lets all text and the visual tokens number `chosen` (0..v-1) go on, in the order they have now."""
        index = torch.cat([self.text, self.visual[chosen.to(self.visual.device)]])
        return Reduction(index.sort().values)


@dataclass(frozen=True)
class Reduction:
    """The stream that goes on.

    Attributes:
        keep: (m,) stream indices in the order in which tokens go on; every text token once. A token inherits origin, kind and position from its index.
        slots: (s,) places in `keep` that get a hidden state of their own (merged or recycled tokens).
        values: (s, d) those hidden states.
        added: (s,) which of them are tokens with an origin of their own: their index only lends kind and position.
    """

    keep: Tensor
    slots: Tensor | None = None
    values: Tensor | None = None
    added: Tensor | None = None


Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class Method:
    """A pruning method. Subclasses are frozen dataclasses with a class attribute `card`.

    `positions` says what happens to position ids: "original" (survivors keep theirs) or "compact" (renumbered); methods where both make sense
    have a parameter `position_mode`.
    """

    card: ClassVar[Card]
    positions: ClassVar[Positions] = "original"

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "keep" and not 0 < value <= 1:
                raise MethodError(f"{self.card.name}: keep must be in (0, 1], not {value:g}")
            if item.name == "position_mode" and value not in ("original", "compact"):
                raise MethodError(f"{self.card.name}: position_mode must be original or compact, not {value!r}")
        self.check()

    def check(self) -> None:
        """Validates the parameters. Raises: MethodError."""

    def needs(self, shape: Shape) -> dict[int, Needs]:
        """The boundaries at which `reduce` is called, ascending, and what it wants to see there. Raises: MethodError when the model has no such layer."""
        raise NotImplementedError

    def reduce(self, step: Step) -> Reduction | None:
        """The stream that goes on, or None when nothing changes."""
        raise NotImplementedError

    def schedule(self, shape: Shape, n: int) -> list[int]:
        """Visual tokens that enter each decoder layer, of a prompt with one image of `n`.

        Declared, not observed: the tests compare it with the trace.
        """
        raise NotImplementedError

    @property
    def position_ids(self) -> Positions:
        """What happens to position ids after a reduction."""
        return getattr(self, "position_mode", self.positions)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter with its value."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @property
    def given(self) -> dict[str, Any]:
        """The parameters the user passed to `build`."""
        return dict(self.__dict__.get("_given", {}))

    @property
    def signature(self) -> str:
        """Name and parameters, as `fastv(layer=2,keep=0.5)`."""
        inner = ",".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.params.items())
        return f"{self.card.name}({inner})" if inner else self.card.name


@dataclass(frozen=True)
class Ranking(Method):
    """A method that ranks visual tokens and keeps the strongest, in the order they have."""

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        """Visual tokens kept at each boundary, of a prompt with `n` of them."""
        raise NotImplementedError

    def score(self, step: Step) -> Tensor:
        """One number per visual token of the step, shape (v,); higher stays."""
        raise NotImplementedError

    def reduce(self, step: Step) -> Reduction | None:
        count = self.counts(step.shape, step.total)[step.layer]
        if count >= len(step.visual):
            return None
        return step.keep(strongest(self.score(step), count))

    def schedule(self, shape: Shape, n: int) -> list[int]:
        counts, current, layers = self.counts(shape, n), n, []
        for layer in range(shape.layers):
            current = min(current, counts.get(layer, current))
            layers.append(current)
        return layers


def kept(n: int, keep: float) -> int:
    """Tokens left of `n` when a fraction `keep` stays: rounded to the nearest, at least one."""
    return max(1, min(n, round(n * keep)))


def strongest(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values


def boundary(name: str, layer: int, shape: Shape) -> None:
    """Refuses a boundary the model does not have."""
    if not 0 <= layer < shape.layers:
        raise MethodError(f"{name}: layer must be between 0 and {shape.layers - 1} for this model, not {layer}")
