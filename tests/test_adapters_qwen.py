"""Qwen2.5-VL and Qwen3-VL under pruning: three-row positions, windows, the merger's order, added features."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_qwen as tiny
import torch

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.session import Session, pruned
from pruneval.methods.base import Card, Method, Needs, Ranking, Reduction, Shape, Step, kept

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
NEW = 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the norms round to float32


@functools.cache
def shared(family: str, kernel: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    return {"qwen2_5_vl": tiny.qwen25, "qwen3_vl": tiny.qwen3}[family](kernel).to(dtype)


def samples(family: str) -> list[dict[str, Any]]:
    """One image (24 tokens), two images and a video (4 + 9 + 12), text only."""
    return [
        tiny.prompt(family, 3, (1, 8, 12), 4, seed=1),
        tiny.prompt(family, 2, (1, 4, 4), 1, (1, 6, 6), 2, (2, 6, 4), 3, seed=2, slices=family == "qwen3_vl"),
        tiny.prompt(family, 7, seed=3),
    ]


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Greedy ids, the logits of every step and the cache; placeholders are never generated."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO]} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits."""
    return torch.stack(out.logits, dim=1)


def build(name: str, **params: Any) -> Method:
    return methods.build(name, {"keep": 0.4} | params)


def supported(family: str) -> list[str]:
    """Every method of the registry that runs on the family; the others say why not."""
    adapter, names = adapter_for(shared(family)), []
    for name in methods.names():
        reason = adapter.supports(methods.build(name))
        assert reason is None or (reason.startswith(name) and "\n" not in reason)
        if reason is None and name != "vanilla":
            names.append(name)
    return names


@dataclass(frozen=True)
class Fixed(Method):
    """Keeps visual tokens by number."""

    card: ClassVar[Card] = Card("fixed", "Fixed", seam=("layer",), summary="")
    chosen: tuple[tuple[int, tuple[int, ...]], ...] = ()
    position_mode: str = "original"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {layer: Needs() for layer, _ in self.chosen}

    def reduce(self, step: Step) -> Reduction:
        return step.keep(torch.tensor(dict(self.chosen)[step.layer]))


@dataclass(frozen=True)
class Received(Ranking):
    """Ranks by what tokens receive in two vision layers, one windowed and one not."""

    card: ClassVar[Card] = Card("received", "Received", seam=("embed",), summary="")
    keep: float = 0.4

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(2, 3))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {0: kept(n, self.keep)}

    def score(self, step: Step) -> torch.Tensor:
        view = step.vision
        return sum(view.to_tokens([tile.received().mean(0) for tile in view.attention(layer)]) for layer in (2, 3))


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    asked: Any = None
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return self.asked

    def reduce(self, step: Step) -> Reduction | None:
        return self.see(step)


EARLY = ((0, tuple(range(2, 20))), (1, (0, 3, 4, 9, 17)), (3, (1, 2)))  # Qwen3-VL adds features behind layers 0 and 1


# Counts


@pytest.mark.parametrize(
    "size, visual, fastv",
    [((1, 4, 4), 4, 2), ((1, 8, 12), 24, 12), ((1, 10, 14), 35, 18), ((1, 16, 24), 96, 48), ((4, 8, 12), 96, 48)],
)
def test_worked_counts(size, visual, fastv):
    model = shared("qwen2_5_vl")
    with torch.no_grad(), pruned(model, methods.build("fastv")) as session:
        model(**tiny.prompt("qwen2_5_vl", 3, size, 2))
    budget = session.trace.budget(0)
    assert budget.visual == visual and budget.per_layer == [visual, visual, fastv, fastv]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_videos_of_a_sample_are_counted_together(family):
    model = shared(family)
    with torch.no_grad(), pruned(model, build("random", keep=0.2)) as session:
        model(**tiny.batch(*samples(family)))
    assert [session.trace.budget(row).visual for row in range(3)] == [24, 4 + 9 + 12, 0]
    assert [session.trace.budget(row).final for row in range(3)] == [5, 5, 0]


# Nothing to prune


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_bit_identical(family):
    model, inputs = shared(family), tiny.batch(*samples(family))
    with torch.no_grad():
        plain, expected = model(**inputs).logits, steps(generate(model, inputs))
        beams = generate(model, inputs, num_beams=3).sequences
        for method in [*(build(name, keep=1) for name in supported(family)), Received(1)]:
            with pruned(model, method):
                assert torch.equal(model(**inputs).logits, plain)
                assert torch.equal(steps(generate(model, inputs)), expected)
                assert torch.equal(generate(model, inputs, num_beams=3).sequences, beams)


# The trace, the cache, the positions


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_lengths_follow_the_trace(family):
    model, inputs = shared(family), tiny.batch(*samples(family))
    for method in [*(build(name) for name in supported(family)), Received(), Fixed(EARLY)]:
        with pruned(model, method) as session:
            for part in (inputs, samples(family)[0]) if method.card.name != "fixed" else (samples(family)[0],):
                cache = generate(model, part).past_key_values
                lengths = [layer.keys.shape[-2] for layer in cache.layers]
                assert lengths == [session.trace.entering(layer).width + NEW - 1 for layer in range(len(lengths))]


@pytest.mark.parametrize("family", FAMILIES)
def test_survivors_are_rotated_as_in_the_whole_prompt(family):
    """What a layer caches of a token depends on its input and its position alone, so at a boundary keys must agree."""
    model, seen = shared(family), {}
    for sample in samples(family)[:2]:
        with torch.no_grad():
            whole = model(**sample)
            hook = model.model.language_model.layers[2].register_forward_pre_hook(
                lambda module, args, kwargs: seen.update(rotation=kwargs["position_embeddings"]), with_kwargs=True
            )
            model(**sample)
            rotation = seen["rotation"]
            with pruned(model, build("fastv", layer=2)) as session:
                hook.remove()
                hook = model.model.language_model.layers[2].register_forward_pre_hook(
                    lambda module, args, kwargs: seen.update(rotation=kwargs["position_embeddings"]), with_kwargs=True
                )
                part = model(**sample)
                hook.remove()
        tokens = session.trace.entering(2).samples[0]
        assert tokens.position.shape == (3, len(tokens)) and len(tokens) < sample["input_ids"].shape[1]
        assert len(tokens.position[:, tokens.visual].unique(dim=0)) == 3  # rows and columns differ
        for now, before in zip(seen["rotation"], rotation, strict=True):
            assert torch.equal(now, before[:, tokens.origin])
        keys = [out.past_key_values.layers[2].keys for out in (part, whole)]
        torch.testing.assert_close(keys[0], keys[1][:, :, tokens.origin], **CLOSE)


def masked(model: Any, session: Session, inputs: dict[str, Any], extra: int) -> torch.Tensor:
    """Logits of the whole model in which layers do not see tokens that the session dropped before them."""
    length = inputs["input_ids"].shape[1]

    def mask(layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        seen = torch.zeros(length, dtype=torch.bool)
        seen[session.trace.entering(layer).samples[0].origin] = True
        seen[length - extra :] = True
        return args, kwargs | {"attention_mask": torch.ones(length, length, dtype=torch.bool).tril()[None, None] & seen}

    hooks = [
        layer.register_forward_pre_hook(functools.partial(mask, index), with_kwargs=True)
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [build("random", position_mode="original"), build("fastv", layer=1), build("fastv", layer=3), Fixed(EARLY)],
    ids=["random", "fastv1", "fastv3", "early"],
)
def test_dropping_equals_masking_also_while_decoding(family, method):
    model = shared(family)
    for sample in samples(family)[:2]:
        with pruned(model, method) as session:
            out = generate(model, sample)
        ids = out.sequences[:, :-1]
        start, extra = sample["input_ids"].shape[1], NEW - 1
        position = positions(model, sample)
        more = position[..., -1:] + torch.arange(1, NEW)
        whole = {name: value for name, value in sample.items() if name not in ("mm_token_type_ids", "attention_mask")}
        whole |= {"input_ids": ids, "position_ids": torch.cat([position, more], dim=-1)}
        expected = masked(model, session, whole, extra)[:, start - 1 :]
        torch.testing.assert_close(steps(out), expected.to(out.logits[0]), **CLOSE)


def positions(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    """(3, 1, S) ids of the un-pruned prompt."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: sample[name] for name in names if name in sample})[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_is_what_the_text_model_does_without_ids(family):
    model, sample, seen = shared(family), samples(family)[0], {}
    text = model.model.language_model
    with pruned(model, build("random")) as session:
        hook = text.register_forward_pre_hook(
            lambda m, a, kwargs: seen.setdefault("first", kwargs) and None, with_kwargs=True
        )
        out = generate(model, sample)
        hook.remove()
    tokens = session.trace.entering(0).samples[0]
    assert torch.equal(tokens.position, torch.arange(len(tokens)).expand(3, -1))
    new = model.get_input_embeddings()(out.sequences[:, -NEW:-1])
    embeds = torch.cat([seen["first"]["inputs_embeds"][:, tokens.origin], new], dim=1)
    extra = {}
    if family == "qwen3_vl":
        here = torch.cat([tokens.visual, torch.zeros(NEW - 1, dtype=torch.bool)])[None]
        visual = (tokens.origin - 5)[tokens.visual]  # the image begins behind 5 tokens
        features = [level[visual] for level in seen["first"]["deepstack_visual_embeds"]]
        extra = {"visual_pos_masks": here, "deepstack_visual_embeds": features}
    with torch.no_grad():
        expected = model.lm_head(text(inputs_embeds=embeds, **extra).last_hidden_state)[:, len(tokens) - 1 :]
    torch.testing.assert_close(steps(out), expected.to(out.logits[0]), **CLOSE)


# Batches, kernels, beams


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_answers_like_single_prompts(family):
    model, parts = shared(family), samples(family)
    for method in [*(build(name) for name in supported(family)), build("random", position_mode="original"), Received()]:
        with pruned(model, method):
            singles = torch.cat([steps(generate(model, part)) for part in parts])
            together = steps(generate(model, tiny.batch(*parts)))
            torch.testing.assert_close(together, singles, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_batch_answer_like_single_prompts(family):
    model, parts = shared(family), samples(family)[:2]
    for method in (build("fastv"), build("random"), Received()):
        with pruned(model, method):
            singles = [generate(model, part, num_beams=3).sequences[0, -NEW:] for part in parts]
            together = generate(model, tiny.batch(*parts), num_beams=3).sequences[:, -NEW:]
            assert torch.equal(together, torch.stack(singles))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_agree(family):
    inputs = tiny.batch(*samples(family))
    for method in (build("fastv"), build("random"), Received()):
        logits = []
        for kernel in ("sdpa", "eager"):
            model = shared(family, kernel, torch.float32)
            with pruned(model, method):
                logits.append(steps(generate(model, inputs)))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


# The vision tower's view


def views(family: str, inputs: dict[str, Any], layers: tuple[int, ...]) -> list[Any]:
    """What a method sees of the vision tower, per sample."""
    found: list[Any] = []
    with torch.no_grad(), pruned(shared(family), Probe({0: Needs(vision=layers)}, lambda s: found.append(s.vision))):
        shared(family)(**inputs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_projected_tiles_are_the_models_features_in_prompt_order(family):
    model, parts = shared(family), samples(family)[:2]
    steps_seen: list[Step] = []
    with torch.no_grad(), pruned(model, Probe({0: Needs(vision=(3,))}, steps_seen.append)):
        model(**tiny.batch(*parts))
    one, two = (step.vision for step in steps_seen)
    assert (one.tiles, one.images, one.grids, one.has_cls) == (1, (1,), ((4, 6),), False)
    assert (two.tiles, two.images, two.grids) == (4, (1, 1, 2), ((2, 2), (3, 3), (3, 2), (3, 2)))
    (whole,), (first, second, *video) = (step.spans for step in steps_seen)
    assert (whole, first, second) == ((5, 29), (4, 8), (11, 20))
    assert video == ([(24, 30), (32, 38)] if family == "qwen3_vl" else [(24, 36)])
    for step in steps_seen:
        features = torch.cat([step.vision.project(tile) for tile in step.vision.hidden(3)])
        torch.testing.assert_close(features, step.embeddings[step.origin[step.visual]], **CLOSE)
        blocks = step.vision.blocks(step.vision.hidden(3)[0])
        assert torch.equal(step.vision.project(blocks[1:3]), step.vision.project(blocks.flatten(1)[1:3]))


def test_a_perturbed_token_shows_in_its_place_and_window():
    """In layer 0 a change reaches the window of 4 x 4 tokens around it and nothing else, in raster order."""
    sample = tiny.prompt("qwen2_5_vl", 2, (1, 12, 20), 2)
    changed = sample | {"pixel_values": sample["pixel_values"].clone()}
    row, column = 5, 7
    changed["pixel_values"][(row * 10 + column) * 4] += 1
    layers = (0, 1)
    before, after = (views("qwen2_5_vl", inputs, layers)[0] for inputs in (sample, changed))
    moved = (after.hidden(0)[0] - before.hidden(0)[0]).abs().amax(-1)
    token = before.to_tokens([moved]).reshape(6, 10)
    window = torch.zeros(6, 10, dtype=torch.bool)
    window[4:6, 4:8] = True
    assert torch.equal(token > 0, window)
    assert int(token.argmax()) == row * 10 + column and int(moved.argmax()) == (row * 10 + column) * 4
    assert bool(((after.hidden(1)[0] - before.hidden(1)[0]).abs().amax(-1) > 0).all())
    seen = before.attention(0)[0].rows((row * 10 + column) * 4)[:, 0]
    assert torch.equal(before.to_tokens([seen.mean(0)]).reshape(6, 10) > 0, window)
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen.sum(-1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_every_layer_leads_from_its_input_to_its_output(family):
    tower = adapter_for(shared(family)).vision_layers
    for view in views(family, tiny.batch(*samples(family)[:2]), (0, 1, 2, 3)):
        for layer in (1, 2, 3):
            block = tower[layer]
            for tile, attention in enumerate(view.attention(layer)):
                hidden = view.hidden(layer - 1)[tile]
                with torch.no_grad():
                    heads = attention.rows(range(len(hidden))) @ attention.value
                    hidden = hidden + block.attn.proj(heads.transpose(0, 1).flatten(1))
                    hidden = hidden + block.mlp(block.norm2(hidden))
                torch.testing.assert_close(view.hidden(layer)[tile], hidden, **CLOSE)


def test_cells_become_tokens_four_by_four():
    view = views("qwen2_5_vl", samples("qwen2_5_vl")[1], (1,))[0]
    parts = [torch.arange(4.0 * rows * columns) for rows, columns in view.grids]
    expected = torch.cat([4 * torch.arange(4.0) + 1.5, 4 * torch.arange(9.0) + 1.5, *2 * [4 * torch.arange(6.0) + 1.5]])
    assert torch.equal(view.to_tokens(parts), expected)


# Features that Qwen3-VL adds between layers


@dataclass(frozen=True)
class Merged(Method):
    """Before layer 0 only visual tokens 3 and 5 stay: one is merged into, one lends its place to a new token."""

    card: ClassVar[Card] = Card("merged", "Merged", seam=("embed",), summary="", merges=True)

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs()}

    def reduce(self, step: Step) -> Reduction:
        keep = torch.cat([step.text, step.visual[[3, 5]]]).sort().values
        slots = torch.isin(keep, step.visual).nonzero().squeeze(-1)
        return Reduction(keep, slots, torch.zeros(2, 64), torch.tensor([False, True]))


def test_added_features_follow_their_tokens():
    model, sample, seen = shared("qwen3_vl"), samples("qwen3_vl")[0], {}
    text = model.model.language_model
    with torch.no_grad(), pruned(model, Merged()):
        hooks = [
            text.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True),
            text.layers[0].register_forward_hook(lambda m, a, out: seen.update(out=out)),
            text.layers[1].register_forward_pre_hook(lambda m, a: seen.update(into=a[0])),
        ]
        model(**sample)
        for hook in hooks:
            hook.remove()
    added = seen["into"] - seen["out"]
    expected = torch.zeros_like(added)
    expected[0, 5] = seen["deepstack_visual_embeds"][0][3]
    torch.testing.assert_close(added, expected)
    assert "_deepstack_process" not in vars(text)
