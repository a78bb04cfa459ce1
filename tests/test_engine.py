"""What every method may rely on, on a tiny LLaVA.

The tests walk the registry: a new method is tested because it exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.errors import UserError
from pruneval.harness.promises import fingerprint
from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, MethodError, Needs, Reduction, Shape, Step

CLIP = ("trim", "cdpruner", "rcom")
"""Methods that need a text tower, which this model has not: their own tests do."""
HELPED = ("sgp", "ifprune")
TRAINED = ("deco", "tokenpacker")
"""Methods that need a helper model, or weights: likewise."""
EVERY = [name for name in methods.names() if name not in ("vanilla", *CLIP, *HELPED, *TRAINED)]
SAMPLES = (tiny.prompt(5, 7, 1, 1), tiny.prompt(3, 4, 2, 2), tiny.prompt(9, 3, 1, 3))
NEW = 4


def build(name: str, keep: float = 0.4, **params: Any) -> Method:
    """A method at a budget that prunes and is not a round number."""
    return methods.build(name, tiny.params(name, keep) | params)


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Greedy ids, the logits of every step and the cache."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> torch.Tensor:
    """(B, steps, vocabulary) logits."""
    return torch.stack(out.logits, dim=1)


@dataclass(frozen=True)
class Fixed(Method):
    """Keeps visual tokens by number, so that the choice does not depend on the rest of the prompt."""

    card: ClassVar[Card] = Card("fixed", "Fixed", seam=("layer",), summary="")
    kept: tuple[tuple[int, tuple[int, ...]], ...] = ()
    position_mode: str = "original"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {layer: Needs() for layer, _ in self.kept}

    def reduce(self, step: Step) -> Reduction:
        return step.keep(torch.tensor(dict(self.kept)[step.layer]))


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


# Nothing to prune


@pytest.mark.parametrize("name", EVERY)
def test_keeping_all_is_bit_identical(name):
    model, inputs = tiny.shared(), tiny.batch(*SAMPLES)
    with torch.no_grad():
        plain, expected = model(**inputs).logits, generate(model, inputs)
        with pruned(model, build(name, 1)):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(steps(generate(model, inputs)), steps(expected))


@pytest.mark.parametrize("name", EVERY)
def test_text_only_prompts_pass_untouched(name):
    model = tiny.shared()
    inputs = {"input_ids": torch.tensor([[1, 7, 8, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = steps(generate(model, inputs))
    with pruned(model, build(name)) as session:
        assert torch.equal(steps(generate(model, inputs)), expected)
        assert session.trace.budget(0).visual == 0
        mixed = generate(model, tiny.batch(SAMPLES[0], inputs))
    torch.testing.assert_close(steps(mixed)[1:], expected)


# The trace, the cache and the declared schedule say the same


@pytest.mark.parametrize("name", ["vanilla", *EVERY])
def test_cache_lengths_follow_the_trace(name):
    model = tiny.shared()
    method = methods.build(name) if name == "vanilla" else build(name)
    with pruned(model, method) as session:
        for inputs in (SAMPLES[0], tiny.batch(*SAMPLES)):
            cache = generate(model, inputs).past_key_values
            lengths = [layer.keys.shape[-2] for layer in cache.layers]
            assert lengths == [session.trace.stored(layer).width + NEW - 1 for layer in range(4)]


@pytest.mark.parametrize("keep", [0.03, 0.25, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("name", EVERY)
def test_declared_schedule_is_observed(name, keep):
    model = tiny.shared()
    with torch.no_grad(), pruned(model, build(name, keep)) as session:
        model(**SAMPLES[0])
        budget = session.trace.budget(0)
    try:
        declared = session.method.schedule(session.shape, 16)
    except MethodError as error:
        pytest.skip(str(error))
    assert budget.per_layer == declared
    assert budget.avg_in == sum(declared) / 4 and budget.final == declared[-1] and budget.keep == budget.avg_in / 16


@pytest.mark.parametrize("name", EVERY)
def test_text_stays_and_order_is_kept(name):
    model, inputs = tiny.shared(), tiny.batch(*SAMPLES)
    with torch.no_grad(), pruned(model, build(name, 0.2)) as session:
        model(**inputs)
    for row, sample in enumerate(SAMPLES):
        text = (sample["input_ids"][0] != tiny.IMAGE).nonzero().squeeze(-1)
        for layer in range(4):
            tokens = session.trace.entering(layer).samples[row]
            assert torch.equal(tokens.origin[~tokens.visual], text)
            assert len(tokens.origin.unique()) == len(tokens)
            if not (session.method.card.merges or session.method.card.reorders):
                assert torch.equal(tokens.origin, tokens.origin.sort().values)


# Batches, kernels, beams


@pytest.mark.parametrize("name", EVERY)
def test_a_ragged_batch_answers_like_single_prompts(name):
    model = tiny.shared()
    with pruned(model, build(name)) as session:
        singles = []
        for key, sample in enumerate(SAMPLES):
            session.sample_keys = [str(key)]
            singles.append(steps(generate(model, sample)))
        session.sample_keys = ["0", "1", "2"]
        together = steps(generate(model, tiny.batch(*SAMPLES)))
    torch.testing.assert_close(together, torch.cat(singles), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_kernels_agree(name):
    inputs = tiny.batch(*(sample | {"pixel_values": sample["pixel_values"].float()} for sample in SAMPLES))
    logits = []
    for kernel in ("sdpa", "eager"):
        model = tiny.shared(kernel, dtype=torch.float32)
        with pruned(model, build(name)):
            logits.append(steps(generate(model, inputs)))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_beams_of_a_batch_answer_like_single_prompts(name):
    model, search = tiny.shared(), {"num_beams": 2, "max_new_tokens": NEW, "do_sample": False}
    inputs = tiny.batch(*SAMPLES)
    plain = model.generate(**inputs, **search)
    with pruned(model, build(name, 1)):
        assert torch.equal(model.generate(**inputs, **search), plain)
    with pruned(model, build(name)) as session:
        session.sample_keys = ["0", "1", "2"]
        together = model.generate(**inputs, **search)[:, -NEW:]
        for key, sample in enumerate(SAMPLES):
            session.sample_keys = [str(key)]
            assert torch.equal(model.generate(**sample, **search)[0, -NEW:], together[key])


# Dropping a token is masking it


@pytest.mark.parametrize(
    "name, params",
    [
        ("random", {"position_mode": "original"}),
        ("fastv", {}),
        ("pdrop", {"position_mode": "original"}),
        ("vtw", {}),
        ("psigmoid", {}),
        ("fitprune", {}),
        ("dart", {}),
        ("feather", {}),
    ],
)
def test_dropping_equals_masking(name, params):
    model, sample = tiny.shared(), SAMPLES[1]
    length = sample["input_ids"].shape[1]
    with torch.no_grad():
        with pruned(model, build(name, **params)) as session:
            dropped = model(**sample).logits[:, -1]

        def mask(layer):
            kept = torch.zeros(length, dtype=torch.bool)
            kept[session.trace.entering(layer).samples[0].origin] = True
            return torch.ones(length, length, dtype=torch.bool).tril()[None, None] & kept

        hooks = [
            module.register_forward_pre_hook(
                lambda m, a, k, i=i: (a, k | {"attention_mask": mask(i)}), with_kwargs=True
            )
            for i, module in enumerate(model.model.language_model.layers)
        ]
        masked = model(**sample).logits[:, -1]
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(dropped, masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["random", "uniform", "visionzip"])
def test_compact_pruning_before_the_model_is_a_shorter_prompt(name):
    model, sample, seen = tiny.shared(), SAMPLES[0], []
    with torch.no_grad(), pruned(model, build(name)):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        out = model(**sample).logits
        hook.remove()
    with torch.no_grad():
        short = model.model.language_model(inputs_embeds=seen[0]).last_hidden_state
        torch.testing.assert_close(out, model.lm_head(short), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["original", "compact"])
@pytest.mark.parametrize("kept", [((0, (1, 5, 9)),), ((1, tuple(range(3, 15))), (3, (0, 2, 11)))])
def test_decoding_continues_the_prefill(kept, mode):
    """Decode steps equal one longer prefill with the same choice: masks, positions and caches of all stages fit."""
    model, method = tiny.shared(), Fixed(kept, mode)
    samples = (SAMPLES[0], SAMPLES[2])
    with torch.no_grad(), pruned(model, method):
        out = generate(model, tiny.batch(*samples), suppress_tokens=[tiny.IMAGE])
        for row, sample in enumerate(samples):
            ids = torch.cat([sample["input_ids"], out.sequences[row : row + 1, -NEW:-1]], dim=1)
            again = model(input_ids=ids, pixel_values=sample["pixel_values"]).logits[0, -NEW:].float()
            torch.testing.assert_close(steps(out)[row], again, rtol=1e-6, atol=1e-6)


def test_compact_positions_of_every_stage_equal_the_cache_length():
    """PyramidDrop's card: in each stage a decoded token's position is that stage's KV length."""
    model, sample = tiny.shared(), SAMPLES[0]
    length = sample["input_ids"].shape[1]
    with pruned(model, build("pdrop", 0.5)) as session:
        model.generate(**sample, max_new_tokens=1)
        streams = session._prefill.streams
        for layer, visual in ((1, 8), (2, 4), (3, 2)):
            assert length - int(streams[layer].shift[0]) == length - 16 + visual == streams[layer].layout.width
            assert streams[layer].layout.samples[0].position.tolist() == list(range(length - 16 + visual))


# What methods see


def test_rows_equal_eager_attention():
    model, sample, found = tiny.shared("eager"), SAMPLES[1], {}

    def see(step):
        found["seen"] = step.seen[1].rows(range(len(step.origin)))
        found["received"] = step.seen[1].received()
        found["next"] = step.next.rows([-1, 3])
        found["vision"] = [one.rows(0) for one in step.vision.attention(2)]
        found["hidden"] = torch.stack(step.vision.hidden(2))
        text = sample["input_ids"][0][step.text]
        assert torch.equal(step.embeddings[step.origin[step.text]], model.get_input_embeddings()(text))
        assert step.spans == ((3, 19), (20, 36)) and step.total == 32 and len(step.question) == 4
        assert torch.equal(step.final_norm(step.hidden), model.model.language_model.norm(step.hidden))

    with torch.no_grad():
        plain = model(**sample, output_attentions=True)
        tower = model.model.vision_tower(sample["pixel_values"], output_attentions=True, output_hidden_states=True)
        with pruned(model, Probe({2: Needs(attention=(1,), next=True, vision=(2,))}, see)):
            model(**sample)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["seen"], plain.attentions[1][0], **close)
    torch.testing.assert_close(found["received"], plain.attentions[1][0].mean(1), **close)
    torch.testing.assert_close(found["next"], plain.attentions[2][0][:, [-1, 3]], **close)
    torch.testing.assert_close(torch.stack(found["vision"])[:, :, 0], tower.attentions[2][:, :, 0], **close)
    torch.testing.assert_close(found["hidden"], tower.hidden_states[3], **close)


def test_received_attention_is_summed_in_chunks(monkeypatch):
    model, found = tiny.shared(), []

    def see(step):
        blocks = list(step.seen[0].blocks(step.visual))
        found.append((step.seen[0].received(), torch.cat(blocks, dim=1), len(blocks)))

    with torch.no_grad(), pruned(model, Probe({1: Needs(attention=(0,))}, see)):
        model(**SAMPLES[0])
        monkeypatch.setattr("pruneval.harness.attention.CHUNK", 200)
        model(**SAMPLES[0])
    whole, chunked = found
    torch.testing.assert_close(whole[:2], chunked[:2])
    assert (whole[2], chunked[2]) == (1, 16)


def test_memory_lives_for_one_prompt():
    model, seen = tiny.shared(), []

    def see(step):
        seen.append((step.layer, step.memory.get("note")))
        step.memory["note"] = step.layer

    with torch.no_grad(), pruned(model, Probe({0: Needs(), 2: Needs()}, see)):
        model(**SAMPLES[0])
        model(**SAMPLES[0])
    assert seen == [(0, None), (2, 0), (0, None), (2, 0)]


@pytest.mark.parametrize("name", EVERY)
def test_prompts_leave_no_state(name):
    model = tiny.shared()
    with pruned(model, build(name)):
        first = steps(generate(model, SAMPLES[0]))
        generate(model, tiny.batch(*SAMPLES[1:]))
        assert torch.equal(steps(generate(model, SAMPLES[0])), first)


# Randomness


def test_random_choice_depends_on_names_and_seeds_only():
    model = tiny.shared()

    def chosen(samples, keys, seed=0, **params):
        with torch.no_grad(), pruned(model, build("random", **params), seed=seed) as session:
            session.sample_keys = keys
            model(**tiny.batch(*samples))
        return [tokens.origin.tolist() for tokens in session.trace.entering(0).samples]

    state = torch.get_rng_state()
    a, _, c = chosen(SAMPLES, ["a", "b", "c"])
    assert chosen([SAMPLES[2], SAMPLES[0]], ["c", "a"]) == [c, a]
    assert chosen([SAMPLES[0]], None) == chosen([SAMPLES[0]], None)
    assert chosen([SAMPLES[0]], ["other"]) != [a]
    assert chosen([SAMPLES[0]], ["a"], seed=1) != [a]
    assert chosen([SAMPLES[0]], ["a"], **{"seed": 1}) != [a]
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_number_of_sample_keys_is_refused():
    model = tiny.shared()
    with pruned(model, build("random")) as session:
        session.sample_keys = ["a", "b"]
        with pytest.raises(UserError, match="names 2 samples, the batch has 3"):
            model(**tiny.batch(*SAMPLES))


def test_a_trace_is_there_from_the_first_prompt_on():
    model = tiny.shared()
    with torch.no_grad(), pruned(model, build("random")) as session:
        with pytest.raises(UserError, match="no prompt has been read"):
            _ = session.trace
        model(**tiny.batch(*SAMPLES))
        assert session.trace.batch == len(SAMPLES)


# No trace afterwards


@pytest.mark.parametrize("name", EVERY)
def test_no_trace_is_left(name):
    model = tiny.shared()
    generate(model, SAMPLES[0])  # transformers installs hooks of its own in the first forward
    before, config = fingerprint(model), model.config.to_dict()
    plain = steps(generate(model, SAMPLES[0]))
    with pruned(model, build(name)):
        generate(model, SAMPLES[0])
        assert fingerprint(model) != before
    assert fingerprint(model) == before and model.config.to_dict() == config
    assert torch.equal(steps(generate(model, SAMPLES[0])), plain)
    with pytest.raises(KeyError, match="boom"), pruned(model, Probe({1: Needs(attention=(0,))}, lambda s: {}["boom"])):
        generate(model, SAMPLES[0])
    assert fingerprint(model) == before
    with pruned(model, build(name)) as session:
        generate(model, SAMPLES[0])
        assert session.trace.budget(0).visual == 16


def test_a_prompt_that_failed_leaves_nothing_behind():
    model = tiny.shared()
    wrong = SAMPLES[0] | {"pixel_values": SAMPLES[1]["pixel_values"]}
    with pruned(model, build("visionzip")):
        expected = steps(generate(model, SAMPLES[0]))
        with pytest.raises(ValueError, match="do not match"):
            generate(model, wrong)
        assert torch.equal(steps(generate(model, SAMPLES[0])), expected)


# Refusals


def test_uncached_forward_works_and_uncached_generation_is_refused():
    model = tiny.shared()
    with torch.no_grad(), pruned(model, build("fastv")):
        cached = model(**SAMPLES[0]).logits
        torch.testing.assert_close(model(**SAMPLES[0], use_cache=False).logits, cached)
    with pruned(model, build("fastv")), pytest.raises(UserError, match="use_cache=False"):
        generate(model, SAMPLES[0], use_cache=False)


def test_what_can_not_work_is_refused_in_one_line():
    model, sample = tiny.shared(), SAMPLES[0]
    right = {key: value.flip(1) if key == "attention_mask" else value for key, value in tiny.batch(*SAMPLES).items()}
    cases = [
        ("left padding", right, {}),
        ("a cache that grows", sample, {"cache_implementation": "static"}),
        ("chunked prefill", sample, {"prefill_chunk_size": 8}),
    ]
    for message, inputs, options in cases:
        with pruned(model, build("fastv")), pytest.raises(UserError, match=message):
            generate(model, inputs, **options)
    with pruned(model, build("fastv")), pytest.raises(UserError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 64, dtype=torch.float64), max_new_tokens=1)
    with pruned(model, build("fastv")), pytest.raises(UserError, match="already in a pruned"):  # noqa: SIM117
        with pruned(model, build("random")):
            pass
    with pytest.raises(UserError, match="layer must be between 0 and 3"), pruned(model, build("fastv", layer=4)):
        pass


@pytest.mark.parametrize(
    "keep, message", [(lambda s: s.visual, "text tokens may not"), (lambda s: torch.zeros(30).long(), "twice")]
)
def test_wrong_reductions_are_refused(keep, message):
    model = tiny.shared()
    probe = Probe({1: Needs()}, lambda step: Reduction(keep(step)))
    with torch.no_grad(), pruned(model, probe), pytest.raises(MethodError, match=message):
        model(**SAMPLES[0])


def test_an_unknown_family_is_named():
    class Other:
        class config:
            model_type = "llama"

    with pytest.raises(UserError, match="unknown model family 'llama'"):
        adapter_for(Other())
