"""What a method's own scores cost, from what it asks the engine to record.

A method may say it itself, `work(shape, visual, text) -> dict[str, int]` in multiply-adds. Otherwise it is read off
`needs()`: one query row against every key of each decoder layer it reads, the class token's row of each vision layer
(every row where there is no class token or the method says so), and the projections of a layer that has not run yet.
Sorting, gathering and merging are not counted. The text tower of methods that compare patches with the question is a
helper model, with its own line in the ledger.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pruneval.harness.dimensions import Dimensions
from pruneval.harness.errors import UserError
from pruneval.harness.flops import Lengths, Work, ledger
from pruneval.methods.base import Shape
from pruneval.methods.helper import Reading


def shape_of(dimensions: Dimensions, lengths: Lengths | None = None) -> Shape:
    """The sizes a method may depend on; with the tiles of a sample where it is made of whole ones."""
    decoder, vision = dimensions.decoder, dimensions.vision
    return Shape(
        layers=decoder.layers,
        hidden=decoder.hidden,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vision_layers=vision.layers,
        feature_layer=vision.layers - (2 if vision.pre_norm else 1),
        has_cls=vision.class_tokens > 0,
        sheets=dimensions.newline,
        tiled=dimensions.newline or dimensions.family in ("internvl", "qwen2_5_vl", "qwen3_vl", "video_llava"),
        merge=dimensions.projector.merge,
        whole=() if lengths is None else _whole(dimensions, lengths),
    )


def _whole(dimensions: Dimensions, lengths: Lengths) -> tuple[tuple[int, int], ...]:
    """(cells, visual tokens) of each tile or frame; empty where the visual tokens are not all theirs."""
    cells = dimensions.vision.patches
    if not cells:
        return ()
    count = lengths.patches // cells
    for size, extra in ((dimensions.tile, 0), (dimensions.frame, dimensions.frame_extra)):
        if size is not None and count * size[0] + extra == lengths.given:
            return ((cells, min(size[0], cells // dimensions.projector.merge)),) * count
    return ()


def helpers(
    method: Any, dimensions: Dimensions, lengths: Lengths, helper: Dimensions | None = None
) -> tuple[Work, ...]:
    """Multiply-adds of the models a method uses besides, on one sample: a text tower, for a question that it reads in
    one piece, or a helper model. Raises: UserError when its dimensions are not known.
    """
    asked = method.needs(shape_of(dimensions)).values()
    works = [_reading(helper, needs.helper, lengths, method.card.name) for needs in asked if needs.helper]
    if works:
        return tuple(work for each in works for work in each)
    if not any(needs.clip for needs in asked):
        return ()
    tower = dimensions.text_tower
    if tower is None:
        raise UserError(f"{method.card.name}: the dimensions of {dimensions.name}'s text tower are not known")
    cells = tower.cells(lengths.patches, dimensions.vision.hidden)
    return Work("CLIP text encoder", tower.question), Work("cells in CLIP's space", cells)


def _reading(helper: Dimensions | None, how: Reading, lengths: Lengths, name: str) -> list[Work]:
    """The work of a helper model that reads the same pixels and as much text, and answers at full length.

    As a fused kernel does it. Rows of attention are those of all text, wherever it stands.
    """
    if helper is None:
        raise UserError(f"{name}: its cost needs the dimensions of a helper model: parameter helper")
    tower, decoder = helper.vision.layers, helper.decoder
    same = len(lengths.vision) == tower
    read = replace(
        lengths,
        vision=lengths.vision if same else lengths.vision[:1] * tower,
        fed=(),
        visual=(lengths.given,) * decoder.layers,
        cached=(),
        new_tokens=max(1, how.answer),
        helpers=(),
        scoring=(),
    )
    counted, prompt = ledger(helper, read), lengths.given + lengths.text
    parts = ("patch_embedding", "vision_linear", "vision_attention", "projector", "llm_linear", "llm_attention_causal")
    work = [Work("helper reads", counted.total(*parts, *(["head_last"] if how.answer else [])))]
    if how.answer > 1:
        macs = counted.total("decode_linear", "decode_attention", "decode_head")
        work.append(Work(f"helper answers with {how.answer} tokens", macs))
    if how.again:
        shown = max(1, int(lengths.given * how.again)) + lengths.text + how.answer - 1
        macs = decoder.layers * (decoder.linear * shown + decoder.width * shown * (shown + 1))
        work.append(Work("helper reads its answer again", macs + decoder.hidden * decoder.vocab * how.answer))
    if how.attention:
        columns = (lengths.text + 1) * prompt + sum(prompt + step for step in range(1, max(1, how.answer)))
        work.append(Work("rows of the helper", decoder.layers * decoder.width * columns))
    return work


def scoring(method: Any, dimensions: Dimensions, lengths: Lengths) -> tuple[Work, ...]:
    """Multiply-adds of the method's scores on one sample."""
    shape = shape_of(dimensions)
    asked = method.needs(shape)  # refuses a layer the model does not have
    if hasattr(method, "work"):
        return tuple(Work(name, macs) for name, macs in method.work(shape, lengths.given, lengths.text).items())
    decoder, vision, work = dimensions.decoder, dimensions.vision, []
    for boundary, needs in asked.items():
        for layer in needs.attention:
            work.append(Work(f"one row of layer {layer}", decoder.width * lengths.llm[layer]))
        if needs.next:
            # The stream that reaches the boundary, before the method reduces it.
            tokens = lengths.llm[boundary - 1] if boundary else lengths.given + lengths.text
            project = decoder.hidden * (decoder.width + 2 * decoder.kv_width)
            work.append(Work(f"projections and one row of layer {boundary}", tokens * (project + decoder.width)))
        for layer in needs.vision:
            one = vision.class_tokens and not needs.every_row
            pairs = sum(k * n * (1 if one else n) for k, n in lengths.vision[layer])
            work.append(Work(f"rows of vision layer {layer}", vision.width * pairs))
    return tuple(work)
