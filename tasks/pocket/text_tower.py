"""Train the text half of a CLIP around pocket-llava's vision tower: ``python -m pruneval.tasks.pocket.text_tower``.

The vision tower stays as it is; a text encoder and the two projections learn, with CLIP's contrastive loss, which of a
batch's images a text is about. Images count by their CLS token alone, as in CLIP: how patches come to lie in the common
space is nobody's aim. Texts are names of things and questions about the scene; other images of the batch that a text
fits as well are left out of the loss.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from pruneval.tasks.pocket import build, evaluate, vision
from pruneval.tasks.pocket.questions import Question, ask, phrase
from pruneval.tasks.pocket.train import MODEL
from pruneval.tasks.pocket.world import COLOURS, KINDS, Scene, draw, patches, render

SPECIAL = ("<s>", "<unk>", "<pad>", "</s>")
LENGTH, STEPS, BATCH, POOL, RATE, SEED = 48, 600, 128, 8192, 1e-3, 0
ASKED = ("shape", "colour", "existence", "position", "digit")
TEXT = """---
license: apache-2.0
library_name: transformers
---

# pocket-llava's CLIP

A stock `CLIPModel` whose vision tower is pocket-llava's, unchanged, with a text encoder of two layers ({parameters:.2f}
M parameters, 48 words) and the projections of both. It exists so that methods that compare patches with the question
can be run on pocket-llava. It knows nothing but the pocket world.

`python -m pruneval.tasks.pocket.text_tower` trains it again: {steps} steps of {batch} images from a pool of {pool}, the
vision tower frozen, CLIP's loss on the CLS token of each image and names of things or questions about it.

| Over {number} test images | |
|---|---|
| The image a caption finds shows what it names | {found:.3f} |
| The same by chance | {chance:.3f} |
| A patch of the evidence is more like the question than a patch of another thing | {other:.3f} |
| … than a patch of background | {ground:.3f} |
| Evidence among the quarter of patches most like the question | {most:.3f} |
| Evidence among the quarter of patches least like the question | {least:.3f} |

0.5 would be chance in the third and fourth rows, 0.25 in the last two. Nothing in training says how patches compare
with a question; as is known of the large CLIPs, those that hold what it is about are less like it than others.

Licence: Apache-2.0, like the project. No data but the generator's was used.
"""


@dataclass(frozen=True)
class Pool:
    """Scenes as the frozen tower sees them: last CLS tokens (n, 128), features of patches (n, 144, 128)."""

    scenes: list[Scene]
    classes: Tensor
    features: Tensor


def look(model: LlavaForConditionalGeneration, size: int, seed: int, split: str = "train") -> Pool:
    """Draw scenes and let the tower see them."""
    scenes: list[Scene] = []
    classes, features = [], []
    for first in range(0, size, 64):
        rng = np.random.default_rng([seed, 2, first])
        drawn = [draw(rng, split) for _ in range(min(64, size - first))]
        with torch.no_grad():
            images = vision.pixels(np.stack([render(scene) for scene in drawn]))
            out = model.model.vision_tower(images, output_hidden_states=True)
        scenes += drawn
        classes.append(out.last_hidden_state[:, 0])
        features.append(out.hidden_states[vision.FEATURE][:, 1:].half())
    return Pool(scenes, torch.cat(classes), torch.cat(features))


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of pocket-llava in lower case, between start and end."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *(w.lower() for w in build.words()[5:])]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(build.PIECES), "removed", invert=True)
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        model_max_length=LENGTH, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def untrained(model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP around the model's tower; seed torch first."""
    text = {
        "vocab_size": len(words), "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH, "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.config().to_dict(), projection_dim=96))
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    clip.vision_model.requires_grad_(False)
    return clip


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Names of one to three things of the scene, or a question about it."""
    if rng.random() < 0.5:
        number = int(rng.integers(1, min(3, len(scene.things)) + 1))
        things = [scene.things[i] for i in rng.permutation(len(scene.things))[:number]]
        names = [phrase(thing.kind, thing.colour if rng.random() < 0.75 else None) for thing in things]
        return ("a " if rng.random() < 0.5 else "") + " and a ".join(names)
    for _ in range(8):
        question = ask(scene, rng, ASKED[int(rng.integers(5))])
        if question and question.answer != "no":
            return question.text
    return "a " + phrase(scene.things[0].kind, scene.things[0].colour)


def named(text: str) -> list[tuple[str | None, str | None]]:
    """What a text names, as (kind, colour)."""
    words, found = re.findall(build.PIECES, text.lower()), []
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word in KINDS:
            before = i - 2 if i and words[i - 1] == "number" else i - 1
            found.append((word, words[before] if before >= 0 and words[before] in COLOURS else None))
        elif word in COLOURS and following not in KINDS and following != "number":
            found.append((None, word))
    return found


def fits(scene: Scene, things: list[tuple[str | None, str | None]]) -> bool:
    """Whether the scene has all that a text names."""
    there = [(thing.kind, thing.colour) for thing in scene.things]
    return all(any(kind in (None, k) and colour in (None, c) for k, c in there) for kind, colour in things)


def texts(clip: CLIPModel, words: PreTrainedTokenizerFast, said: list[str]) -> Tensor:
    """(n, 96) embeddings."""
    ids = words(said, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    return clip.text_projection(clip.text_model(ids).pooler_output)


def train(clip: CLIPModel, words: PreTrainedTokenizerFast, pool: Pool, steps: int, seed: int) -> None:
    """CLIP's loss on the pool."""
    learned = [weight for weight in clip.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        rng = np.random.default_rng([seed, 7, step])
        chosen = rng.integers(len(pool.scenes), size=BATCH)
        said = [caption(pool.scenes[i], rng) for i in chosen]
        also = torch.tensor([[fits(pool.scenes[j], things) for j in chosen] for things in map(named, said)])
        images = clip.visual_projection(clip.vision_model.post_layernorm(pool.classes[chosen]))
        alike = F.normalize(texts(clip, words, said), dim=-1) @ F.normalize(images, dim=-1).T
        logits = clip.logit_scale.exp().clamp(max=100) * alike
        logits = logits.masked_fill(also & ~torch.eye(BATCH, dtype=torch.bool), -1e4)
        own = torch.arange(BATCH)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50, 0.02 + (steps - step) / (0.5 * steps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def measure(clip: CLIPModel, words: PreTrainedTokenizerFast, pool: Pool) -> dict[str, float]:
    """The figures of the card, over a pool of other scenes."""
    norm, rng = clip.vision_model.post_layernorm, np.random.default_rng(5)
    captions = ["a " + phrase(scene.things[0].kind, scene.things[0].colour) for scene in pool.scenes]
    images = F.normalize(clip.visual_projection(norm(pool.classes)), dim=-1)
    found = (F.normalize(texts(clip, words, captions), dim=-1) @ images.T).argmax(1)
    right = torch.tensor([[fits(scene, named(said)) for scene in pool.scenes] for said in captions]).float()
    rows = []
    for i, (scene, patch) in enumerate(zip(pool.scenes, pool.features, strict=True)):
        question = ask(scene, rng, ASKED[i % 5])
        if question is None or not 0 < len(question.evidence) <= 2 or len(question.evidence) == len(scene.things):
            continue
        alike = F.normalize(clip.visual_projection(norm(patch.float())), dim=-1)
        alike = alike @ F.normalize(texts(clip, words, [question.text])[0], dim=-1)
        rows.append(_about(scene, question, alike))
    means = dict(zip(("other", "ground", "most", "least"), np.mean(rows, axis=0).tolist(), strict=True))
    return {"found": right[torch.arange(len(found)), found].mean().item(), "chance": right.mean().item(), **means}


def _about(scene: Scene, question: Question, alike: Tensor) -> tuple[float, ...]:
    """Of one question: how evidence compares with other things and with background, and its share in either end."""
    evidence = [p for i in question.evidence for p in patches(scene.things[i])]
    held = {p for thing in scene.things for p in patches(thing)}
    ends = [(sign * alike).topk(len(alike) // 4).indices.tolist() for sign in (1, -1)]
    others = [sorted(held - set(evidence)), sorted(set(range(len(alike))) - held)]
    above = [(alike[evidence][:, None] > alike[other]).float().mean().item() for other in others]
    return (*above, *(len(set(end) & set(evidence)) / len(evidence) for end in ends))


def save(clip: CLIPModel, words: PreTrainedTokenizerFast, test: Pool, out: Path) -> None:
    """Write weights (float16), tokenizer and card."""
    out.mkdir(parents=True, exist_ok=True)
    clip.half().save_pretrained(out)
    words.save_pretrained(out)
    clip.float()
    size = sum(weight.numel() for weight in clip.text_model.parameters()) / 1e6
    facts = {"parameters": size, "steps": STEPS, "batch": BATCH, "pool": POOL, "number": len(test.scenes)}
    (out / "README.md").write_text(TEXT.format(**facts, **measure(clip, words, test)))


def main() -> None:
    """Train, measure and save, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL / "text_tower", help="folder for the CLIP")
    out = parser.parse_args().out
    model, _ = evaluate.load(MODEL)
    words = tokenizer()
    torch.manual_seed(SEED)
    clip = untrained(model, words)
    train(clip, words, look(model, POOL, SEED), STEPS, SEED)
    save(clip, words, look(model, 256, 99, "test"), out)


if __name__ == "__main__":
    main()
