"""Helper models: what they read, what methods see of them, who may help whom."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny_llava
import tokenizers
import torch
import transformers as hf

from pruneval import methods
from pruneval.harness import cli, models, records, subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.errors import UserError
from pruneval.harness.helper import adapted
from pruneval.harness.helper_prompt import Prompts
from pruneval.harness.scoring import helpers
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods.base import Card, Method, MethodError, Needs, Shape, Step
from pruneval.methods.helper import Reading


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("layer",), summary="")
    how: Any = None
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {2: Needs(helper=self.how)}

    def reduce(self, step: Step) -> None:
        return self.see(step.helper)


def views(family: str, how: Reading, inputs: dict[str, Any], adapter: Any = None, **options: Any) -> list[Any]:
    """What a method sees of the helper at a prompt."""
    found: list[Any] = []
    model = tiny(family)
    with torch.no_grad(), pruned(model, Probe(how, found.append), adapter=adapter or subjects.adapter(model)):
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
    return found


ANSWER = Reading(answer=5, attention=True)


# What a method sees


@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava", "qwen2_5_vl"])
def test_rows_and_states_are_those_of_an_eager_run(family):
    """All of the helper's attention maps, from the model itself with the same inputs."""
    sample, helper = subject(family).samples[-1], tiny(family, "eager", seed=1)
    (view,) = views(family, ANSWER, sample)
    with torch.no_grad():
        out = helper.generate(**sample, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                              output_attentions=True, output_logits=True, output_hidden_states=True)  # fmt: skip
    visual = adapter_for(helper).visual_mask(sample["input_ids"])[0].nonzero().squeeze(-1)
    assert torch.equal(view.visual, visual) and view.length == sample["input_ids"].shape[1]
    for layer in range(4):
        torch.testing.assert_close(view.attention(layer).rows(range(view.length)), out.attentions[0][layer][0])
    steps = [torch.cat(made)[..., 0, :].sum((0, 1))[visual] for made in out.attentions[1:]]
    torch.testing.assert_close(view.answered, torch.stack(steps))
    answer = out.sequences[0, view.length :]
    torch.testing.assert_close(view.confidence.float(), torch.cat(out.logits).softmax(-1)[range(5), answer])
    states = out.hidden_states[0][-1][0]
    torch.testing.assert_close(view.hidden, states, rtol=1e-4, atol=1e-5)  # norms run in float32


def test_what_is_read_does_not_depend_on_the_batch_or_the_beams():
    one = subject("llava")
    singles = [views("llava", ANSWER, sample)[0] for sample in one.samples]
    for view, alone in zip(views("llava", ANSWER, one.batch(*one.samples, one.text)), singles, strict=True):
        for name in ("visual", "hidden", "answered", "confidence"):
            torch.testing.assert_close(getattr(view, name), getattr(alone, name))
        torch.testing.assert_close(view.attention(3).rows(-1), alone.attention(3).rows(-1))
    beams = views("llava", ANSWER, one.samples[0], num_beams=2)
    assert beams[0] is beams[1]


def test_an_answer_that_ends_early_counts_to_its_end():
    """In a batch the helper goes on for the others; what it reads meanwhile is not this sample's answer."""
    one, helper = subject("llava"), copy.deepcopy(tiny("llava", seed=1))
    inputs = one.batch(*one.samples)
    made = helper.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    end = next(int(token) for token in made[0, 1:4] if token not in made[1] and token != made[0, 0])
    size = made[0].tolist().index(end) + 1
    helper.generation_config.eos_token_id = end
    model = tiny("llava")
    adapter = adapter_for(model, helper=helper)
    together = views("llava", ANSWER, inputs, adapter)
    assert [len(view.confidence) for view in together] == [size, 5]
    assert [len(view.answered) for view in together] == [size - 1, 4]
    torch.testing.assert_close(together[0].answered, views("llava", ANSWER, one.samples[0], adapter)[0].answered)


def test_reading_without_an_answer_records_nothing_more():
    (view,) = views("llava", Reading(), subject("llava").samples[0])
    assert view.answered.shape == (0, 16) and len(view.confidence) == 0
    with pytest.raises(KeyError):
        view.attention(0)


def test_the_question_goes_first():
    """Visual tokens' states then depend on it; in the prompt's own order they do not."""
    sample = subject("llava").samples[0]
    other = sample | {"input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    for first in (False, True):
        one, two = (views("llava", Reading(question_first=first), each)[0] for each in (sample, other))
        assert torch.allclose(one.hidden[one.visual], two.hidden[two.visual]) != first
        assert (int(one.visual[-1]) == one.length - 2) == first  # then the token that closes the image


@pytest.mark.parametrize("family", ["llava", "video_llava", "qwen2_5_vl"])
def test_an_answer_read_again_with_fewer_tokens(family):
    """With all tokens it agrees with itself; with some, as the helper does when they alone are kept at layer 0."""
    sample, helper = subject(family).samples[-1], tiny(family, seed=1)
    (view,) = views(family, ANSWER, sample)
    everything = torch.arange(len(view.visual))
    torch.testing.assert_close(view.agreement(everything), view.confidence, rtol=1e-5, atol=1e-6)
    chosen = everything[::3]

    @dataclass(frozen=True)
    class Chosen(Probe):
        def needs(self, shape: Shape) -> dict[int, Needs]:
            return {0: Needs()}

        def reduce(self, step: Step) -> Any:
            return step.keep(chosen)

    answer = view.answer[None]
    longer = sample | {"input_ids": torch.cat([sample["input_ids"], answer], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in sample:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(sample["mm_token_type_ids"], (0, answer.shape[1]))
    with torch.no_grad(), pruned(helper, Chosen()):
        logits = helper(**longer).logits[0, -answer.shape[1] - 1 : -1]
    expected = logits.softmax(-1).gather(1, answer.T).squeeze(1)
    torch.testing.assert_close(view.agreement(chosen), expected, rtol=1e-5, atol=1e-6)


def test_helpers_with_features_inside_the_decoder_do_not_read_again():
    (view,) = views("qwen3_vl", ANSWER, subject("qwen3_vl").samples[0])
    with pytest.raises(MethodError, match="adds visual features inside its decoder"):
        view.agreement(torch.arange(2))


def test_low_rank_weights_are_added_while_it_reads():
    sample, helper = subject("llava").samples[0], tiny("llava", seed=1)
    down, up = torch.randn(2, 64, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64)
    how = Reading(lora={"layers.1.self_attn.q_proj": (down, up)})
    (view,) = views("llava", how, sample)
    merged = copy.deepcopy(helper)
    merged.model.language_model.layers[1].self_attn.q_proj.weight.data += up.T @ down
    with torch.no_grad():
        torch.testing.assert_close(view.hidden, merged.model(**sample).last_hidden_state[0])
        assert not torch.allclose(view.hidden, helper.model(**sample).last_hidden_state[0])
    for name, text in (("layers.9.mlp", "no layer layers.9.mlp"), ("layers.0.mlp.up_proj", "another size")):
        with pytest.raises(UserError, match=text), adapted(helper.model.language_model, {name: (down, up)}):
            pass


# What the helper reads


def processor(template: str | None = None) -> Any:
    """The tiny processor; with a chat template of its own, tokens have other numbers too."""
    made = tiny_llava.processor()
    if template is not None:
        made.chat_template = template
        data = json.loads(made.tokenizer.backend_tokenizer.to_str())
        last = len(data["model"]["vocab"]) - 1
        data["model"]["vocab"] = {word: last - index for word, index in data["model"]["vocab"].items()}
        data["added_tokens"] = []
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        extra = {"image_token": "<image>", "video_token": "<video>"}
        inner = tokenizers.Tokenizer.from_str(json.dumps(data))
        made.tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, **names, extra_special_tokens=extra)
    made.tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()
    return made


THEIRS = (
    "{% for message in messages %}Q: {% for part in message['content'] %}{{ part.get('text', '') }}"
    "{% endfor %}{% endfor %} A:"
)


def asked(theirs: Any, question_first: bool = False) -> str:
    """What the helper reads of a prompt of the tiny processor."""
    mine = processor()
    ids = mine.tokenizer("USER: <image>\nwhat? ASSISTANT:".replace("<image>", "<image>" * 4), return_tensors="pt")
    ids = ids["input_ids"][0]
    one, other = (
        SimpleNamespace(
            processor=made,
            config=SimpleNamespace(image_token_id=made.tokenizer.image_token_id),
            model=SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=128)),
            visual_mask=lambda ids, made=made: ids == made.tokenizer.image_token_id,
        )
        for made in (mine, theirs)
    )
    found = Prompts(one, other).of(ids, one.visual_mask(ids), question_first)
    return "".join(theirs.tokenizer.convert_ids_to_tokens(found.tolist())).replace("<image>", "#")


def test_prompts_in_the_helpers_own_words():
    assert asked(processor()) == "USER: ####\nwhat? ASSISTANT:"
    assert asked(processor(THEIRS)) == "Q: ####\nwhat? A:"
    assert asked(processor(THEIRS), question_first=True) == "Q: what?#### A:"
    assert asked(processor(), question_first=True) == "USER: \nwhat?#### ASSISTANT:"


# Who may help


def test_what_does_not_fit_is_one_line():
    method, model = methods.build("sgp"), tiny("llava")
    assert "needs a helper model" in adapter_for(model).supports(method)
    assert "must be another model" in adapter_for(model, helper=model).supports(method)
    assert "its model_type is llava_next, not llava" in adapter_for(model, helper=tiny("llava_next")).supports(method)
    other = copy.deepcopy(tiny("llava", seed=1))
    other.config.vision_config.image_size = 28
    assert "its image_size is 28, not 56" in adapter_for(model, helper=other).supports(method)
    pixels = [tiny_llava.processor(), tiny_llava.processor()]
    pixels[1].image_processor.image_mean = [0.0, 0.0, 0.0]
    adapter = adapter_for(model, pixels[0], helper=(tiny("llava", seed=1), pixels[1]))
    assert "its image_mean is [0.0, 0.0, 0.0]" in adapter.supports(method)
    assert adapter_for(model, helper=tiny("llava", seed=1)).supports(method) is None
    with pytest.raises(UserError, match="so this model's is needed too"):
        views(
            "llava", ANSWER, subject("llava").samples[0], adapter_for(model, helper=(tiny("llava", seed=1), pixels[0]))
        )


def test_fewer_features_than_placeholders_are_one_line():
    adapter = adapter_for(tiny("llava"), helper=tiny("llava", seed=1))
    helper = adapter.helper.model.model
    features = helper.get_image_features

    def fewer(**given: Any) -> Any:
        out = features(**given)
        out.pooler_output = tuple(item[:-1] for item in out.pooler_output)
        return out

    helper.get_image_features = fewer
    try:
        with pytest.raises(UserError, match="the helper can't read the prompt"):
            views("llava", ANSWER, subject("llava").samples[0], adapter)
    finally:
        del helper.get_image_features


# What it costs


def test_the_price_is_what_torch_counts():
    """Of the helper's run alone: the difference between a pruned forward with it and one without."""
    from torch.utils.flop_counter import FlopCounterMode

    from pruneval.harness.dimensions_config import dimensions_of
    from pruneval.harness.flops import ledger, lengths_of

    sample, helper = subject("llava").samples[0], tiny("llava", "eager", seed=1)
    dimensions, text = dimensions_of(helper.config), sample["input_ids"].shape[1] - 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        helper.generate(**sample, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    method = Probe(Reading(answer=5))
    works = {
        work.name: work.macs for work in helpers(method, dimensions, lengths_of(dimensions, text=text), dimensions)
    }
    counted = ledger(dimensions, lengths_of(dimensions, text=text, new_tokens=5))
    masked = counted.llm_attention_square - counted.llm_attention_causal  # an eager kernel computes them too
    assert set(works) == {"helper reads", "helper answers with 5 tokens"}
    assert counter.get_total_flops() == pytest.approx(2 * (sum(works.values()) + masked), rel=1e-3)


def test_an_evaluation_names_its_helper_and_records_its_cost(tmp_path, capsys):
    for name, seed in (("large", 1), ("small", 7)):
        made = tiny_llava.loaded(seed)
        made.model.float().save_pretrained(tmp_path / name)
        made.processor.save_pretrained(tmp_path / name)
    given = ["--set", f"helper={tmp_path / 'small'}", "--set", "answer=4", "--set", "keep=0.25"]
    words = ["eval", "--model", str(tmp_path / "large"), "--benchmark", "pocket-pope", "--limit", "2"]
    assert cli.main([*words, "--method", "sgp", *given, "--out", str(tmp_path / "runs")]) == 0
    (record,) = (each for each in records.read_records(tmp_path / "runs") if each.spec.method == "sgp")
    found = models.locate(str(tmp_path / "small"))
    assert record.spec.params["helper"] == f"small@{found.revision[:8]}"
    assert record.budget["avg_in"] == (16 + 3 * 4) / 4
    assert record.implied["helper_tflops"] > 0 and str(tmp_path) not in str(record.to_dict())
    assert record.implied["tflops_with_helpers"] > record.implied["unpruned_tflops"]
    printed = capsys.readouterr().out
    assert f"sgp(helper=small@{found.revision[:8]}" in printed
    cost = [f"{record.implied[key]:.3g}" for key in ("helper_tflops", "tflops_with_helpers", "unpruned_tflops")]
    assert "besides the model (helper reads, helper answers with 4 tokens, rows of the helper): " in printed
    assert "{} TFLOPs implied, {} in all, {} un-pruned".format(*cost) in printed
    assert record.budget["early"] == 0
    given += ["--set", "exit=0"]  # any answer of the helper is good enough
    assert cli.main([*words, "--method", "sgp", *given, "--out", str(tmp_path / "runs")]) == 0
    (early,) = (each for each in records.read_records(tmp_path / "runs") if each.spec.given.get("exit") == 0)
    assert early.budget == record.budget | {"early": 1}
    rows = [records.read_samples(tmp_path / "runs" / one.spec.hash, one) for one in (record, early)]
    assert list(rows[0]["answer"]) != list(rows[1]["answer"])
    capsys.readouterr()
    assert cli.main([*words, "--method", "sgp", "--out", str(tmp_path / "runs")]) == 2
    assert "needs a helper model: --set helper=NAME" in capsys.readouterr().err
    assert cli.main([*words, "--method", "sgp", "--set", "helper=poket-llava"]) == 2
    assert "did you mean 'pocket-llava'?" in capsys.readouterr().err
