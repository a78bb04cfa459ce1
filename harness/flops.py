"""The compute ledger: multiply-adds of one sample, part by part, from dimensions and lengths alone.

`ledger(dimensions, lengths)` is a pure function with exact integers. The lengths may be what a method declares or
what a trace has seen; the ledger cannot tell them apart. What a paper prints is a *convention* over the ledger: which
parts it adds up, by which factor, and what it leaves out (`harness/conventions.py`).

Counted are matrix products: one multiply-add per weight and token, two products of attention per pair of tokens.
Norms, softmax, activations, rotary embeddings and table look-ups are not (about 0.1 % of a 7B model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pruneval.harness.dimensions import Dimensions, Vision
from pruneval.harness.errors import UserError

Groups = tuple[tuple[int, int], ...]
"""Sequences that attend within themselves: (how many, tokens of each)."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds by something that is not the model: a helper model, a method's scores."""

    name: str
    macs: int


@dataclass(frozen=True)
class Lengths:
    """How many tokens go where, for one sample."""

    patches: int
    """Patches that are embedded."""
    vision: tuple[Groups, ...]
    """Tokens that enter each layer of the vision tower, grouped by what attends to what."""
    fed: tuple[int, ...] = field(default=(), kw_only=True)
    """Tokens that each layer's feed-forward network gets, where some leave behind the attention; all if not given."""
    projector: int
    """Tokens that enter the projector."""
    given: int
    """Visual tokens at the LLM input of the un-pruned model."""
    visual: tuple[int, ...]
    """Visual tokens that enter each decoder layer."""
    text: int
    """All other tokens; they enter every layer."""
    new_tokens: int = 1
    """Generated tokens. The first one comes out of the prefill."""
    helpers: tuple[Work, ...] = ()
    scoring: tuple[Work, ...] = ()
    cached: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True)
    """Visual tokens in each layer's cache after the prefill and after each decode step; `visual` if not given."""

    def stored(self, step: int) -> tuple[int, ...]:
        """All tokens in each layer's cache after a decode step; step 0 is the prefill."""
        return tuple(count + self.text + step for count in (self.cached[step] if self.cached else self.visual))

    @property
    def steps(self) -> int:
        """Decode steps: the first token comes out of the prefill."""
        return max(self.new_tokens - 1, 0)

    @property
    def llm(self) -> tuple[int, ...]:
        """Tokens that enter each decoder layer."""
        return tuple(visual + self.text for visual in self.visual)

    @property
    def avg_in(self) -> float:
        """Mean over decoder layers of visual tokens that enter the layer."""
        return sum(self.visual) / len(self.visual)


@dataclass(frozen=True)
class Ledger:
    """Multiply-adds by part. Of `_square` and `_causal`, of `_all` and `_last`, a sum takes one."""

    patch_embedding: int
    vision_linear: int
    vision_attention: int
    projector: int
    helpers: int
    scoring: int
    llm_linear: int
    llm_attention_square: int
    """Every query with every key, masked or not: what an eager kernel computes."""
    llm_attention_causal: int
    """Only the pairs the causal mask lets through: what a fused kernel computes."""
    head_all: int
    """The output layer on every token that is left."""
    head_last: int
    """The output layer on the last token."""
    decode_linear: int
    decode_attention: int
    decode_head: int

    def total(self, *parts: str) -> int:
        """The sum of the named parts."""
        return sum(getattr(self, part) for part in parts)

    def as_dict(self) -> dict[str, int]:
        """Every part with its multiply-adds."""
        return asdict(self)


def ledger(dimensions: Dimensions, lengths: Lengths) -> Ledger:
    """Count one sample.

    Args:
        dimensions: the model.
        lengths: tokens that enter each vision layer, the projector and each decoder layer, and the count of new ones.
    """
    vision, projector, decoder = dimensions.vision, dimensions.projector, dimensions.decoder
    if len(lengths.vision) != vision.layers or len(lengths.visual) != decoder.layers:
        raise ValueError(
            f"{dimensions.name} has {vision.layers} vision and {decoder.layers} decoder layers; "
            f"lengths are given for {len(lengths.vision)} and {len(lengths.visual)}"
        )
    tokens, seen = lengths.llm, [sum(k * n for k, n in groups) for groups in lengths.vision]
    head = decoder.hidden * decoder.vocab
    steps = lengths.steps
    # Step t (from 1) runs one query against what the caches hold before it, and itself.
    decode_keys = sum(sum(lengths.stored(step - 1)) + decoder.layers for step in range(1, steps + 1))
    return Ledger(
        patch_embedding=lengths.patches * vision.patch_values * vision.hidden,
        vision_linear=vision.projections * sum(seen) + vision.feed * sum(lengths.fed or seen),
        vision_attention=2 * vision.width * sum(k * n * n for groups in lengths.vision for k, n in groups),
        # copies stand behind layers inside the tower, which see all of it
        projector=projector.linear * (lengths.projector + (projector.copies - 1) * (seen[-1] // projector.merge)),
        helpers=sum(work.macs for work in lengths.helpers),
        scoring=sum(work.macs for work in lengths.scoring),
        llm_linear=decoder.linear * sum(tokens),
        llm_attention_square=2 * decoder.width * sum(n * n for n in tokens),
        llm_attention_causal=decoder.width * sum(n * (n + 1) for n in tokens),
        head_all=head * tokens[-1],
        head_last=head,
        decode_linear=decoder.linear * decoder.layers * steps,
        decode_attention=2 * decoder.width * decode_keys,
        decode_head=head * steps,
    )


def lengths_of(
    dimensions: Dimensions,
    per_layer: Sequence[int] | None = None,
    *,
    tiles: int | None = None,
    frames: int | None = None,
    grid: tuple[int, int, int] | None = None,
    visual: int | None = None,
    text: int | None = None,
    new_tokens: int = 1,
    projector: int | None = None,
    helpers: tuple[Work, ...] = (),
    scoring: tuple[Work, ...] = (),
) -> Lengths:
    """The lengths of one sample; what is not said is what the published costs of the model assume.

    Args:
        dimensions: the model.
        per_layer: visual tokens that enter each decoder layer; all of them in every layer if not given.
        tiles: tiles of an image; whole images for a model that does not cut them. Excludes `frames`.
        frames: frames of a video.
        grid: slices, rows and columns of patches, for a model that does not cut images.
        visual: visual tokens at the LLM input, if they do not follow from the above.
        text: tokens that are not visual.
        new_tokens: tokens to generate.
        projector: tokens that enter the projector, if a method reduces them before it.
        helpers: helper models' work.
        scoring: the method's own work.
    """
    usual = dimensions.input
    sizes = {"tiles": tiles, "frames": frames, "visual tokens": visual, "text tokens": text, "new tokens": new_tokens}
    for name, value in sizes.items():
        least = 0 if name in ("text tokens", "new tokens") else 1
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    if tiles is not None and frames is not None:
        raise UserError("an input has tiles or frames, not both")
    if dimensions.tile is None:
        patches, vision, projected, count = _by_grid(dimensions, tiles, frames, grid, visual)
    else:
        patches, vision, projected, count = _by_tile(dimensions, tiles, frames, visual)
    layers = tuple(per_layer) if per_layer is not None else (count,) * dimensions.decoder.layers
    return Lengths(
        patches=patches,
        vision=vision,
        projector=projected if projector is None else projector,
        given=count,
        visual=layers,
        text=usual.text if text is None else text,
        new_tokens=new_tokens,
        helpers=helpers,
        scoring=scoring,
    )


def _by_tile(
    dimensions: Dimensions, tiles: int | None, frames: int | None, visual: int | None
) -> tuple[int, tuple[Groups, ...], int, int]:
    """Patches, vision lengths, projector tokens and visual tokens of a picture cut into equal tiles or frames."""
    usual, tower, extra = dimensions.input, dimensions.vision, 0
    if tiles is None and frames is None:
        tiles, frames = usual.tiles or None, usual.frames or None
        visual = usual.visual if visual is None else visual
    if frames is not None:
        if dimensions.frame is None:
            raise UserError(f"{dimensions.name} takes no video; say --tiles")
        units, (shown, projected), extra = frames, dimensions.frame, dimensions.frame_extra
    else:
        units, (shown, projected) = tiles or 1, dimensions.tile or (0, 0)
    vision = (((units, tower.patches + tower.class_tokens),),) * tower.layers
    return units * tower.patches, vision, units * projected, units * shown + extra if visual is None else visual


def _by_grid(
    dimensions: Dimensions,
    tiles: int | None,
    frames: int | None,
    grid: tuple[int, int, int] | None,
    visual: int | None,
) -> tuple[int, tuple[Groups, ...], int, int]:
    """The same for a tower that takes an image at its own size, attending within windows in most layers.

    Images, and the slices of a video that two frames share, do not attend to each other in the tower.
    """
    tower, merge = dimensions.vision, dimensions.projector.merge
    side = int(merge**0.5)
    usual, rows, columns = grid or dimensions.input.grid or (1, side, side)
    slices = tiles or (frames and -(-frames // 2)) or usual
    if grid is None and visual is not None:
        # Any count of tokens, laid out as near to a square as its divisors allow.
        slices = slices if visual % slices == 0 else 1
        each = visual // slices
        high = next(r for r in range(int(each**0.5), 0, -1) if each % r == 0)
        rows, columns = high * side, each // high * side
    patches = slices * rows * columns
    full: Groups = ((slices, rows * columns),)
    windows = _windows(tower, slices, rows, columns) if tower.window else full
    vision = tuple(full if not tower.window or layer in tower.full_layers else windows for layer in range(tower.layers))
    tokens = patches // merge
    return patches, vision, tokens, tokens if visual is None else visual


def _windows(tower: Vision, slices: int, rows: int, columns: int) -> Groups:
    """Attention windows of one image; the ones at the right and lower edge are smaller."""

    def cuts(length: int) -> list[tuple[int, int]]:
        whole, rest = divmod(length, tower.window)
        return [(whole, tower.window)] * bool(whole) + [(1, rest)] * bool(rest)

    return tuple((slices * many * times, high * wide) for many, high in cuts(rows) for times, wide in cuts(columns))
