"""What a method may look at: the attention of a layer, and what the vision tower saw of a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Attention(Protocol):
    """One layer's attention for one sample, computed row by row on demand. Softmax runs over the full row, in float32.

    Attributes:
        query: (H, n, d_h), after rotary embedding.
        key: (H_kv, n, d_h), after rotary embedding; use `keys()` for all H heads.
        value: (H_kv, n, d_h).
        origin: (n,) the origins of the n tokens (decoder layers), or None (vision tower).
        scaling: factor on the dot products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    origin: Tensor | None
    scaling: float

    def rotated(self, vectors: Tensor) -> Tensor:
        """(..., n, d_h) vectors with the rotary embedding of the n tokens (decoder layers)."""

    def unrotated(self) -> Attention:
        """The same attention without rotary embedding (decoder layers)."""

    def rows(self, index: Tensor | Sequence[int] | int) -> Tensor:
        """Attention of the query rows `index`, shape (H, r, n)."""

    def blocks(self, index: Tensor | Sequence[int] | None = None) -> Iterator[Tensor]:
        """The query rows `index` (default all) a few at a time, (H, r, n) each, so that no full map is held."""

    def received(self, index: Tensor | Sequence[int] | None = None) -> Tensor:
        """Mean over the query rows `index` (default all) of what each token receives, (H, n); no full map is held."""


class Vision(Protocol):
    """What the vision tower saw of one sample: `tiles` crops of P cells each, in the order of the tower.

    Attributes:
        tiles: number of crops over all images of the sample.
        has_cls: whether row 0 of every tile is a CLS token (then rows 1..P are the cells).
        images: tiles of each image, in prompt order.
        grid: (rows, columns) of a tile's cells, which come row by row; families whose tiles differ in size have none.
        grids: (rows, columns) of each tile's tokens.
    """

    tiles: int
    has_cls: bool
    images: tuple[int, ...]
    grid: tuple[int, int]
    grids: tuple[tuple[int, int], ...]

    def attention(self, layer: int) -> list[Attention]:
        """Attention of a vision layer, one per tile; rows include the CLS token."""

    def hidden(self, layer: int) -> list[Tensor]:
        """Output of a vision layer, one (P or P + 1, d_v) per tile."""

    def clips(self) -> list[Tensor]:
        """(F, P) for each video, in prompt order: numbers 0..N-1 of the visual tokens at place p of frame f.

        Tokens without a place in a frame (newlines, CLS) are in none, and images are no clips.
        """

    def project(self, hidden: Tensor) -> Tensor:
        """(m, d_v) tower outputs through the projector: (m, d)."""

    def to_tokens(self, cells: Tensor | Sequence[Tensor], fill: float = float("nan")) -> Tensor:
        """Numbers on cells, (tiles, P) or (P,) tile by tile, as (N,) numbers on the prompt's visual tokens.

        k numbers per cell, (P, k), make (N, k). A token of several cells gets their mean; tokens without a cell
        (newlines) get `fill`.
        """

    def blocks(self, cells: Tensor) -> Tensor:
        """(P, ...) of a tile's cells as (t, b, ...) of its tokens' blocks, where `Shape.merge` is more than 1."""

    def pixels(self) -> list[Tensor]:
        """(3, height, width) per tile, in [0, 1]; if asked for."""

    def passed(self) -> list[Passed] | None:
        """What came through the tower, one per tile; None when nothing left any of them (`Method.at_encode`)."""

    def arrived(self) -> list[Tensor]:
        """(k,) per tile: numbers 0..N-1 of the visual tokens made of passed cells, in the order of these.

        -1 where the prompt has no token of a passed cell: cut away as padding, resampled or pooled.
        """


@dataclass(frozen=True)
class Passed:
    """A tile behind a tower in which tokens were dropped or merged.

    Attributes:
        cells: (m,) the cells still there, in the order in which they left the tower.
        total: P, cells of the un-pruned tile.
        entered: tokens (with CLS) that entered each layer of the tower.
        features: (m, d) the cells through the projector; None where several cells become one token.
    """

    cells: Tensor
    total: int
    entered: tuple[int, ...]
    features: Tensor | None = None


class Sheets(Vision, Protocol):
    """The view of a family that lays several tiles out as one grid of tokens, a *sheet*; see `Shape.sheets`.

    Sheets may be cut (padding) and resampled or pooled, and may have newline tokens, which no cell stands behind. Here
    `grids` are those of the tiles before they are put together.
    """

    def tile_of(self) -> Tensor:
        """(N,) the tile under the middle of each visual token, -1 for newlines."""

    def cell_of(self) -> Tensor:
        """(N,) the cell of that tile under the middle of each visual token, -1 for newlines."""

    def is_newline(self) -> Tensor:
        """(N,) which visual tokens are newlines."""

    def token_of(self) -> Tensor:
        """(tiles, P) number of the visual token that is this cell, -1 where it was cut away, resampled or pooled."""

    def sheet_of(self) -> Tensor:
        """(N,) number of the sheet each visual token is in; a newline is in the sheet it belongs to."""

    def place_of(self) -> Tensor:
        """(N, 2) row and column in the sheet; newlines stand right of their row, or below the last one."""
