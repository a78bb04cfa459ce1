"""The batched stream between two decoder layers: padded tensors for one layout, and the masks and rotations layers get
for it.

Streams are left-padded, so the last token is last in every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from pruneval.harness.errors import UserError
from pruneval.harness.layout import Layout, Tokens

Rotation = tuple[Tensor, Tensor]


class Stream:
    """A reduced stream: what layers from `layout.boundary` on see instead of what the model passes them.

    Attributes:
        layout: the tokens.
        shift: (B,) how much lower the positions of decoded tokens are than the model counts them; None when they are
            not.
    """

    def __init__(self, layout: Layout, kernel: str, rotary: Any, last_position: Tensor, device: torch.device) -> None:
        """
        Args:
            layout: the tokens of the stream.
            kernel: attention implementation, which decides what a mask looks like.
            rotary: the rotary module's forward.
            last_position: (B,) position of the last prompt token as the model counts.
            device: where masks go.
        """
        self.layout = layout
        self.kernel = kernel
        self.rotary = rotary
        self.real = layout.real(device)
        self.padded = not bool(self.real.all())
        self.position = _pad([tokens.position for tokens in layout.samples], layout.width)
        shift = last_position - torch.stack([tokens.position[..., -1].max() for tokens in layout.samples])
        self.shift = shift if bool(shift.any()) else None
        self.bias = _bias(layout, device)
        if self.bias is not None and kernel not in ("sdpa", "eager"):
            raise UserError(f"tokens with weights need an additive mask, which {kernel} has not: use sdpa or eager")
        self._masks: dict[tuple[int, int], Any] = {}
        self._decode: tuple[Any, Any] = (None, None)  # a step's position, and the rotation there
        self._rotation: Rotation | None = None

    def mask(self, queries: int, keys: int, dtype: torch.dtype, attended: Tensor | None = None) -> Any:
        """The layer's attention mask for `queries` new tokens and `keys` cached and new ones, in the kernel's
        form (None where it can be). `attended` (B, width) says which of the stream's tokens are attended to at all.
        """
        if attended is not None:
            return self._build_mask(queries, keys, dtype, attended)
        if (queries, keys) not in self._masks:  # the layers of a stage share it
            self._masks = {(queries, keys): self._build_mask(queries, keys, dtype)}
        return self._masks[queries, keys]

    def _build_mask(self, queries: int, keys: int, dtype: torch.dtype, attended: Tensor | None = None) -> Any:
        real = None
        if self.padded or attended is not None:
            real = self.real if attended is None else self.real & attended
            real = torch.nn.functional.pad(real, (0, keys - real.shape[1]), value=True)
        mask = ALL_MASK_ATTENTION_FUNCTIONS[self.kernel if self.bias is None else "eager"](
            batch_size=len(self.layout.samples),
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=real,
            dtype=dtype,
            device=self.real.device,
        )
        if self.bias is None:
            return mask
        return mask + torch.nn.functional.pad(self.bias, (0, keys - self.bias.shape[1])).to(dtype)[:, None, None]

    def rotation(self, hidden: Tensor) -> Rotation:
        """(cos, sin) of the stream at prefill."""
        if self._rotation is None:
            self._rotation = self.rotary(hidden, self.position)
        return self._rotation

    def decode_rotation(self, hidden: Tensor, position: Tensor) -> Rotation:
        """(cos, sin) of new tokens that the model would put at `position` (..., B, q); computed once per step."""
        if self._decode[0] is not position:
            shift = 0 if self.shift is None else self.shift[:, None]
            self._decode = (position, self.rotary(hidden, position - shift))
        return self._decode[1]

    def gather(self, hidden: Tensor, keep: list[Tensor], starts: list[int]) -> Tensor:
        """The rows of `hidden` (B, S, d) that `keep` names, left-padded with zeros.

        Args:
            hidden: the stream before.
            keep: stream indices of each sample.
            starts: padding of each sample in `hidden`.
        """
        if not self.padded:
            index = torch.stack([kept + start for kept, start in zip(keep, starts, strict=True)])
            return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        out = hidden.new_zeros(hidden.shape[0], self.layout.width, hidden.shape[-1])
        for row, (kept, start) in enumerate(zip(keep, starts, strict=True)):
            out[row, self.layout.width - len(kept) :] = hidden[row, kept + start]
        return out


def starts(layout: Layout, width: int) -> list[int]:
    """Padding of each sample in a stream of this width."""
    return [width - len(tokens) for tokens in layout.samples]


def prompt_layout(visual: Tensor, real: Tensor, position: Tensor) -> Layout:
    """The un-pruned prompt.

    Args:
        visual: (B, S) which tokens are visual.
        real: (B, S) which are not padding (left-padded).
        position: (..., B, S) position ids.
    """
    samples = []
    for row in range(visual.shape[0]):
        mine = real[row]
        origin = torch.arange(int(mine.sum()), device=visual.device)
        flags = visual[row][mine]
        samples.append(Tokens(origin, flags, torch.zeros_like(flags), position[..., row, :][..., mine]))
    return Layout(0, tuple(samples))


def _bias(layout: Layout, device: torch.device) -> Tensor | None:
    """(B, width) logarithm of what each token counts as, or None when all count as one."""
    if all(tokens.weight is None for tokens in layout.samples):
        return None
    out = torch.zeros(len(layout.samples), layout.width, device=device)
    for row, tokens in zip(out, layout.samples, strict=True):
        if tokens.weight is not None:
            row[len(row) - len(tokens) :] = tokens.weight.to(out).log()
    return out


def _pad(parts: list[Tensor], width: int) -> Tensor:
    """Per-sample (..., n) ids as (..., B, width), left-padded with 0."""
    return torch.stack([torch.nn.functional.pad(part, (width - part.shape[-1], 0)) for part in parts], dim=-2)
