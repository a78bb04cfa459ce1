"""Which questions are asked together: equal options, equally many images, prompts of nearly one length.

The answers do not depend on it. Prompts are measured in tokens, a window of several batches at a time, so that the
images of a whole benchmark are never in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pruneval.harness.errors import UserError

if TYPE_CHECKING:
    import torch

AUTO: Literal["auto"] = "auto"
BatchSize = int | Literal["auto"]
WINDOW = 4
"""Batches among whose questions those of like length are sought."""
CPU_TOKENS = 2048
"""Prompt tokens in a batch on a CPU: beyond that, batches of the pocket models got slower per question, not faster."""
LARGEST = 64
"""Questions in an automatic batch."""
SHARE = 0.8
"""Of the free memory of a GPU, what a batch may be expected to fill."""


def size_of(text: str | int) -> BatchSize:
    """A batch size: "auto", or a whole number of at least 1. Raises: UserError."""
    if text == AUTO:
        return AUTO
    try:
        size = int(text)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise UserError(f"the batch size must be auto or a whole number of at least 1, not {text!r}")
    return size


def windows(requests: Sequence[Any], size: BatchSize) -> Iterator[list[Any]]:
    """Requests with equal options and texts of like length, the longest first (so that memory runs out early if at
    all), as many as a few batches take.
    """
    length = WINDOW * (LARGEST // 4 if size == AUTO else size)
    groups: dict[str, list[Any]] = {}
    for request in requests:
        groups.setdefault(json.dumps(request.options, sort_keys=True, default=str), []).append(request)
    for group in groups.values():
        group.sort(key=lambda request: (-len(request.context), request.doc_id))
        for start in range(0, len(group), length):
            yield group[start : start + length]


def batches(
    window: Sequence[Any], measure: Callable[[Any], tuple[int, int]], size: Callable[[int], int]
) -> Iterator[list[Any]]:
    """The requests of a window, as batches of equally many images and like length, the longest first.

    Args:
        measure: (images and videos, tokens) of a request.
        size: of a batch, given the tokens of its longest prompt; asked again before every batch.
    """
    measured = {id(request): measure(request) for request in window}
    left = sorted(window, key=lambda request: [-one for one in measured[id(request)]] + [request.doc_id])
    while left:
        shown, longest = measured[id(left[0])]
        alike = [request for request in left[: size(longest)] if measured[id(request)][0] == shown]
        yield alike
        left = left[len(alike) :]


class Automatic:
    """Finds the size of batches: on a CPU by tokens, on a GPU by what the first, longest question took.

    Attributes:
        largest: the largest size it has named so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.largest = device, 1
        self._each: float | None = None
        self._before = 0

    def size(self, tokens: int) -> int:
        """Questions of so many tokens that fit into a batch; 1 on a GPU until one was measured."""
        import torch

        if self.device.type != "cuda":
            found = CPU_TOKENS // max(1, tokens)
        elif self._each is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            found = 1
        else:
            found = int(SHARE * self._free() / max(1.0, self._each * tokens))
        found = min(LARGEST, max(1, found))
        self.largest = max(self.largest, found)
        return found

    def saw(self, tokens: int) -> None:
        """Takes in what the first batch, of one question of so many tokens, needed."""
        import torch

        if self.device.type == "cuda" and self._each is None:
            taken = torch.cuda.max_memory_allocated(self.device) - self._before
            self._each = taken / max(1, tokens)

    def _free(self) -> int:
        import torch

        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused
