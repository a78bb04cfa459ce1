"""The provisional ST3: its schedules, and what leaves the caches while an answer is generated."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from steps import Rows, shape, step
from test_engine import generate, steps

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.methods import MethodError
from pruneval.methods.base import DecodeStep

SAMPLES = (tiny.prompt(5, 7, 1, 1), tiny.prompt(3, 4, 2, 2), tiny.prompt(9, 3, 1, 3))
LONG = {"max_new_tokens": 7, "suppress_tokens": [tiny.IMAGE]}
FAST = {"keep": 0.5, "every": 2, "span": 4}


def build(**params: Any) -> Any:
    return methods.build("st3", params)


@pytest.mark.parametrize(
    "attenuation, middle", [("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5), ("stairs", 0.55)]
)
def test_share_at_both_ends_and_halfway(attenuation, middle):
    method = build(attenuation=attenuation)
    assert [method.share(shape(33), layer) for layer in (2, 17, 32)] == pytest.approx([1, middle, 0.1])


@pytest.mark.parametrize("attenuation", ["linear", "cosine", "exponential", "stairs"])
def test_counts_fall_with_depth_and_with_the_answer(attenuation):
    method = build(attenuation=attenuation)
    declared = method.schedule(shape(), 576)
    assert declared[:3] == [576] * 3 and declared == sorted(declared, reverse=True) and declared[-1] >= 58
    assert list(method.needs(shape())) == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    left = [method.remaining(300, t) for t in range(0, 80)]
    assert left == sorted(left, reverse=True) and left[0] == left[7] == 300
    assert left[8] == int(300 * (1 - 0.9 / 8)) and left[64] == left[79] == 30
    assert build(decode_keep=1).evicting(shape()) == () and build(keep=1).evicting(shape()) == ()
    assert build(keep=1).schedule(shape(), 576) == [576] * 32


def test_the_last_prompt_token_ranks():
    one = step(1, 4, 1, layer=3, layers=4, seen={2: Rows([[0, 0.1, 0.4, 0.2, 0.3, 0]])})
    assert build(keep=0.5).reduce(one).keep.tolist() == [0, 2, 4, 5]


def test_the_lowest_running_score_is_evicted():
    """Scores .3, .1, .2 with room for two: the middle one goes. With momentum 0 only the newest token counts."""

    def left(momentum: float, *rows: list[float]) -> list[int]:
        method, memory = build(decode_keep=0.67, every=len(rows), span=len(rows), momentum=momentum), {}
        for t, row in enumerate(rows, start=1):
            attention = Rows([[0.0, *row, 0.4]])
            out = method.at_decode(DecodeStep(0, t, attention, torch.tensor([1, 2, 3]), 3, shape(), memory))
            assert (out is None) == (t < len(rows))
        assert len(memory["score"]) == 2
        return out.tolist()

    assert left(0.9, [0.3, 0.1, 0.2]) == [0, 2]
    assert left(0.9, [0.3, 0.1, 0.2], [0.0, 0.6, 0.0]) == [0, 2]  # .27, .15, .18
    assert left(0.0, [0.3, 0.1, 0.2], [0.0, 0.6, 0.1]) == [1, 2]


def test_caches_shrink_as_the_trace_says():
    model = tiny.shared()
    for inputs in (SAMPLES[0], tiny.batch(*SAMPLES)):
        with pruned(model, build(**FAST)) as session:
            cache = generate(model, inputs, **LONG).past_key_values
        trace, widths = session.trace, [layer.keys.shape[-2] for layer in cache.layers]
        assert widths == [trace.stored(layer).width + 6 for layer in range(4)]
        for row, sample in enumerate(SAMPLES[: trace.batch]):
            length, total = sample["input_ids"].shape[1], trace.budget(row).visual
            for layer, share in ((0, 1), (1, 1), (2, 1), (3, 0.5)):
                for generated, left in ((0, 1), (1, 1), (2, 0.75), (3, 0.75), (4, 0.5), (6, 0.5)):
                    tokens = trace.stored(layer, generated).samples[row]
                    assert int(tokens.visual.sum()) == int(total * share * left)
                    assert int((~tokens.visual).sum()) == length - total
                    assert torch.equal(tokens.origin, tokens.origin.sort().values)
            assert trace.cached(row, 0) == pytest.approx(3.5 / 4)
            assert trace.cached(row, 6) == pytest.approx(3.5 / 4 * (1 + 1 + 0.75 + 0.75 + 0.5 + 0.5) / 6)


@pytest.mark.parametrize("kernel, dtype, close", [("sdpa", torch.float64, 1e-6), ("eager", torch.float32, 1e-3)])
def test_eviction_is_masking_from_then_on(kernel, dtype, close):
    """Every decode step equals that of an un-evicted cache in which what has gone is masked."""
    model = tiny.shared(kernel, dtype=dtype)
    inputs = tiny.batch(*(sample | {"pixel_values": sample["pixel_values"].to(dtype)} for sample in SAMPLES))
    with pruned(model, build(**FAST)) as session:
        out = generate(model, inputs, **LONG)
    trace, width, hooks, now = session.trace, inputs["input_ids"].shape[1], [], [0]

    def masked(layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        if not now[0]:
            return None
        stored, entered = trace.stored(layer, now[0] - 1), trace.entering(layer)
        seen = torch.zeros(len(SAMPLES), entered.width + now[0], dtype=torch.bool)
        seen[:, entered.width :] = True
        for row, (left, all_) in enumerate(zip(stored.samples, entered.samples, strict=True)):
            seen[row, entered.width - len(all_) : entered.width] = torch.isin(all_.origin, left.origin)
        mask = seen[:, None, None]
        if kernel == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return args, kwargs | {"attention_mask": mask}

    with torch.no_grad(), pruned(model, build(**FAST, decode_keep=1)):
        cache = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        for layer, module in enumerate(model.model.language_model.layers):
            hook = functools.partial(masked, layer)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for token in range(6):
            now[0] = token + 1
            real = torch.nn.functional.pad(inputs["attention_mask"], (0, token + 1), value=1)
            logits = model(
                input_ids=out.sequences[:, width + token, None],
                attention_mask=real,
                position_ids=real.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits[:, -1]
            torch.testing.assert_close(logits, out.logits[token + 1].to(logits), rtol=close, atol=close)
        for hook in hooks:
            hook.remove()


def test_evicting_batches_answer_like_single_prompts_and_unlike_no_eviction():
    model = tiny.shared()
    with pruned(model, build(**FAST)):
        together = steps(generate(model, tiny.batch(*SAMPLES), **LONG))
        singles = torch.cat([steps(generate(model, sample, **LONG)) for sample in SAMPLES])
    torch.testing.assert_close(together, singles, rtol=1e-6, atol=1e-6)
    with pruned(model, build(**FAST, decode_keep=1)):
        static = steps(generate(model, tiny.batch(*SAMPLES), **LONG))
    assert torch.equal(static[:, :3], together[:, :3]) and not torch.allclose(static[:, 3:], together[:, 3:])


def test_beams_take_their_caches_with_them():
    model, search = tiny.shared(), LONG | {"num_beams": 3, "do_sample": False}
    with pruned(model, build(**FAST)) as session:
        together = model.generate(**tiny.batch(*SAMPLES), **search)[:, -7:]
        assert any(one.generated == 4 for one in session.trace.evictions)
        for row, sample in enumerate(SAMPLES):
            assert torch.equal(model.generate(**sample, **search)[0, -7:], together[row])


def test_no_eviction_is_a_static_progressive_pruner():
    model = tiny.shared()
    with pruned(model, build(keep=0.5, decode_keep=1)) as session:
        trimmed = steps(generate(model, SAMPLES[0], **LONG))
        assert session.evicting == () and session.trace.evictions == []
    with pruned(model, methods.build("fastv", {"layer": 3, "keep": 0.5})):
        assert torch.equal(steps(generate(model, SAMPLES[0], **LONG)), trimmed)


@pytest.mark.parametrize(
    "params", [{"first": 0}, {"every": 0}, {"attenuation": "none"}, {"decode_keep": 1.5}, {"momentum": 1}]
)
def test_parameters_are_checked(params):
    with pytest.raises(MethodError, match="st3: "):
        build(**params)
