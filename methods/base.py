"""The contract between a pruning method and the engine, at two heights.

The usual method subclasses `Ranking`: it states how many visual tokens go on from which decoder layer (`counts`) and
gives one number per visual token (`score`). The odd one (merging, recycling, several kinds of rows) subclasses
`Method` and answers with a `Reduction`. Both see one sample at a time, without padding; gathering, batches, positions,
masks and the KV cache are the engine's work.

Methods are frozen dataclasses: their parameters are the constructor and nothing else reaches them. They keep no state;
what must live between two layers of one prompt goes into `step.memory`.

torch is imported when it is first used, so cards can be listed without it: method files take `torch` from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pruneval.methods.step import (
    DecodeStep,
    EncodeStep,
    MethodError,
    Needs,
    Reduction,
    Shape,
    Step,
    torch,
)
from pruneval.methods.views import Attention, Vision

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Attention",
    "Card",
    "DecodeStep",
    "EncodeStep",
    "Method",
    "MethodError",
    "Needs",
    "Place",
    "Positions",
    "Ranking",
    "Reduction",
    "Shape",
    "Step",
    "Vision",
    "boundary",
    "kept",
    "strongest",
    "torch",
]


@dataclass(frozen=True)
class Card:
    """What a method is and where it comes from. `provisional` says why a method is not yet the paper's, or is empty."""

    name: str
    title: str
    seam: tuple[str, ...]  # where tokens go: "pixels", "vision", "embed", "layer", "decode"
    summary: str
    paper: str = ""
    year: int | None = None
    arxiv: str = ""
    repository: str = ""
    commit: str = ""
    prompt_aware: bool = False
    merges: bool = False
    reorders: bool = False  # whether survivors may change places
    calibrated: bool = False
    clip: bool = False  # whether it compares cells with the question in CLIP's space, by the model's text tower
    provisional: str = ""


Positions = Literal["original", "compact"]
Place = Literal["attention", "layer"]


@dataclass(frozen=True)
class Method:
    """A pruning method. Subclasses are frozen dataclasses with a class attribute `card`.

    `positions` says what happens to position ids: "original" (survivors keep theirs) or "compact" (renumbered);
    methods where both make sense have a parameter `position_mode`. `knob` names the parameter that sets the budget,
    from 0 (least) to 1 (all). `presets` are published settings: "model@tokens" -> parameters.
    """

    card: ClassVar[Card]
    positions: ClassVar[Positions] = "original"
    knob: ClassVar[str] = "keep"
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {}

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
        """The boundaries at which `reduce` is called, ascending, and what it wants to see there.

        Raises: MethodError when the model has no such layer.
        """
        raise NotImplementedError

    def ready(self) -> None:
        """Refuses to run without trained weights, where costs are declared without them. Raises: MethodError."""

    def reduce(self, step: Step) -> Reduction | None:
        """The stream that goes on, or None when nothing changes."""
        raise NotImplementedError

    def resizing(self, shape: Shape) -> bool:
        """Whether images are scaled down before the vision tower, as `at_pixels` says."""
        return False

    def at_pixels(self, shape: Shape, grid: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of visual tokens to which a tile is scaled that has `grid` of them.

        Behind the tower each of the tile's tokens is a copy of the nearest one; `reduce` must keep one of each.
        """
        return grid

    def settles(self, step: Step) -> bool:
        """Whether the answer of the helper is good enough to be the model's (`Session.early`). Asked at the boundaries
        where there is a helper; the model answers in any case.
        """
        return False

    def encoding(self, shape: Shape) -> dict[int, Place]:
        """The vision tower's layers at which `at_encode` is called for every tile, ascending, and where: behind the
        layer's "attention" or behind the whole "layer".
        """
        return {}

    def at_encode(self, step: EncodeStep) -> Reduction | None:
        """The tile's tokens that go on in the tower, or None when nothing changes.

        `keep` may be in any order; `slots`, `values` and `weights` work as in the language model. A CLS token stays
        where it is. What left the tower has features of zeros at the input of the language model, where `reduce` must
        drop it: see `Vision.passed` and `Vision.arrived`, and `pruneval.methods.arrival` for the usual way.
        """
        return None

    def encoder_schedule(self, shape: Shape, cells: int) -> list[int]:
        """Tokens of a tile of `cells` (with CLS) that enter each layer of the tower.

        Raises: MethodError when it depends on the sample.
        """
        return [cells + shape.has_cls] * shape.vision_layers

    def evicting(self, shape: Shape) -> tuple[int, ...]:
        """The decoder layers for which `at_decode` is called after every generated token."""
        return ()

    def at_decode(self, step: DecodeStep) -> Tensor | None:
        """Which of the cached visual tokens, by number 0..v-1, stay in the layer's cache; None when all do."""
        return None

    def selecting(self, shape: Shape) -> tuple[int, ...]:
        """The decoder layers (from 1) before which `select` is called at every decode step of one token."""
        return ()

    def select(self, step: DecodeStep) -> Tensor | None:
        """Which of the cached visual tokens of layer - 1, by number 0..v-1, the newest token attends to in layers from
        `layer` on (until the next selection), in this step only; None when all. Caches keep everything.
        """
        return None

    def schedule(self, shape: Shape, n: int) -> list[int]:
        """Visual tokens that enter each decoder layer, of a prompt with one image of `n` (or the tiles `shape.whole`).

        Declared, not observed: the tests compare it with the trace. Raises: MethodError when it depends on the sample.
        """
        raise NotImplementedError

    def declarable(self) -> Method | None:
        """The setting whose declared counts are about those of this one, where these depend on the sample."""
        return None

    def caching(self, shape: Shape, entered: Sequence[int], generated: int) -> list[int]:
        """Visual tokens that each layer's cache holds once `generated` tokens have been read after the prompt.

        Declared like `schedule`, of the `entered` ones of each layer. Raises: MethodError when it is not known.
        """
        if self.evicting(shape):
            raise MethodError(f"{self.card.name}: what leaves the caches while the answer is generated is not declared")
        return list(entered)

    @property
    def position_ids(self) -> Positions:
        """What happens to position ids after a reduction."""
        return getattr(self, "position_mode", self.positions)

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter with its value, without options that are off."""
        named = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        off = {item.name: item.default for item in dataclasses.fields(self) if item.metadata.get("option")}
        return {name: value for name, value in named.items() if name not in off or value != off[name]}

    @property
    def given(self) -> dict[str, Any]:
        """The parameters the user passed to `build`."""
        return dict(self.__dict__.get("_given", {}))

    @property
    def signature(self) -> str:
        """Name and parameters, as `fastv(layer=2,keep=0.5)`."""
        inner = ",".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.params.items()
        )
        return f"{self.card.name}({inner})" if inner else self.card.name


def option(default: Any) -> Any:
    """A parameter that is no part of a method's signature while it has its default: added later, results stay valid."""
    return dataclasses.field(default=default, metadata={"option": True})


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
