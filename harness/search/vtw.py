"""VTW (AAAI 2025, arXiv 2405.05803, section 3.3): the first layer from which no visual token is needed.

K is the first layer at which the mean of KL(withdrawn at K || full) over the samples, of the next token's distribution
in nats, is at most eta. Where no layer qualifies, nothing is withdrawn (K = L). The authors' candidates start at layer
5 and eta is .003 for LLaVA-1.5-7B, .0005 for 13B and .0001 for LLaVA-NeXT (lzhxmu/VTW at a3d8cfc).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def search(
    divergence: Callable[[int], float],
    *,
    layers: int,
    eta: float = 0.003,
    first: int = 5,
    on_layer: Callable[[int, float], None] = lambda layer, value: None,
) -> tuple[int, dict[int, float]]:
    """K, and the divergence at every candidate from `first` to L - 1.

    Args:
        divergence: of withdrawal at a layer from the full model.
        layers: L.
        eta: the threshold.
        first: the first candidate.
        on_layer: called with every candidate and its divergence.
    """
    curve = {}
    for layer in range(first, layers):
        curve[layer] = divergence(layer)
        on_layer(layer, curve[layer])
    return next((layer for layer, value in curve.items() if value <= eta), layers), curve


def divergence(withdrawn: Tensor, full: Tensor) -> float:
    """Mean over samples of KL(withdrawn || full) in nats; both (samples, vocabulary) of log-probabilities."""
    return float((withdrawn.exp() * (withdrawn - full)).sum(-1).mean())
