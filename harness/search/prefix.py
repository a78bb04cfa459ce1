"""What many evaluations of one prompt have in common is computed once: the image's features, and the lower layers.

A search over what happens from decoder layer `depth` on runs the same prompts again and again. Within `shared(...)`
image features are reused, and the first run of a batch keeps the stream that leaves layer `depth - 1`, what the layers
below put into the cache, and what the method did there; later runs of the batch start from these. The engine itself
notices nothing: layers are entered, streams gathered and caches checked as ever.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor

from pruneval.harness.adapters import Adapter
from pruneval.harness.override import override
from pruneval.harness.reuse import reusing
from pruneval.methods.base import Method, Needs, Reduction, Shape, Step


class Shared:
    """What has been kept, by batch."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.depth = 0
        self.streams: dict[Any, Tensor] = {}
        self.caches: dict[Any, tuple[Tensor, Tensor]] = {}
        self.reductions: dict[Any, list[Reduction | None]] = {}

    def deeper(self, depth: int) -> None:
        """From here on everything below decoder layer `depth` is the same in every run; what was kept of it goes."""
        self.depth = depth
        self.streams.clear()
        self.caches.clear()
        self.reductions.clear()

    def start(self, batch: Any, method: Method) -> Method:
        """Names the batch that is about to run, by anything hashable; the method to run it with."""
        self.batch = batch
        return cast(Method, Replay(method, self)) if self.depth else method


@contextmanager
def shared(adapter: Adapter) -> Iterator[Shared]:
    """Shares image features and lower layers between the runs of a batch: `.start` before each, `.deeper` at will.

    Features are not shared where the method reads what happens inside the vision tower.
    """
    kept = Shared()
    with ExitStack() as stack:
        stack.enter_context(reusing(adapter))
        for index, layer in enumerate(adapter.decoder_layers):
            override(layer, "forward", functools.partial(_layer, kept, index, layer.forward), stack)
        yield kept


def _layer(kept: Shared, index: int, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    cache = kwargs.get("past_key_values")
    if index >= kept.depth or cache is None or cache.get_seq_length(index):
        return forward(hidden, *args, **kwargs)
    key = (kept.batch, index)
    if key in kept.caches:
        cache.update(*kept.caches[key], index)
        return kept.streams.get(kept.batch, hidden) if index == kept.depth - 1 else hidden
    out = forward(hidden, *args, **kwargs)
    kept.caches[key] = (cache.layers[index].keys, cache.layers[index].values)
    if index == kept.depth - 1:
        kept.streams[kept.batch] = out
    return out


class Replay:
    """A method whose reductions below a depth are remembered from the first run of a batch, and repeated in others."""

    def __init__(self, method: Method, kept: Shared) -> None:
        self._method, self._kept, self._turn = method, kept, Counter[int]()
        self._known = any(batch == kept.batch for batch, _ in kept.reductions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        """The method's, without what it does not have to see again."""
        needs = self._method.needs(shape)
        return {layer: Needs() if self._known and layer < self._kept.depth else need for layer, need in needs.items()}

    def reduce(self, step: Step) -> Reduction | None:
        """The method's answer, or what it was before."""
        if step.layer >= self._kept.depth:
            return self._method.reduce(step)
        past = self._kept.reductions.setdefault((self._kept.batch, step.layer), [])
        if not self._known:
            past.append(self._method.reduce(step))
            return past[-1]
        self._turn[step.layer] += 1  # samples come in order
        return past[self._turn[step.layer] - 1]
