"""What really entered the vision tower, the projector and the decoder, as the lengths the ledger takes.

Hooks look at the shapes that pass, so whatever a method does to them is seen: nothing is declared here. One forward
of one sample at a time; padding, where there is any, counts as computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from pruneval.harness.adapters import Adapter
from pruneval.harness.attention import HeadAttention, Recorder
from pruneval.harness.dimensions import Dimensions
from pruneval.harness.flops import Lengths, Work
from pruneval.harness.layout import Trace
from pruneval.harness.override import override


class Observed:
    """Token counts of one forward.

    Attributes:
        vision: per tower layer, the sequences that attend within themselves: (how many, tokens of each).
        fed: per tower layer, the tokens that its feed-forward network got.
        projected: tokens that entered the projector, several cells being one token where it merges them.
        rows: multiply-adds of attention rows that a method read.
        peeked: tokens whose queries, keys and values were computed ahead of their layer.
    """

    def __init__(self, dimensions: Dimensions) -> None:
        self.dimensions = dimensions
        self.vision: list[list[tuple[int, int]]] = [[] for _ in range(dimensions.vision.layers)]
        self.fed = [0] * dimensions.vision.layers
        self.projected = self.rows = self.peeked = 0

    @property
    def patches(self) -> int:
        """Patches that were embedded."""
        return sum(many * (size - self.dimensions.vision.class_tokens) for many, size in self.vision[0])

    def lengths(self, trace: Trace, new_tokens: int = 1) -> Lengths:
        """The lengths of the forward's only sample, with what its trace says of the decoder.

        Raises: ValueError for a batch.
        """
        if trace.batch != 1:
            raise ValueError(f"lengths are observed one sample at a time, not {trace.batch}")
        budget, decoder = trace.budget(0), self.dimensions.decoder
        ahead = self.peeked * decoder.hidden * (decoder.width + 2 * decoder.kv_width)
        scores = Work("attention rows", self.rows), Work("projections ahead of their layer", ahead)
        return Lengths(
            patches=self.patches,
            vision=tuple(tuple(layer) for layer in self.vision),
            fed=tuple(self.fed),
            projector=self.projected,
            given=budget.visual,
            visual=tuple(budget.per_layer),
            text=len(trace.prompt.samples[0]) - budget.visual,
            new_tokens=new_tokens,
            scoring=tuple(work for work in scores if work.macs),
        )


@contextmanager
def observing(adapter: Adapter, dimensions: Dimensions) -> Iterator[Observed]:
    """Watches the next forward of the adapter's model; enter it inside `pruned`, so that its reductions are seen."""
    seen = Observed(dimensions)
    rows, peek, project = HeadAttention.rows, Recorder.peek, adapter.projector.forward

    def counted_rows(attention: HeadAttention, index: Any) -> Tensor:
        found = rows(attention, index)
        seen.rows += found.numel() * attention.query.shape[-1]
        return found

    def counted_peek(recorder: Recorder, key: Any, module: nn.Module, **kwargs: Any) -> Any:
        seen.peeked += kwargs["hidden_states"].shape[:-1].numel()
        return peek(recorder, key, module, **kwargs)

    def counted_projection(features: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.projected += features.numel() // dimensions.projector.inputs
        return project(features, *args, **kwargs)

    with ExitStack() as stack:
        for layers in adapter.towers:
            for index, layer in enumerate(layers):
                enter = functools.partial(_entered, seen.vision[index])
                stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(layer.mlp.register_forward_pre_hook(functools.partial(_fed, seen.fed, index)).remove)
        override(HeadAttention, "rows", counted_rows, stack)
        override(Recorder, "peek", counted_peek, stack)
        override(adapter.projector, "forward", counted_projection, stack)
        yield seen


def _entered(found: list[tuple[int, int]], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    ends = kwargs.get("cu_seqlens")
    if ends is None:
        found.append((hidden.shape[0], hidden.shape[1]))
    else:
        found += [(1, size) for size in ends.diff().tolist()]


def _fed(found: list[int], index: int, module: nn.Module, args: tuple) -> None:
    found[index] += args[0].shape[:-1].numel()
