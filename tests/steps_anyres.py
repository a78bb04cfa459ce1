"""Steps of prompts with any-resolution images, groups of images and videos, as a method sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tiny_anyres as tiny
import torch

from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, Needs, Reduction, Shape, Step

NEW = 4


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def reduce(self, step: Step) -> Reduction | None:
        return self.see(step)


def observed(family: str, inputs: dict[str, Any], **options: Any) -> list[Step]:
    """The steps of a forward, or of generate when there are options."""
    seen: list[Step] = []
    model = tiny.model(family)
    with torch.no_grad(), pruned(model, Probe(seen.append)):
        generate(model, inputs, **options) if options else model(**inputs)
    return seen


def one(family: str, *images: Any, videos: tuple[Any, ...] = (), nested: bool = True) -> Step:
    """The only step of a prompt with these images and videos side by side."""
    text = "a" + "<image>" * len(images) + "<video>" * len(videos) + "b"
    (step,) = observed(family, tiny.inputs(family, (text, list(images), list(videos)), nested=nested))
    return step
