"""A sentencepiece byte-pair model (tokenizer.model) as a fast tokenizer.

The file is a protocol buffer of few fields; reading them here spares the packages that read it, whose versions clash.
Field numbers: google/sentencepiece, `sentencepiece_model.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges

from pruneval.harness.errors import UserError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces
BYTE_PAIRS = 2  # model type


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        pieces: (piece, kind) by id.
        unknown: id of the unknown piece.
        byte_fallback: whether unknown characters become bytes.
        charsmap: compiled normalization rules, or empty.
        dummy_prefix: whether a space is put before the text.
        squeeze: whether extra whitespace is removed.
    """

    pieces: tuple[tuple[str, int], ...]
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool


def read_model(path: Path) -> SentencePieceModel:
    """Reads a tokenizer.model. Raises: UserError when it is none, or no byte-pair model."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer = {key: item for number, value in fields if number == 2 for key, item in _fields(value)}
        rules = {key: item for number, value in fields if number == 3 for key, item in _fields(value)}
        named = tuple((piece[1].decode(), piece.get(3, NORMAL)) for piece in pieces)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no sentencepiece model") from error
    if trainer.get(3, 1) != BYTE_PAIRS:
        raise UserError(f"{path} is no byte-pair model; only those are supported")
    return SentencePieceModel(
        pieces=named,
        unknown=trainer.get(40, 0),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=rules.get(2, b""),
        dummy_prefix=bool(rules.get(3, 1)),
        squeeze=bool(rules.get(4, 1)),
    )


def fast_tokenizer(model: SentencePieceModel, added: Mapping[int, AddedToken], legacy: bool) -> Tokenizer:
    """The model with tokens added to it.

    Args:
        model: what `read_model` returned.
        added: tokens by id; where the id belongs to a piece, the token takes the piece's place.
        legacy: whether a dummy prefix goes before every stretch of text between added tokens, or only before a text
            that begins with neither an added token nor a space.
    """
    base = {index: (piece, kind) for index, (piece, kind) in enumerate(model.pieces) if index not in added}
    vocabulary = {piece: index for index, (piece, _) in base.items()}
    vocabulary |= {token.content: index for index, token in added.items()}
    merges = generate_merges({piece: index for index, (piece, kind) in base.items() if kind == NORMAL})
    unknown = model.pieces[model.unknown][0]
    pairs = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(pairs)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix and legacy:
        steps.append(normalizers.Prepend("▁"))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "first" if model.dummy_prefix and not legacy else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(back)
    own = [(piece, kind) for piece, kind in base.values() if kind in (CONTROL, USER_DEFINED)]
    tokens = [AddedToken(piece, normalized=False, special=kind == CONTROL) for piece, kind in own]
    for token in [*tokens, *(added[index] for index in sorted(added))]:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: bytes for strings and messages, numbers for varints, else None."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        value: int | bytes | None
        if kind == 0:
            value, place = _varint(data, place)
        elif kind == 2:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("cut short")
            value, place = data[place : place + length], place + length
        elif kind in (1, 5):
            value, place = None, place + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"no such wire type: {kind}")
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
