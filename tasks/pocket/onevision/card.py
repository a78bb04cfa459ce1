"""The model card of pocket-onevision: figures, training curve and how the weights came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from pruneval.tasks.pocket import clips
from pruneval.tasks.pocket.card import Curve, minutes, steps, table
from pruneval.tasks.pocket.onevision.evaluate import OTHER, Figures
from pruneval.tasks.pocket.questions import SKILLS

NUMBER = 100
"""Images, and clips, behind the figures of the card."""

IMAGE_SKILLS = list(SKILLS)
VIDEO_SKILLS = [f"video {skill}" for skill in clips.SKILLS]
MME = [f"MME {name}" for name in OTHER[:-1]]

STAGES = ("vision", "align", "language", "places", "more")

TEXT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# pocket-onevision

A LLaVA-OneVision of {parameters:.2f} million parameters that answers by looking: at one image (whole and in crops), at
several, and at short videos. It is a stock `LlavaOnevisionForConditionalGeneration` (SigLIP tower without CLS token,
two-layer projector, Qwen2 decoder) with its own word-level tokenizer and a stock `LlavaOnevisionProcessor`;
`from_pretrained` loads it like any model of the hub. It is the second model on which methods that prune visual tokens
can be run, tested and compared end to end on a CPU, and knows nothing but the pocket world of this project: 96 x 96
pictures with one to five small shapes and digits, and clips of eight frames in which one of them moves, or in which
they appear one after another.

Read the tables before using it: a skill that the model answers no better than by chance cannot tell methods apart.
Chance is one in four for positions and directions, one in two for yes/no questions, and one in two to four for
multiple choice.

| Part | Dimensions |
|---|---|
| Vision tower | SigLIP, {vision_layers} layers of {vision_width}, 64 x 64 pixels in patches of 8 x 8; last layer |
| Projector | two linear layers, and a newline |
| Decoder | Qwen2, {text_layers} layers of {text_width}, tied embeddings, {vocabulary} tokens |
| One image of 96 x 96 | the whole at 64 x 64, and 2 x 2 crops of it at 128 x 128: 64 + 256 tokens + 16 newlines |
| One of several images (nested lists) | the whole: 64 tokens and a newline |
| A video | 4 x 4 tokens per frame, and a newline: 129 for eight frames |
| Weights | float16 in the file; made for evaluation in float32 |

## Accuracy

Greedy answers in float32, each about a picture or clip that training did not show: {number} images, {number} clips and
{number} pairs of images, each with one question of every skill that it allows. "Held-out" ones show pairs of kind and
colour that this training never showed (a green circle, a white 2, ...) and, half of the images, layouts that it never
showed.

{accuracy}

{video}

Other forms: yes/no questions as in MME's categories, multiple choice as in ScienceQA, and as in MVBench and Video-MME
(four choices, or yes and no); "two images" asks which of two images shows something, or what one of them shows.

{other}

## What dropping visual tokens does

Accuracy when only some tokens reach the decoder (before its first layer, positions kept). "Evidence" are the tokens
that hold what the question is about, in all views and frames (everything, for counting, for absence and for order).
"Received attention" ranks tokens by the attention that their patches receive in the tower's last layer, mean of heads
and rows: what methods made for a CLS token turn to where there is none.

{image_pruning}

{video_pruning}

| Wanted (mean of skills) | Images: points | Videos: points |
|---|---|---|
{properties}

## Training

`python -m pruneval.tasks.pocket.onevision.train` makes these weights again, up to what is said below (seed 0). Every
picture, clip and question comes from the project's generators.

**It is a descendant of pocket-llava, not an independent second model.** The tower begins as pocket-llava's tower
(positions resampled, the norm before the first layer folded into a scale), the decoder as pocket-llava's decoder (Llama
and Qwen2 differ in the biases of queries, keys and values, which begin at zero), with the same vocabulary.

1. Tower ({vision_steps} steps of {vision_views} views: whole images, crops, frames): each patch names kind and colour
   of what it holds, and its row and column in the view.
2. Alignment ({align_steps} steps): what the projector makes of a patch becomes what pocket-llava's makes of the same
   place or thing; patches of whole views also point at the words for their place. The tower is frozen from here on.
3. Decoder ({language_steps} steps of {images} images, {films} clips and {pairs} pair of images, from pools of
   {pool_images} images and {pool_films} clips, 9 or 10 questions each): the loss counts answers, and attributes in
   captions. The questions about an image share a sequence, but each sees the image and itself only.
4. Places ({places_steps} steps of {places_images} images, after the projector was made to show them again): views of
   the whole only, and many questions about places.
5. Decoder again ({more_steps} steps of {more_images} images, {more_films} clips and {pairs} pair of images, from fresh
   pools of {more_pool_images} and {more_pool_films}). In some steps images are seen as a whole only. About clips it is
   also asked where a thing is at the start or at the end, which no benchmark asks. From stage 4 on the projector is
   frozen.

**Trained on thinned images.** As for pocket-llava: in most steps of stages 3 to 5 the decoder does not get the whole
image, but all tokens that hold things (at times a random few of each thing's) and random others up to 128, 64 or 32, at
times with the others hidden; 64 of a clip's 129, in some steps. The last 8 % of stages 3 and 5 show everything. No step
removes a whole thing.

{history}

Time on one thread of two shared CPU cores: {times}.

Images of other sizes than 96 x 96, several images in a flat list (each then in crops) and videos of other lengths than
eight frames run, but training showed none.

![Training curve](training.png)

Figures on a small test set while training (vision: kind and colour right over the patches that hold things, "small":
kind, in whole images only; language, places and more, which are stages 3, 4 and 5: accuracy per skill).

{vision_curve}

{language_curve}

{places_curve}

{more_curve}

Licence: Apache-2.0, like the project. No data but the generators' was used.
"""


def facts(model: LlavaOnevisionForConditionalGeneration, processor: LlavaOnevisionProcessor) -> dict[str, Any]:
    """What the card says about the model's size."""
    vision, text = model.config.vision_config, model.config.text_config
    return {
        "parameters": model.num_parameters() / 1e6, "vision_layers": vision.num_hidden_layers,
        "vision_width": vision.hidden_size, "text_layers": text.num_hidden_layers, "text_width": text.hidden_size,
        "vocabulary": len(processor.tokenizer),
    }  # fmt: skip


def write(out: Path, figures: Figures, curve: Curve, facts: dict[str, Any]) -> None:
    """Write README.md and training.png beside the weights."""
    seen = {stage: [e for e in curve if e["stage"] == stage] for stage in STAGES}
    times = ", ".join(f"{stage} {minutes(entries):.0f} min" for stage, entries in seen.items())
    del seen["align"]
    image, clip, two = (figures[kind] for kind in ("image", "clip", "two"))
    main = ("all tokens", "held-out")
    other = {name: pick(image[name] | clip[name] | two[name], [*MME, "choice", "mvbench", "videomme", "two images"])
             for name in main}  # fmt: skip
    pruning = [
        table("Kept", {name: pick(row, names) for name, row in part.items() if name != "held-out"})
        for part, names in ((image, IMAGE_SKILLS), (clip, VIDEO_SKILLS))
    ]
    text = TEXT.format(
        number=NUMBER, accuracy=table("Images", {name: pick(image[name], IMAGE_SKILLS) for name in main}),
        video=table("Clips", {name: pick(clip[name], VIDEO_SKILLS) for name in main}), other=table("", other),
        image_pruning=pruning[0], video_pruning=pruning[1], properties=_properties(image, clip), times=times,
        vision_curve=steps("vision step", seen["vision"], ["loss", "kind", "colour", "small"], 100),
        language_curve=steps(
            "language step", seen["language"], ["loss", *IMAGE_SKILLS, *clips.SKILLS[:3], "video count"], 50
        ),
        places_curve=steps("places step", seen["places"], ["loss", *IMAGE_SKILLS], 50),
        more_curve=steps(
            "more step", seen["more"], ["loss", "video loss", *IMAGE_SKILLS, *clips.SKILLS[:3], "video count"], 150
        ),
        **facts,
    )  # fmt: skip
    (out / "README.md").write_text(text)
    _plot(out / "training.png", seen)


def pick(row: dict[str, float], names: list[str]) -> dict[str, float]:
    """Some of a row's figures, and their mean."""
    return {name: row[name] for name in names} | {"mean": sum(row[name] for name in names) / len(names)}


def _properties(image: dict[str, dict[str, float]], clip: dict[str, dict[str, float]]) -> str:
    """The properties the world was made for, with what was measured."""
    rows = []
    for part, names in ((image, IMAGE_SKILLS), (clip, VIDEO_SKILLS)):
        mean = {key: 100 * pick(row, names)["mean"] for key, row in part.items()}
        attention = "received attention top"
        rows.append(
            {
                "Evidence only costs": mean["all tokens"] - mean["evidence only"],
                "Received attention, top 25 %, beats random by": mean[f"{attention} 25 %"] - mean["random 25 %"],
                "Received attention, top 11 %, beats random by": mean[f"{attention} 11 %"] - mean["random 11 %"],
                "Random 11 % costs": mean["all tokens"] - mean["random 11 %"],
            }
        )
    return "\n".join(f"| {name} | {rows[0][name]:.1f} | {rows[1][name]:.1f} |" for name in rows[0])


def _plot(path: Path, seen: dict[str, Curve]) -> None:
    figure, axes = plt.subplots(1, len(seen), figsize=(4.2 * len(seen), 3.6), layout="constrained")
    for axis, (stage, curve) in zip(axes, seen.items(), strict=True):
        skip = {"stage", "step", "seconds", "ground"}
        for name in [n for n in (curve[0] if curve else {}) if n not in skip and "loss" not in n]:
            axis.plot([e["step"] for e in curve], [e[name] for e in curve], label=name)
        axis.set(title=stage, xlabel="step", ylabel="accuracy while training", ylim=(0, 1.02))
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)
