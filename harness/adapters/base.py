"""What the engine has to know about a model family.

That is where things are, and how the vision tower's view maps to the prompt's visual tokens.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pruneval.harness.clip import TextTower
from pruneval.harness.errors import UserError
from pruneval.harness.helper import reason as helper_reason
from pruneval.harness.layout import Layout
from pruneval.methods.base import Method, MethodError, Shape
from pruneval.methods.views import Passed


@dataclass(frozen=True)
class Encoding:
    """One run of a vision tower, as the session saw it.

    Attributes:
        kind: "image" or "video", which says whose placeholders the features fill.
        arguments: what the inner model's encoding function was called with, by parameter name.
        lengths: features of each item (image, video or frame, as the family counts), in the order in which they fill
            placeholders.
        calls: recorded attention calls (`pruneval.harness.attention.Call`), by encoder layer.
        hidden: outputs of the encoder layers asked for, by layer.
        passed: what came through the tower, one per tile, if a method works inside it.
        pixels: (tiles, 3, height, width) in [0, 1], if asked for.
    """

    kind: str
    arguments: Mapping[str, Any]
    lengths: tuple[int, ...]
    calls: Mapping[int, list[Any]]
    hidden: Mapping[int, Tensor]
    passed: tuple[Passed, ...] = ()
    pixels: Tensor | None = None


def pixels(where: list[tuple[Encoding, int]]) -> list[Tensor]:
    """The pixels of these tiles."""
    return [encoding.pixels[row] for encoding, row in where if encoding.pixels is not None]


def passed(where: list[tuple[Encoding, int]]) -> list[Passed] | None:
    """What came through the tower of these tiles (run and place in it); None when all of them are whole."""
    parts = [encoding.passed[row] for encoding, row in where if encoding.passed]
    return None if all(len(part.cells) == part.total for part in parts) else parts


class Adapter(ABC):
    """One model family, by its stock transformers class.

    A subclass names modules and token ids and holds no state but the model.

    The defaults fit transformers' composition `model.model.{vision_tower, multi_modal_projector, language_model}`.
    `whole_items` says whether `Encoding.lengths` counts whole images and videos, whose placeholders may stand side by
    side. `merge` is the number of the tower's cells that become one token. `clip` is the CLIP model that the tower
    comes from, as it was given; see `text_tower`. `helper` is the adapter of a second model, for methods that have one.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    has_cls: ClassVar[bool] = False
    tiled: ClassVar[bool] = False
    sheets: ClassVar[bool] = False
    whole_items: ClassVar[bool] = False
    merge: int = 1

    def __init__(
        self, model: nn.Module, processor: Any = None, text_tower: TextTower | str | Path | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = model.config
        self.clip = text_tower
        self.helper: Adapter | None = None

    def helped(self, helper: Adapter) -> Adapter:
        """This adapter with a helper model at its side."""
        other = copy.copy(self)
        other.helper = helper
        return other

    # The language model

    @property
    def text_model(self) -> nn.Module:
        """The decoder stack, called with `inputs_embeds`."""
        return self.model.model.language_model

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(self.text_model.layers)

    @property
    def rotary(self) -> nn.Module:
        """The rotary embedding: (hidden states, position ids) -> (cos, sin)."""
        return self.text_model.rotary_emb

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last decoder layer."""
        return self.text_model.norm

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.decoder_layers[layer].self_attn

    def attention_norm(self, layer: int) -> nn.Module:
        """The norm before the attention of a decoder layer."""
        return self.decoder_layers[layer].input_layernorm

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """(B, S) which tokens of a prompt are placeholders of visual features."""
        return input_ids == self.config.image_token_id

    def attach(  # noqa: B027  most families have nothing to fit
        self, layouts: Callable[[], tuple[Layout, Layout] | None], stack: ExitStack
    ) -> None:
        """Fits to a reduced stream what a family's text model does between its layers; most do nothing there.

        Args:
            layouts: the layouts of the prompt and of the stream as it is, or None while nothing has been reduced.
            stack: undoes at the end of the `pruned` block what is changed here.
        """

    # The vision side

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.model.vision_tower

    @property
    @abstractmethod
    def vision_layers(self) -> list[nn.Module]:
        """The encoder's layers, in order."""

    @property
    def tower_modules(self) -> list[nn.Module]:
        """Each tower, called with pixels."""
        return [self.vision_tower]

    @property
    def patching(self) -> tuple[int, int, int] | None:
        """Of a tower that takes patches of images of any size: cells along a token's side, frames and pixels along the
        side of a patch; None for towers that take tiles of one size.
        """
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a tile's cells, where all tiles have the same."""
        raise NotImplementedError

    def token_grid(self, kind: str) -> tuple[int, int]:
        """(rows, columns) of visual tokens that a tile becomes, where tiles have one size."""
        side = math.isqrt(self.merge)
        return self.grid[0] // side, self.grid[1] // side

    @property
    def towers(self) -> list[list[nn.Module]]:
        """The layers of each tower; a family with one tower per kind of input has several, of equal depth."""
        return [self.vision_layers]

    def vision_attention(self, layer: int, tower: int = 0) -> nn.Module:
        """The attention module of an encoder layer."""
        return self.towers[tower][layer].self_attn

    @property
    def feature_layer(self) -> int:
        """The encoder layer (0-based) whose output is projected; `hidden_states[0]` is the input of layer 0."""
        index = self.config.vision_feature_layer
        return index - 1 if index >= 0 else len(self.vision_layers) + index

    def project(self, hidden: Tensor) -> Tensor:
        """(m, d_v) tower outputs as (m, d) language-model inputs."""
        return self.model.model.multi_modal_projector(hidden)

    # Inside the vision tower: see `pruneval.harness.tower`

    @property
    def projector(self) -> nn.Module:
        """What `project` is: takes tower outputs, gives language-model inputs."""
        return self.model.model.multi_modal_projector

    def projects_cells(self, kind: str) -> bool:
        """Whether the model projects the cells of images or videos one by one, before it pools or merges any."""
        return self.merge == 1

    def attend(self, layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The first half of a tower's layer: attention and what it is added to, (T, t, d_v)."""
        return hidden + layer.self_attn(layer.layer_norm1(hidden), attention_mask=mask)[0]

    def feed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The second half."""
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    def cell_blocks(self, cells: int) -> Tensor:
        """(P,) which of a tile's tokens each of its cells becomes part of."""
        return torch.arange(cells)

    def tile_tokens(self, kind: str, cells: int) -> int:
        """Visual tokens a tile of an un-pruned image or video becomes, nominally: newlines and padding apart."""
        return cells // self.merge

    def packing(self, kind: str, arguments: Mapping[str, Any]) -> tuple[Tensor, list[int]] | None:
        """How the tower packs the tiles of a run into one row; None for towers that take a batch of equal tiles.

        Returns:
            (sum of P,) the processor's number of each cell in the tower's order, and where each tile starts, with the
            end of the last.
        """
        return None

    @property
    def eyes(self) -> list[nn.Module]:
        """The modules that are called with (tiles, 3, height, width) pixels; none where patches come packed."""
        return [self.vision_tower]

    def seen(self, values: Tensor) -> Tensor:
        """(tiles, 3, height, width) of a tower's input in [0, 1], without the processor's normalisation.

        Raises: UserError when the processor is not at hand.
        """
        processor = getattr(self.processor, "image_processor", None)
        if processor is None:
            raise UserError("reading pixels needs the model's processor: adapter_for(model, processor)")
        mean, std = (values.new_tensor(part)[:, None, None] for part in (processor.image_mean, processor.image_std))
        return (values * std + mean).clamp(0, 1)

    def encoder_reason(self) -> str:
        """Why tokens can't leave inside this model's tower; empty when they can."""
        return ""

    def text_reason(self) -> str:
        """Why patches can't be compared with the question in CLIP's space; empty when they can."""
        if self.config.vision_config.model_type != "clip_vision_model" or len(self.towers) > 1:
            return "it compares patches with the question in CLIP's space, and this model does not look through CLIP"
        if self.clip is None:
            return (
                "it needs the text encoder of the CLIP that the model's vision tower comes from, and this model has "
                "none: adapter_for(model, processor, text_tower=...)"
            )
        return ""

    def helper_reason(self) -> str:
        """Why there is no helper model for this one; empty when there is."""
        if self.helper is None:
            return (
                "it needs a helper model with the same visual tokens: parameter helper, or "
                "adapter_for(model, processor, helper=...)"
            )
        return helper_reason(self, self.helper)

    def text_tower(self) -> TextTower:
        """The rest of the model's CLIP, next to the model, in float32 or the model's higher precision.

        Raises: UserError when it can't be loaded or belongs to another vision tower.
        """
        if self.clip is None:
            raise UserError(self.text_reason())
        tower = self.clip = self.clip if isinstance(self.clip, TextTower) else TextTower.load(self.clip)
        width = self.config.vision_config.hidden_size
        if tower.width != width:
            raise UserError(
                f"the text tower belongs to a vision tower of width {tower.width}, this model's has {width}"
            )
        dtype = torch.promote_types(torch.float32, self.model.dtype)
        return tower.to(self.model.device, dtype)

    @abstractmethod
    def visions(self, placeholders: list[Tensor], encodings: list[Encoding]) -> list[Any]:
        """The vision tower's view of each sample.

        Args:
            placeholders: (N,) ids of the visual tokens of each sample, in prompt order.
            encodings: the runs of the vision tower for this batch; those of a kind fill its placeholders sample by
                sample.
        """

    def kind(self, placeholder: int) -> str:
        """What a placeholder stands for: "image" or "video"."""
        return "video" if placeholder == getattr(self.config, "video_token_id", None) else "image"

    def spans(
        self, runs: list[tuple[tuple[int, int], ...]], placeholders: list[Tensor], encodings: list[Encoding]
    ) -> list[tuple[tuple[int, int], ...]]:
        """Where the images and videos of each sample stand, as `Step.spans`.

        Args:
            runs: unbroken runs of visual tokens of each sample.
            placeholders, encodings: as in `visions`.
        """
        if not self.whole_items:
            return runs
        lengths = {
            kind: iter([length for encoding in encodings if encoding.kind == kind for length in encoding.lengths])
            for kind in ("image", "video")
        }
        spans = []
        for ids, mine in zip(placeholders, runs, strict=True):
            found, first, left = [], 0, 0
            for start, stop in mine:
                while start < stop:
                    left = left or next(lengths[self.kind(int(ids[first]))])
                    size = min(left, stop - start)
                    found.append((start, start + size))
                    start, first, left = start + size, first + size, left - size
            spans.append(tuple(found))
        return spans

    def placed(self, view: Any, spans: tuple[tuple[int, int], ...]) -> Any:
        """The view of one sample, now that it is known where its visual tokens stand (as `Step.spans`)."""
        return view

    # What fits together

    @property
    def shape(self) -> Shape:
        """The sizes methods may depend on."""
        text = self.model.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return Shape(
            layers=len(self.decoder_layers),
            hidden=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vision_layers=len(self.vision_layers),
            feature_layer=self.feature_layer,
            has_cls=self.has_cls,
            tiled=self.tiled,
            sheets=self.sheets,
            merge=self.merge,
        )

    def supports(self, method: Method) -> str | None:
        """None, or the reason why the method can't run on this model."""
        try:
            method.ready()
            needs = method.needs(self.shape)
            places = method.encoding(self.shape)
        except MethodError as error:
            return str(error)
        reason = self.encoder_reason() if places else ""
        if not self.eyes and any(need.pixels for need in method.needs(self.shape).values()):
            reason = "this model's tower takes patches of any grid, not tiles whose pixels could be read"
        if not reason and any(need.clip for need in needs.values()):
            reason = self.text_reason()
        if not reason and any(need.helper for need in needs.values()):
            reason = self.helper_reason()
        return f"{method.card.name}: {reason}" if reason else None
