"""Gathering the least important visual tokens square by square, as VFlowOpt does."""

from __future__ import annotations

from pruneval.methods.step import Reduction, Step, torch

TINY = 1e-12


def gather(step: Step, score: torch.Tensor, square: torch.Tensor, count: int) -> Reduction:
    """The `count` strongest visual tokens, and one for each square of the others.

    That is their mean, weighted by score, in the place of the strongest of them.

    Args:
        step: the boundary.
        score: (v,) of the visual tokens; weights of less than nothing count as nothing.
        square: (v,) number of the square each is in.
        count: of those that stay as they are.
    """
    order = torch.sort(score, descending=True, stable=True).indices
    others = order[count:]
    number, label = square[others].unique(return_inverse=True)
    hidden, weight = step.hidden[step.visual[others]], score[others].clamp(min=TINY)
    total = weight.new_zeros(len(number), 1 + hidden.shape[1])
    total.index_add_(0, label, torch.cat([weight[:, None], weight[:, None] * hidden], dim=1))
    rank = torch.arange(len(others), device=label.device)
    best = others[torch.full_like(number, len(others)).scatter_reduce(0, label, rank, "amin")]
    several = torch.bincount(label, minlength=len(number)) > 1
    keep = step.keep(torch.cat([order[:count], best])).keep
    if not bool(several.any()):
        return Reduction(keep)
    slots = torch.searchsorted(keep, step.visual[best[several]])
    return Reduction(keep, slots, (total[:, 1:] / total[:, :1])[several].to(step.hidden))


def filling(square: torch.Tensor, drop: int) -> int | None:
    """How many more than `drop` of the last tokens fill exactly as many squares; None when no number does.

    Args:
        square: (n,) number of the square each token is in, the most important first.
        drop: a number of tokens.
    """
    worst = square.flip(0).tolist()
    filled = set(worst[:drop])
    for more in range(len(worst) - drop + 1):
        filled |= set(worst[: drop + more][-1:])
        if len(filled) == more:
            return more
    return None
