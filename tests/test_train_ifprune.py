"""IF-Prune's training: what learns, what it writes, and that it goes on after a kill."""

from __future__ import annotations

import pytest
import torch

from pruneval import methods
from pruneval.harness import cli, models
from pruneval.harness.chat import chat
from pruneval.harness.search import data
from pruneval.harness.search.settings import Settings
from pruneval.harness.search.train_ifprune import Trainer
from pruneval.harness.session import pruned

SMALL = Settings(rank=2, alpha=4, batch_size=3, accumulate=2, rate=1e-2, epochs=3)


def trainer(settings: Settings = SMALL) -> Trainer:
    return Trainer(models.load("pocket-llava", "cpu", "float32", None), data.load("pocket", 6), settings)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    one = trainer()
    frozen = {name: weight.clone() for name, weight in one.model.named_parameters() if not weight.requires_grad}
    seen = []
    one.run(tmp_path_factory.mktemp("whole") / "state", lambda step, sums: seen.append(sums))
    return one, frozen, seen


def test_the_paper_s_batches_and_steps():
    assert Settings().steps(98600) == 560  # 16 x 11 samples each
    assert (Settings().rank, Settings().alpha, Settings().rate) == (32, 64, 5e-5)


def test_only_the_bottleneck_and_low_rank_weights_learn(trained):
    one, frozen, seen = trained
    assert len(seen) == one.total == 3
    for name, weight in one.model.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), name
    assert all(bool(weight.detach().any()) for name, weight in one.lora.items() if ".lora_B." in name)
    layers = {name.split(".lora_")[0].split(".")[-1] for name in one.lora}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert bool(one.tensors["prior.mean"].detach().any())


def test_the_question_comes_before_the_image():
    one = trainer()
    for example in one.examples:
        places = example.visual.nonzero().squeeze(-1)
        text = one.loaded.processor.tokenizer.decode(example.ids[: places[0]])
        assert "answer" in text.lower() and len(places) == 144
        assert example.answer[-1] == one.loaded.processor.tokenizer.eos_token_id


def test_a_killed_training_goes_on_to_the_same_weights(trained, tmp_path):
    whole, again = trained[0].weights(), None
    for stop in (1, 2, 9):

        def kill(step, sums, stop=stop):
            if step == stop:
                raise Killed

        again = trainer()
        try:
            again.run(tmp_path / "state", kill, every=1)
        except Killed:
            continue
    assert again.weights().keys() == whole.keys()
    for name, weight in again.weights().items():
        torch.testing.assert_close(weight, whole[name], atol=1e-6, rtol=1e-4)


def test_what_it_writes_is_what_the_method_reads(trained, tmp_path):
    """Scored by the method, the helper's states are those of the trained model itself."""
    from safetensors.torch import save_file

    from pruneval.methods.bottleneck import information

    one, path = trained[0], tmp_path / "ifprune.safetensors"
    save_file(one.weights(), path)
    loaded = models.load("pocket-llava", "cpu", "float32", None)
    method = methods.build("ifprune", {"helper": "pocket-llava", "checkpoint": str(path), "keep": 0.1})
    scores = []

    class Keeps(type(method)):
        def score(self, step):
            scores.append(super().score(step))
            return scores[-1]

    sample = one.data.samples[0]
    inputs = loaded.processor(images=[sample.image], text=[chat(loaded.processor, sample.prompt)], return_tensors="pt")
    adapter = models.adapter_of(loaded, method)
    with torch.no_grad(), pruned(loaded.model, Keeps(**method.params), adapter=adapter) as session:
        loaded.model(**inputs)
        assert session.trace.budget().per_layer == [14] * 8
    with torch.no_grad():
        batch = one.examples[:1]
        prompt, mask = one._prompts(batch, one._features(batch))
        states = one.text(inputs_embeds=prompt, attention_mask=mask).last_hidden_state[
            one._places(batch, prompt.shape[1])
        ]
        expected = information(one.tensors, states)
    torch.testing.assert_close(scores[0], expected, atol=1e-4, rtol=1e-3)


def test_bad_input_is_one_line(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    for argv, message in (
        (["--out", str(tmp_path / "x.bin")], "must end in .safetensors"),
        (["--out", str(out), "--rank", "0"], "rank must be above 0"),
        (["--out", str(out), "--data", "pocket-no"], "unknown calibration data"),
    ):
        assert cli.main(["train", "ifprune", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def helped():
    """pocket-llava with another copy of itself as helper: model, processor and adapter."""
    from pruneval.harness.adapters import adapter_for

    large, small = (models.load("pocket-llava", "cpu", "float32", None) for _ in range(2))
    return (
        large.model,
        large.processor,
        adapter_for(large.model, large.processor, helper=(small.model, small.processor)),
    )


def test_the_shipped_helper_keeps_what_is_asked_about(helped):
    """With five tokens left, patches of the thing in question stay more often than those of other things."""
    import numpy as np
    from PIL import Image

    from pruneval.tasks.pocket import prompts
    from pruneval.tasks.pocket.questions import ask
    from pruneval.tasks.pocket.world import draw, patches, render

    model, processor, adapter = helped
    method = methods.build("ifprune", {"checkpoint": "pocket-llava", "keep": 0.04})
    asked, other = [], []
    for seed in range(24):
        rng = np.random.default_rng([51, seed])
        scene = draw(rng, "test")
        question = ask(scene, rng, "colour")
        if question is None or len(scene.things) < 3:
            continue
        text = chat(processor, prompts.gqa(question))
        inputs = processor(images=[Image.fromarray(render(scene))], text=[text], return_tensors="pt")
        with torch.no_grad(), pruned(model, method, adapter=adapter) as session:
            model(**inputs)
        tokens = session.trace.entering(0).samples[0]
        first = int(adapter.visual_mask(inputs["input_ids"][0]).nonzero()[0, 0])
        kept = {int(origin) - first for origin in tokens.origin[tokens.visual]}
        assert len(kept) == 5
        for i, thing in enumerate(scene.things):
            share = len(kept & set(patches(thing))) / len(patches(thing))
            (asked if i in question.evidence else other).append(share)
    assert len(asked) >= 8
    assert sum(asked) / len(asked) > sum(other) / len(other) + 0.1


@pytest.mark.parametrize(
    ("name", "benchmark"), [("pocket-llava", "pocket-gqa"), ("pocket-onevision", "pocket-textvqa")]
)
def test_the_shipped_helper_beats_chance_at_a_tenth(name, benchmark, tmp_path, capsys):
    from pruneval.harness.records import read_records

    for method, given in (("ifprune", [f"helper={name}", f"checkpoint={name}"]), ("random", [])):
        sets = [word for each in [*given, "keep=0.1"] for word in ("--set", each)]
        assert cli.main(["eval", "--model", name, "--method", method, *sets, "--benchmark", benchmark,
                         "--limit", "40", "--out", str(tmp_path)]) == 0  # fmt: skip
    capsys.readouterr()
    scores = {r.spec.method: next(iter(r.scores.values()))["value"] for r in read_records(tmp_path)}
    assert scores["ifprune"] > scores["random"] + 0.2
