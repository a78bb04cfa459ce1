"""The local outlier factor (Breunig et al. 2000) on the line."""

from __future__ import annotations

from pruneval.methods.base import torch


def local_outliers(scores: torch.Tensor, neighbours: int) -> float:
    """The share of scores whose local outlier factor is above 1.5, from 0 to 1; 0 for fewer than two scores.

    With exactly so many neighbours each, where there are as many, as scikit-learn counts.
    """
    if len(scores) < 2:
        return 0.0
    distance = (scores.double()[:, None] - scores.double()).abs().fill_diagonal_(float("inf"))
    near, index = (part[:, : min(neighbours, len(scores) - 1)] for part in distance.sort(stable=True))
    density = 1 / (torch.maximum(near, near[:, -1][index]).mean(1) + 1e-10)
    return float((density[index].mean(1) > 1.5 * density).double().mean())
