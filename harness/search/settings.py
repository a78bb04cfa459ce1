"""Hyper-parameters of IF-Prune's training.

Published: LoRA of rank 32 and alpha 64, batches of 16 accumulated 11 times, learning rate 5e-5, AdamW with weight decay
.01, one epoch, beta from .5 to .2 over the first fifth of the steps. Not published, and decided here: a cosine schedule
with 3 % warm-up, the bottleneck in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pruneval.harness.errors import UserError


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters; defaults are the paper's Table T4 where it has them."""

    rank: int = 32
    alpha: int = 64
    batch_size: int = 16
    accumulate: int = 11
    epochs: float = 1.0
    rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.03
    beta_first: float = 0.5
    beta_last: float = 0.2
    beta_decline: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name in ("seed", "weight_decay", "warmup") else None
            if value < 0 or (least is None and value == 0):
                raise UserError(f"{item.name} must be above 0, not {value:g}")

    def steps(self, samples: int) -> int:
        """Optimiser steps over so many samples."""
        return max(1, round(self.epochs * samples / (self.batch_size * self.accumulate)))
