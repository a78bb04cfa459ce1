"""What a method's own scores cost, from what it asks the engine to record.

A method may say it itself, `work(shape, visual, text) -> dict[str, int]` in multiply-adds. Otherwise it is read off
`needs()`: one query row against every key of each decoder layer it reads, the class token's row of each vision layer
(every row where there is no class token), and the projections of a layer that has not run yet. Sorting,
gathering and merging are not counted. The text tower of methods that compare patches with the question is a helper
model, with its own line in the ledger.
"""

from __future__ import annotations

from typing import Any

from pruneval.harness.dimensions import Dimensions
from pruneval.harness.errors import UserError
from pruneval.harness.flops import Lengths, Work
from pruneval.methods.base import Shape


def shape_of(dimensions: Dimensions) -> Shape:
    """The sizes a method may depend on."""
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
    )


def helpers(method: Any, dimensions: Dimensions, lengths: Lengths) -> tuple[Work, ...]:
    """Multiply-adds of the models a method uses besides, on one sample: a text tower, for a question that it reads in
    one piece. Raises: UserError when its dimensions are not known.
    """
    if not any(needs.clip for needs in method.needs(shape_of(dimensions)).values()):
        return ()
    tower = dimensions.text_tower
    if tower is None:
        raise UserError(f"{method.card.name}: the dimensions of {dimensions.name}'s text tower are not known")
    cells = tower.cells(lengths.patches, dimensions.vision.hidden)
    return Work("CLIP text encoder", tower.question), Work("cells in CLIP's space", cells)


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
            pairs = sum(k * n * (1 if vision.class_tokens else n) for k, n in lengths.vision[layer])
            work.append(Work(f"rows of vision layer {layer}", vision.width * pairs))
    return tuple(work)
