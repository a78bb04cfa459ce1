"""Video-LLaVA under pruning: two towers, frames with a CLS token among the visual tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, Needs, Ranking, Shape, Step, kept

IMAGE, VIDEO, PAD, BOS, EOS = 250, 251, 3, 1, 2
NEW = 3
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@functools.cache
def shared(kernel: str = "sdpa", dtype: torch.dtype = torch.float64) -> VideoLlavaForConditionalGeneration:
    """16 tokens per image, 17 per frame, grouped queries."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=136,
    )
    torch.manual_seed(0)
    model = VideoLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    model.set_attn_implementation(kernel)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def prompt(*parts: int | str, frames: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """One sample: numbers of text tokens, "image" and "video"."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, videos = [BOS], [], []
    for part in parts:
        if part == "image":
            ids += [IMAGE] * 16
            pixels.append(torch.randn(3, 56, 56, generator=generator, dtype=torch.float64))
        elif part == "video":
            ids += [VIDEO] * 17 * frames
            videos.append(torch.randn(frames, 3, 56, 56, generator=generator, dtype=torch.float64))
        else:
            ids += torch.randint(4, 200, (part,), generator=generator).tolist()
    out = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    out |= {"pixel_values": torch.stack(pixels)} if pixels else {}
    return out | ({"pixel_values_videos": torch.stack(videos)} if videos else {})


def batch(*samples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Left-padded batch of samples."""
    width, out = max(sample["input_ids"].shape[1] for sample in samples), {}
    for name, value in (("input_ids", PAD), ("attention_mask", 0)):
        rows = [sample[name] for sample in samples]
        out[name] = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=value) for row in rows])
    for name in ("pixel_values", "pixel_values_videos"):
        found = [sample[name] for sample in samples if name in sample]
        out |= {name: torch.cat(found)} if found else {}
    return out


SAMPLES = (
    prompt(3, "video", 4, seed=1),
    prompt(2, "image", 1, "video", 1, "image", 5, seed=2),
    prompt(6, "image", 2, seed=3),
    prompt(5, seed=4),
)


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Greedy ids, the logits of every step and the cache."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits."""
    return torch.stack(out.logits, dim=1)


def build(name: str, **params: Any) -> Method:
    return methods.build(name, {"keep": 0.4} | params)


@dataclass(frozen=True)
class Attended(Ranking):
    """Ranks by a tile's CLS row in vision layer 2; a frame's own CLS token stays."""

    card: ClassVar[Card] = Card("attended", "Attended", seam=("embed",), summary="")
    keep: float = 0.4

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {0: kept(n, self.keep)}

    def score(self, step: Step) -> torch.Tensor:
        rows = [tile.rows(0).mean(0)[0, 1:] for tile in step.vision.attention(step.shape.feature_layer)]
        return step.vision.to_tokens(torch.stack(rows), fill=float("inf"))


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(1, shape.feature_layer))}

    def reduce(self, step: Step) -> None:
        return self.see(step)


def used() -> list[Method]:
    adapter = adapter_for(shared())
    found = [name for name in methods.names() if name != "vanilla" and adapter.supports(methods.build(name)) is None]
    return [*(build(name) for name in found), Attended()]


@pytest.mark.parametrize(
    "parts, frames, visual, left",
    [(("image",), 0, 16, 8), (("video",), 8, 136, 68), (("video",), 4, 68, 34), (("image", 1, "video"), 2, 50, 25)],
)
def test_worked_counts(parts, frames, visual, left):
    with torch.no_grad(), pruned(shared(), methods.build("fastv")) as session:
        shared()(**prompt(3, *parts, 2, frames=frames))
    assert session.trace.budget(0).visual == visual and session.trace.budget(0).per_layer == [
        visual,
        visual,
        left,
        left,
    ]


def test_keeping_all_is_bit_identical():
    model, inputs = shared(), batch(*SAMPLES)
    with torch.no_grad():
        plain, expected = model(**inputs).logits, steps(generate(model, inputs))
    for method in used():
        with torch.no_grad(), pruned(model, type(method)(**method.params | {"keep": 1.0})):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(steps(generate(model, inputs)), expected)


def test_cache_lengths_follow_the_trace():
    for method in used():
        with pruned(shared(), method) as session:
            cache = generate(shared(), batch(*SAMPLES)).past_key_values
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == [session.trace.entering(layer).width + NEW - 1 for layer in range(4)]


def test_a_ragged_batch_answers_like_single_prompts():
    for method in used():
        with pruned(shared(), method):
            singles = torch.cat([steps(generate(shared(), sample)) for sample in SAMPLES])
            torch.testing.assert_close(steps(generate(shared(), batch(*SAMPLES))), singles, **CLOSE)


def test_beams_of_a_batch_answer_like_single_prompts():
    parts = SAMPLES[:2]
    for method in used():
        with pruned(shared(), method):
            singles = [generate(shared(), part, num_beams=3).sequences[0, -NEW:] for part in parts]
            together = generate(shared(), batch(*parts), num_beams=3).sequences[:, -NEW:]
        assert torch.equal(together, torch.stack(singles))


def test_kernels_agree():
    inputs = {key: part.float() if part.is_floating_point() else part for key, part in batch(*SAMPLES).items()}
    for method in used():
        logits = []
        for kernel in ("sdpa", "eager"):
            with pruned(shared(kernel, torch.float32), method):
                logits.append(steps(generate(shared(kernel, torch.float32), inputs)))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [build("random", position_mode="original"), build("fastv"), Attended()], ids=str)
def test_dropping_equals_masking(method):
    model, sample = shared(), SAMPLES[1]
    length = sample["input_ids"].shape[1]
    with torch.no_grad(), pruned(model, method) as session:
        dropped = model(**sample).logits[:, -1]

    def mask(layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        seen = torch.zeros(length, dtype=torch.bool)
        seen[session.trace.entering(layer).samples[0].origin] = True
        return args, kwargs | {"attention_mask": torch.ones(length, length, dtype=torch.bool).tril()[None, None] & seen}

    hooks = [
        layer.register_forward_pre_hook(functools.partial(mask, index), with_kwargs=True)
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    with torch.no_grad():
        masked = model(**sample).logits[:, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(dropped, masked, **CLOSE)


def test_tiles_are_the_models_features_in_prompt_order():
    """Every tile goes through its own tower; projected, it is what stands in the prompt, a frame with its CLS."""
    found: list[Step] = []
    with torch.no_grad(), pruned(shared(), Probe(found.append)):
        shared()(**batch(*SAMPLES))
        assert [step.vision.images for step in found] == [(4,), (1, 4, 1), (1,)]
        for step in found:
            view = step.vision
            assert view.has_cls and view.grids == ((4, 4),) * view.tiles and view.tiles == sum(view.images)
            frames = [kind == 4 for kind in view.images for _ in range(kind)]
            parts = [tile if frame else tile[1:] for tile, frame in zip(view.hidden(2), frames, strict=True)]
            features = view.project(torch.cat(parts))
            torch.testing.assert_close(features, step.embeddings[step.origin[step.visual]], **CLOSE)


def test_images_and_videos_side_by_side_are_told_apart():
    found: list[Step] = []
    with torch.no_grad(), pruned(shared(), Probe(found.append)):
        shared()(**prompt(2, "image", "video", "video", "image", "image", 1, frames=2))
    assert found[0].spans == ((3, 19), (19, 53), (53, 87), (87, 103), (103, 119))
    assert found[0].vision.images == (1, 2, 2, 1, 1)


def test_attention_of_each_tower_leads_from_its_input_to_its_output():
    model, found = shared(), []
    with torch.no_grad(), pruned(model, Probe(found.append)):
        model(**SAMPLES[1])
        (step,) = found
        towers = adapter_for(model).towers
        for tile, tower in enumerate([0, 1, 1, 1, 1, 0]):
            block, hidden = towers[tower][2], step.vision.hidden(1)[tile]
            attention = step.vision.attention(2)[tile]
            heads = attention.rows(range(17)) @ attention.value
            hidden = hidden + block.self_attn.out_proj(heads.transpose(0, 1).flatten(1))
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
            torch.testing.assert_close(step.vision.hidden(2)[tile], hidden, **CLOSE)


def test_cls_tokens_of_frames_have_no_cell():
    found: list[Step] = []
    with torch.no_grad(), pruned(shared(), Probe(found.append)):
        shared()(**SAMPLES[1])
    view = found[0].vision
    tokens = view.to_tokens(torch.arange(96.0).reshape(6, 16))
    empty = [16 + 17 * frame for frame in range(4)]
    assert tokens.isnan().nonzero().squeeze(-1).tolist() == empty
    assert torch.equal(tokens[~tokens.isnan()], torch.arange(96.0))
    assert torch.equal(view.to_tokens(list(torch.ones(6, 16)), fill=-2.0)[empty], torch.full((4,), -2.0))
