"""The dimensions of a multimodal model: everything its cost follows from, and nothing else.

`load(name)` reads the shipped facts (`dimensions.yaml`), `harness.dimensions_config.dimensions_of(config)` reads the
same from a transformers config. No torch, no weights, no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pruneval.harness.errors import unknown

FACTS = Path(__file__).with_name("dimensions.yaml")


@dataclass(frozen=True)
class Vision:
    """A vision transformer that sees tiles (or frames) of `patches` patches each."""

    layers: int
    """Layers that run, the ones after the feature layer included: stock models run them too."""
    hidden: int
    heads: int
    head_dim: int
    mlp: int
    patch_values: int
    """Numbers in one patch: channels x frames x height x width."""
    patches: int
    """Patches of one tile; 0 where the image decides."""
    class_tokens: int = 0
    gated: bool = False
    """Three matrices in the feed-forward network instead of two."""
    norm: str = "layer"
    """`layer` (weight and bias) or `rms` (weight)."""
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = False
    positions: int = 0
    """Rows of a learned position table."""
    pre_norm: bool = False
    final_norm: bool = False
    window: int = 0
    """Side of an attention window in patches; 0: every layer attends to the whole tile."""
    full_layers: tuple[int, ...] = ()
    """With windows: the layers that attend to the whole image."""

    @property
    def width(self) -> int:
        """Width of queries, keys and values."""
        return self.heads * self.head_dim

    @property
    def projections(self) -> int:
        """Multiply-adds of queries, keys, values and the attention's output, per token and layer."""
        return 4 * self.hidden * self.width

    @property
    def feed(self) -> int:
        """Multiply-adds of the feed-forward network, per token and layer."""
        return (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def linear(self) -> int:
        """Multiply-adds (and weights without biases) of one layer's matrices per token."""
        return self.projections + self.feed

    @property
    def params(self) -> int:
        """Parameters, biases and norms included."""
        norm = self.hidden * (2 if self.norm == "layer" else 1)
        biases = (
            self.hidden + self.hidden + self.mlp * (2 if self.gated else 1) + (3 * self.width if self.qkv_bias else 0)
        )
        extras = 2 * norm + (2 * self.hidden if self.layer_scale else 0) + (2 * self.width if self.qk_norm else 0)
        outside = self.patch_values * self.hidden + (self.hidden if self.patch_bias else 0)
        outside += (self.positions + self.class_tokens) * self.hidden + norm * (self.pre_norm + self.final_norm)
        return self.layers * (self.linear + biases + extras) + outside


@dataclass(frozen=True)
class Projector:
    """Two linear layers with biases from the tower to the language model."""

    inputs: int
    middle: int
    outputs: int
    norm: int = 0
    """Weights (and biases) of the norms in front."""
    merge: int = 1
    """Vision patches that become one token."""
    copies: int = 1
    """How many of them every token goes through: one behind the tower, others behind layers inside it."""

    @property
    def linear(self) -> int:
        """Multiply-adds per token that enters one of them."""
        return self.inputs * self.middle + self.middle * self.outputs

    @property
    def params(self) -> int:
        """Parameters of all of them, biases and norms included."""
        return self.copies * (self.linear + self.middle + self.outputs) + self.norm


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model with grouped-query attention and a gated feed-forward network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    qkv_bias: bool = False
    qk_norm: bool = False
    """Norms of a head's width on queries and keys."""
    tied: bool = False

    @property
    def width(self) -> int:
        """Width of the queries: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys (and of the values) as they are stored: kv_heads x head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> int:
        """Multiply-adds (and weights without biases) of one layer's matrices per token."""
        return 2 * self.hidden * (self.width + self.kv_width) + 3 * self.hidden * self.mlp

    @property
    def params(self) -> int:
        """Parameters with embedding and head; a tied head counts once."""
        bias = (self.width + 2 * self.kv_width if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        table = self.vocab * self.hidden
        return self.layers * (self.linear + bias + 2 * self.hidden) + self.hidden + table * (1 if self.tied else 2)


@dataclass(frozen=True)
class TextTower:
    """The text encoder of the CLIP that a vision tower comes from, and the projections to the space of both."""

    layers: int
    hidden: int
    mlp: int
    length: int
    """Tokens it reads, padding included."""
    projection: int
    """Width of the common space."""

    @property
    def question(self) -> int:
        """Multiply-adds of embedding one question of at most `length` tokens."""
        linear = 4 * self.hidden**2 + 2 * self.hidden * self.mlp
        return self.layers * self.length * (linear + 2 * self.length * self.hidden) + self.hidden * self.projection

    def cells(self, count: int, width: int) -> int:
        """Multiply-adds of taking `count` cells of the vision tower's width to the common space and comparing each
        with the question.
        """
        return count * (width + 1) * self.projection


@dataclass(frozen=True)
class Input:
    """The lengths one model is usually priced for, and how a picture becomes tokens."""

    tiles: int = 0
    frames: int = 0
    grid: tuple[int, int, int] | None = None
    """Temporal slices, rows and columns of patches, where the image decides."""
    visual: int | None = None
    """Visual tokens, where they do not follow from tiles, frames or grid."""
    text: int = 75
    source: str = ""


@dataclass(frozen=True)
class Dimensions:
    """One multimodal model."""

    name: str
    vision: Vision
    projector: Projector
    decoder: Decoder
    family: str = ""
    towers: int = 1
    newline: bool = False
    """A learned newline vector of the decoder's width."""
    tile: tuple[int, int] | None = None
    """Per tile: visual tokens at the LLM input, tokens that enter the projector."""
    frame: tuple[int, int] | None = None
    """The same per frame of a video."""
    frame_extra: int = 0
    """Tokens a video adds once."""
    text_tower: TextTower | None = None
    """What the model has not kept of its CLIP, for methods that read the question with it; None where unknown."""
    input: Input = Input()
    published_params: tuple[str, ...] = ("vision", "projector", "decoder")
    """The parts that the published parameter count covers."""

    @property
    def params(self) -> dict[str, int]:
        """Parameters by part."""
        return {
            "vision": self.towers * self.vision.params,
            "projector": self.projector.params + (self.decoder.hidden if self.newline else 0),
            "decoder": self.decoder.params,
        }


def names() -> list[str]:
    """The models whose dimensions are shipped."""
    return list(_facts()["models"])


@cache
def load(name: str) -> Dimensions:
    """The dimensions of one shipped model; `UserError` for any other name."""
    facts = _facts()
    if name not in facts["models"]:
        raise unknown("model", name, facts["models"])
    row: dict[str, Any] = dict(facts["models"][name])
    vision = dict(facts["vision"][row.pop("vision")])
    decoder = Decoder(**facts["decoder"][row.pop("decoder")])
    vision["full_layers"] = tuple(vision.get("full_layers", ()))
    projector = row.pop("projector")
    merge = projector["in"] // vision["hidden"]
    given = dict(row.pop("input"))
    if "text_tower" in row:
        row["text_tower"] = TextTower(**facts["text_tower"][row["text_tower"]])
    if "grid" in given:
        given["grid"] = tuple(given["grid"])
    for key in ("tile", "frame", "published_params"):
        if key in row:
            row[key] = tuple(row[key])
    return Dimensions(
        name=name,
        vision=Vision(**vision),
        projector=Projector(projector["in"], projector["middle"], decoder.hidden, projector.get("norm", 0), merge),
        decoder=decoder,
        input=Input(**given),
        **row,
    )


@cache
def _facts() -> dict[str, Any]:
    return yaml.safe_load(FACTS.read_text(encoding="utf-8"))
