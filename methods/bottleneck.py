"""A variational bottleneck per token: how much of a state goes beyond a prior that all tokens share.

For a token's state V (d channels), with g = sigmoid(I(V)) and prior N(mu_p, sp) (a mean and a variance per channel),

    mu = mu_p + g * (V - mu_p),    log v = MLP(V),
    s  = 1/d sum_j 1/2 [ ln(sp_j / v_j) + (v_j + (mu_j - mu_pj)^2) / sp_j - 1 ]

is the divergence of the posterior N(mu, v) from the prior, averaged over channels: nought for a token that says no more
than any other. Nothing is drawn at inference. In training Z = mu + sqrt(v) eps takes the token's place, and the loss is
the answer's cross-entropy + beta times the mean of s over the tokens; beta falls linearly from 0.5 to 0.2.

The tensors: "prior.mean", "prior.logvar" (d,), and two networks of two layers, "gate.0.weight", "gate.0.bias",
"gate.2.weight", "gate.2.bias", likewise "logvar.*", all d wide. From what is published of IF-Prune; widths, clamping
and initial values are ours (its code was not read).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pruneval.methods.step import MethodError, torch
from pruneval.methods.trained import mlp, part

if TYPE_CHECKING:
    from torch import Tensor

CLAMP = 10.0
"""Largest size of a log variance."""


def fresh(width: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Untrained tensors for states of `width` channels: a standard normal prior, gates half open, float32."""
    tensors = {"prior.mean": torch.zeros(width), "prior.logvar": torch.zeros(width)}
    for name in ("gate", "logvar"):
        for layer in (0, 2):
            weight = torch.randn(width, width, generator=generator) * width**-0.5
            tensors[f"{name}.{layer}.weight"] = weight * (0.1 if layer == 2 else 1)
            tensors[f"{name}.{layer}.bias"] = torch.zeros(width)
    return tensors


def posterior(tensors: Mapping[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log variances, (..., d) each, of states (..., d). Raises: MethodError when tensors do not fit."""
    missing = [name for name in ("prior.mean", "prior.logvar") if name not in tensors]
    if missing or not part(tensors, "gate.") or not part(tensors, "logvar."):
        raise MethodError("the checkpoint of a bottleneck holds prior.mean, prior.logvar, gate.* and logvar.*")
    prior = tensors["prior.mean"]
    gate = mlp("the bottleneck", part(tensors, "gate."), states).sigmoid()
    logvar = mlp("the bottleneck", part(tensors, "logvar."), states).clamp(-CLAMP, CLAMP)
    return prior + gate * (states.to(prior.dtype) - prior), logvar


def divergence(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """(...) divergence of N(mean, e^logvar) from the prior, in nats, averaged over the last dimension."""
    ratio = logvar - prior_logvar
    return 0.5 * (ratio.exp() + (mean - prior_mean).square() * (-prior_logvar).exp() - 1 - ratio).mean(-1)


def information(tensors: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """(...) what each state (..., d) says beyond the prior: `s` above."""
    return divergence(*posterior(tensors, states), tensors["prior.mean"], tensors["prior.logvar"])


def drawn(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Z = mu + sigma eps, for training."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (logvar / 2).exp() * noise


def beta(step: int, decline: float, first: float = 0.5, last: float = 0.2) -> float:
    """The weight of the divergence at a training step.

    Args:
        step: from 0.
        decline: steps over which it falls; the paper's is a fifth of all.
        first: the weight at step 0.
        last: the weight from step `decline` on.
    """
    return first - (first - last) * min(1.0, step / decline)
