"""Optimisers and small helpers that both training stages share.

``Muon`` here is the float32 form of the optimiser (momentum, then an orthogonalised update by five Newton-Schulz
steps): the one in torch computes in bfloat16, which is very slow on most CPUs. Matrices of equal shape are
orthogonalised together in one batch.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the hidden weight matrices (2-D parameters only)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 2e-3, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for (rows, cols), params in shapes.items():
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]))
                scale = 0.2 * math.sqrt(max(rows, cols))
                for p, u in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u, alpha=-group["lr"] * scale)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate orthogonal factor of each matrix of a batch (n, rows, cols), by Newton-Schulz iteration."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x


class Optimisers:
    """Muon for the matrices inside ``hidden`` and AdamW for all other parameters, under one schedule.

    The rate rises linearly over ``warmup`` steps, stays, and falls linearly to 2 % of itself over the last
    ``cooldown`` part of the steps.
    """

    def __init__(
        self,
        module: nn.Module,
        hidden: str,
        steps: int,
        muon: float,
        adam: float,
        warmup: int = 40,
        cooldown: float = 0.5,
    ) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if hidden in n and p.ndim == 2]
        chosen = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in chosen]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, lr=adam, betas=(0.9, 0.95), weight_decay=0.01)
        ]
        if inner:
            self.all.append(Muon(inner, lr=muon))
        self.rates = [o.param_groups[0]["lr"] for o in self.all]
        self.params = outer + inner
        self.steps, self.warmup, self.cooldown = steps, warmup, cooldown

    def step(self, done: int) -> None:
        """Clip, update and clear the gradients; ``done`` steps came before this one."""
        left = (self.steps - done) / (self.cooldown * self.steps)
        factor = min(1.0, (done + 1) / self.warmup, max(0.02, left))
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimiser, rate in zip(self.all, self.rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [o.state_dict() for o in self.all]

    def load(self, states: list[dict[str, Any]]) -> None:
        for optimiser, state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)


def ahead(make: Callable[[int], Any], first: int, last: int, depth: int = 3) -> Iterator[Any]:
    """Yield ``make(step)`` for the steps in order, prepared by one thread a few steps ahead."""
    ready: queue.Queue[Any] = queue.Queue(depth)

    def work() -> None:
        for step in range(first, last):
            ready.put(make(step))

    threading.Thread(target=work, daemon=True).start()
    for _ in range(first, last):
        yield ready.get()


def save(path: Path, **parts: Any) -> None:
    """Write a checkpoint in one move, so that an interrupted run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    torch.save(parts, draft)
    draft.replace(path)
