"""What methods share that choose among the cells of the vision tower's tiles, before the language model.

The salience of a cell is the attention it gets from the CLS token, or on average where there is no CLS token. A tile's
share of the budget follows the tokens it has in the prompt, so padding that was cut away has none. Newlines and the CLS
tokens of Video-LLaVA's frames stand for no cell: they are not ranked, and go unless there is room for all that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, TypeVar

from pruneval.methods.base import (
    Attention,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    kept,
    option,
    strongest,
    torch,
)

Part = TypeVar("Part", bound=Sized)


@dataclass(frozen=True)
class Area:
    """Visual tokens that form a grid.

    Attributes:
        tokens: (rows * columns,) their numbers 0..N-1, row by row.
        columns: the grid's width.
    """

    tokens: torch.Tensor
    columns: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def rows(self) -> int:
        """The grid's height."""
        return len(self.tokens) // max(1, self.columns)


@dataclass(frozen=True)
class PerTile(Method):
    """Keeps a fraction `keep` of the visual tokens before the language model, tile by tile; order is kept.

    `newline` is drop (as most released codes) or keep: beyond the budget, those of rows in which a token stays. With
    `per_tile`, so many tokens of every tile instead of `keep`, as papers count on models that cut images.
    """

    keep: float = 0.5
    per_tile: int = option(0)
    newline: Literal["drop", "keep"] = "drop"
    position_mode: Positions = "compact"

    def check(self) -> None:
        if self.newline not in ("drop", "keep"):
            raise MethodError(f"{self.card.name}: newline must be drop or keep, not {self.newline!r}")
        check_per_tile(self.card.name, self.per_tile)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        count = declared(self.card.name, shape, n, self.keep, self.per_tile)
        if self.newline == "keep" and shape.sheets and not shape.whole and count < n:
            raise MethodError(f"{self.card.name}: with newline=keep the count depends on the rows that stay")
        return [count] * shape.layers

    def score(self, step: Step) -> torch.Tensor:
        """(N,) higher stays; nan where no cell is."""
        raise NotImplementedError

    def choose(self, step: Step, shares: list[tuple[Area, int]]) -> list[torch.Tensor]:
        """Numbers 0..N-1 of the tokens that stay of each tile, as many as its share."""
        score = self.score(step)
        return [tile.tokens[strongest(score[tile.tokens], share)] for tile, share in shares]

    def reduce(self, step: Step) -> Reduction | None:
        found = shares(step, self.keep, self.per_tile, lambda: tiles(step))
        if found is None:
            return None
        chosen = torch.cat(self.choose(step, found))
        if self.newline == "keep" and step.shape.sheets:
            return step.keep(torch.cat([chosen, newlines_of(step, chosen)]))
        ranked = torch.zeros(step.total, dtype=torch.bool, device=chosen.device)
        ranked[torch.cat([tile.tokens for tile, _ in found])] = True
        room = (~ranked).nonzero().squeeze(-1)[: 0 if self.per_tile else kept(step.total, self.keep) - len(chosen)]
        return step.keep(torch.cat([chosen, room]))


def check_per_tile(name: str, per_tile: int) -> None:
    """Raises: MethodError when it is no number of tokens."""
    if per_tile < 0:
        raise MethodError(f"{name}: per_tile must be a number of tokens, or 0 for a share `keep`, not {per_tile}")


def declared(name: str, shape: Shape, n: int, keep: float, per_tile: int) -> int:
    """How many of `n` visual tokens stay: a fraction `keep`, or `per_tile` of every tile.

    Raises: MethodError when that depends on how many tiles the image has.
    """
    if not per_tile:
        return kept(n, keep)
    if shape.sheets and not shape.whole:
        raise MethodError(f"{name}: with per_tile the count depends on how many tiles the image has")
    return sum(min(per_tile, tokens) for _, tokens in shape.whole or ((n, n),))


def shares(
    step: Step, keep: float, per_tile: int, areas: Callable[[], Sequence[Part]]
) -> list[tuple[Part, int]] | None:
    """The tiles, with how many of their tokens stay; None when all do, for which the tower need not be looked at.

    Args:
        step: the boundary.
        keep: the fraction of the prompt's visual tokens that stays, shared out by the tiles' tokens.
        per_tile: if not 0, so many of each tile instead, as far as it has them.
        areas: gives the tiles, each as long as it has tokens.
    """
    if not per_tile and kept(step.total, keep) >= step.total:
        return None
    found = areas()
    sizes = [len(area) for area in found]
    counts = [min(per_tile, size) for size in sizes] if per_tile else spread(kept(step.total, keep), sizes)
    return None if per_tile and counts == sizes else list(zip(found, counts, strict=True))


def salience(attention: Attention, cls: bool) -> torch.Tensor:
    """(P,) attention from the CLS token to the cells, or what a cell receives on average; mean over heads."""
    return attention.rows(0)[:, 0, 1:].mean(0) if cls else attention.received().mean(0)


def token_salience(step: Step) -> torch.Tensor:
    """(N,) the salience of the visual tokens in the layer that is projected; nan where no cell is."""
    cls = step.shape.has_cls
    return step.vision.to_tokens([salience(each, cls) for each in step.vision.attention(step.shape.feature_layer)])


def outliers(score: torch.Tensor) -> int:
    """How many scores lie above the third quartile by more than 1.5 interquartile ranges; at least one."""
    low, high = score.quantile(score.new_tensor([0.25, 0.75]))
    return max(1, int((score > high + 1.5 * (high - low)).sum()))


def tower_features(step: Step) -> torch.Tensor:
    """(N, d_v) what the tower gives the projector for each visual token; several cells of a token side by side."""
    if step.shape.merge == 1:
        return tower_means(step)
    cells = step.vision.hidden(step.shape.feature_layer)
    return torch.cat([step.vision.blocks(tile[int(step.shape.has_cls) :]).flatten(1) for tile in cells])


def tower_means(step: Step) -> torch.Tensor:
    """(N, d_v) the same, with the mean of a token's cells."""
    cells = step.vision.hidden(step.shape.feature_layer)
    return step.vision.to_tokens([tile[int(step.shape.has_cls) :] for tile in cells])


def tiles(step: Step) -> list[Area]:
    """The tokens of each tile of the tower; some may have none."""
    if step.shape.sheets:
        return _labelled(step, step.vision.tile_of(), step.vision.tiles)
    grids, size = step.vision.grids, step.shape.merge
    numbers = [torch.full((rows * columns * size,), float(tile)) for tile, (rows, columns) in enumerate(grids)]
    label = step.vision.to_tokens(numbers, fill=-1).to(step.visual.device)
    return [Area((label == tile).nonzero().squeeze(-1), columns) for tile, (_, columns) in enumerate(grids)]


def grids(step: Step) -> list[Area]:
    """The tokens of each sheet, where tiles are put together to sheets, or of each tile."""
    if not step.shape.sheets:
        return tiles(step)
    sheet = step.vision.sheet_of().masked_fill(step.vision.is_newline(), -1)
    return _labelled(step, sheet, int(sheet.max()) + 1)


def _labelled(step: Step, label: torch.Tensor, count: int) -> list[Area]:
    """The tokens with each label; they fill a rectangle of their sheet."""
    column, areas = step.vision.place_of()[:, 1], []
    for each in range(count):
        mine = (label == each).nonzero().squeeze(-1)
        areas.append(Area(mine, len(column[mine].unique())))
    return areas


def newlines_of(step: Step, chosen: torch.Tensor) -> torch.Tensor:
    """Numbers of the newlines that end a row in which a token was chosen, or a whole image or video."""
    view = step.vision
    row = view.sheet_of() * (step.total + 1) + view.place_of()[:, 0]
    newline = view.is_newline()
    stays = torch.isin(row, row[chosen]) | ~torch.isin(row, row[~newline])
    return (newline & stays).nonzero().squeeze(-1)


def spread(total: int, sizes: Sequence[int], least: int = 0) -> list[int]:
    """`total` tokens over tiles in proportion to their sizes (largest remainder).

    `least` of each, even beyond the total; of none more than it has.
    """
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda tile: shares[tile] - exact[tile])
    for tile in by_remainder[: total - sum(shares)]:
        shares[tile] += 1
    return [min(size, max(least, share)) for size, share in zip(sizes, shares, strict=True)]
