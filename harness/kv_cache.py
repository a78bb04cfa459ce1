"""Bytes of the key-value cache, from lengths and read off the tensors.

Layer l stores a key and a value for every token that entered layer l, and nothing gives them back unless a method
evicts tokens while the answer is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pruneval.harness.dimensions import Decoder


def kv_ratio(per_layer: Sequence[int | float], visual: float) -> float:
    """G-Search's "memory cost": mean over layers of kept / all visual tokens, the text left out.

    Args:
        per_layer: visual tokens that enter each layer.
        visual: visual tokens at the LLM input of the un-pruned model.
    """
    return sum(per_layer) / (len(per_layer) * visual) if visual else 1.0


def kv_bytes(decoder: Decoder, tokens: Sequence[int], bytes_per_value: int = 2) -> int:
    """What the cache really holds: 2 x bytes x kv_heads x head_dim x sum over layers of tokens.

    Args:
        decoder: the language model.
        tokens: all tokens, text included, that entered each layer.
        bytes_per_value: 2 for 16-bit numbers.
    """
    return 2 * bytes_per_value * decoder.kv_width * sum(tokens)


def kv_bytes_full_heads(decoder: Decoder, tokens: Sequence[int], bytes_per_value: int = 2) -> int:
    """The same if every query head had keys and values of its own.

    VFlowOpt's Table 1 is printed in this currency; with grouped-query attention it is heads / kv_heads times too much.
    """
    return 2 * bytes_per_value * decoder.width * sum(tokens)


def held(cache: Any) -> list[int]:
    """Bytes of the keys and values in each layer of a transformers cache, padding and generated tokens included."""
    return [sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) for layer in cache.layers]


def resident(cache: Any) -> list[int]:
    """Bytes that stay allocated for each layer: more than `held` where a tensor is a view of what it was cut from."""
    return [sum(part.untyped_storage().nbytes() for part in (layer.keys, layer.values)) for layer in cache.layers]
