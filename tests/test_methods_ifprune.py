"""IF-Prune: the bottleneck's worked examples, the order of question and image, low-rank weights, what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from steps import shape, step

from pruneval import methods
from pruneval.harness import measure, subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.conformance import CHECKS, Case, verdicts
from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.bottleneck import beta, divergence, drawn, fresh, information, posterior


def tensors(width: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random bottleneck whose networks matter."""
    found = fresh(width, torch.Generator().manual_seed(seed))
    return {name: each * (1 if each.ndim == 1 else 4) for name, each in found.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ifprune") / "bottleneck.safetensors"
    save_file(tensors(), path)
    return path


# The bottleneck


@pytest.mark.parametrize("mean, variance, nats", [(1.0, 1.0, 0.5), (0.0, 1.0, 0.0), (0.5, 0.5, 0.22157)])
def test_the_cards_divergences(mean, variance, nats):
    found = divergence(torch.tensor([mean]), torch.tensor([variance]).log(), torch.zeros(1), torch.zeros(1))
    assert float(found) == pytest.approx(nats, abs=1e-5)


def test_it_is_torchs_divergence_of_normals():
    generator = torch.Generator().manual_seed(0)
    mean, logvar, prior, prior_logvar = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(prior, (prior_logvar / 2).exp())
    ).mean(-1)
    torch.testing.assert_close(divergence(mean, logvar, prior, prior_logvar), expected)


def test_a_gate_that_says_nothing_goes_half_way():
    mean, logvar = posterior(
        {name: torch.zeros_like(each) for name, each in fresh(3).items()}, torch.tensor([[2.0, 4.0, -2.0]])
    )
    assert mean.tolist() == [[1, 2, -1]] and logvar.tolist() == [[0, 0, 0]]


def test_states_at_the_prior_say_nothing():
    """All scores equal: the first tokens stay."""
    bottleneck = {name: torch.zeros_like(each) for name, each in fresh(2).items()} | {"prior.mean": torch.ones(2)}
    states = torch.ones(6, 2)
    assert information(bottleneck, states).tolist() == [0] * 6


def test_log_variances_are_clamped():
    bottleneck = fresh(2) | {"logvar.2.bias": torch.tensor([50.0, -50.0])}
    assert posterior(bottleneck, torch.zeros(1, 2))[1].tolist() == [[10, -10]]


def test_what_is_drawn_has_the_posteriors_moments():
    mean, logvar = torch.full((20000,), 2.0), torch.full((20000,), 4.0).log()
    found = drawn(mean, logvar, torch.Generator().manual_seed(0))
    assert float(found.mean()) == pytest.approx(2, abs=0.05) and float(found.std()) == pytest.approx(2, abs=0.05)


def test_the_cards_schedule():
    assert [beta(at, 200) for at in (0, 100, 200, 999)] == pytest.approx([0.5, 0.35, 0.2, 0.2])


# The method


def test_counts(checkpoint):
    method = methods.build("ifprune", {"checkpoint": str(checkpoint)})
    assert method.counts(shape(48), 1792) == {0: 89}
    for preset, given in methods.method_class("ifprune").presets.items():
        if "llava" in preset:
            plan = methods.build("ifprune", given).schedule(shape(), 576)
            assert plan == [int(preset.split("@")[1])] * 32


def test_most_information_stays(checkpoint):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 64, generator=generator)
    scores = information(tensors(), hidden[2:8])
    view = SimpleNamespace(hidden=hidden, visual=torch.arange(2, 8))
    method = methods.build("ifprune", {"checkpoint": str(checkpoint), "keep": 0.5})
    kept = method.reduce(step(1, 6, 2, helping=lambda: view)).keep.tolist()
    assert kept == [0, *sorted(1 + index for index in scores.topk(3).indices.tolist()), 7, 8]


def scores_of(sample, checkpoint, **given) -> torch.Tensor:
    found, model = [], tiny("llava")
    kind = methods.method_class("ifprune")

    class Seen(kind):
        def score(self, step):
            found.append(kind.score(self, step))
            return found[-1]

    method = Seen(checkpoint=str(checkpoint), keep=0.5, **given)
    with torch.no_grad(), pruned(model, method, adapter=subjects.adapter(model)):
        model(**sample)
    return found[0]


def test_scores_know_the_question(checkpoint):
    sample = subject("llava").samples[0]
    other = sample | {"input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    assert not torch.allclose(scores_of(sample, checkpoint), scores_of(other, checkpoint))


def test_low_rank_weights_of_the_checkpoint_are_used(checkpoint, tmp_path):
    sample, generator = subject("llava").samples[0], torch.Generator().manual_seed(0)
    name = "lora.layers.0.self_attn.v_proj"
    lora = {
        f"{name}.down": torch.randn(2, 64, generator=generator),
        f"{name}.up": torch.randn(2, 32, generator=generator),
    }
    save_file(tensors() | lora, tmp_path / "tuned")
    assert not torch.allclose(scores_of(sample, tmp_path / "tuned"), scores_of(sample, checkpoint))
    save_file(tensors() | {key: each * 0 for key, each in lora.items()}, tmp_path / "none")
    torch.testing.assert_close(scores_of(sample, tmp_path / "none"), scores_of(sample, checkpoint))
    lora.popitem()
    save_file(tensors() | lora, tmp_path / "half")
    with pytest.raises(MethodError, match=r"needs its \.down and its \.up"):
        methods.build("ifprune", {"checkpoint": str(tmp_path / "half")}).needs(shape())


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_engines_promises(family, checkpoint):
    found = list(verdicts(Case("ifprune", subject(family), given=(("checkpoint", str(checkpoint)), ("layer", 1)))))
    assert [verdict for verdict in found if verdict.status == "fail"] == []
    assert {verdict.check for verdict in found if verdict.status == "pass"} == set(CHECKS) - {"tower"}


def test_what_does_not_fit_is_one_line(checkpoint, tmp_path):
    model = tiny("llava")
    adapter = subjects.adapter(model)
    assert "ifprune: it was trained, and needs its weights" in adapter.supports(methods.build("ifprune"))
    trained = methods.build("ifprune", {"checkpoint": str(checkpoint)})
    assert "needs a helper model" in adapter_for(model).supports(trained)
    for name, given, text in (
        ("narrow", tensors(32), "layer 0 takes 32 features, not 64"),
        ("empty", {"prior.mean": torch.zeros(64)}, "holds prior.mean, prior.logvar, gate"),
    ):
        save_file(given, tmp_path / name)
        method = methods.build("ifprune", {"checkpoint": str(tmp_path / name)})
        with torch.no_grad(), pytest.raises(MethodError, match=text), pruned(model, method, adapter=adapter):
            model(**subject("llava").samples[0])
    lora = {"lora.layers.7.mlp.up_proj.down": torch.zeros(1, 64), "lora.layers.7.mlp.up_proj.up": torch.zeros(1, 96)}
    save_file(tensors() | lora, tmp_path / "deep")
    method = methods.build("ifprune", {"checkpoint": str(tmp_path / "deep")})
    with torch.no_grad(), pytest.raises(UserError, match=r"no layer layers\.7"), pruned(model, method, adapter=adapter):
        model(**subject("llava").samples[0])


def test_keeping_all_does_not_ask_the_helper(checkpoint):
    method = methods.build("ifprune", {"checkpoint": str(checkpoint), "keep": 1})
    assert method.reduce(step(1, 6, 2)) is None
    with pytest.raises(MethodError, match="no helper was asked for"):
        methods.build("ifprune", {"checkpoint": str(checkpoint), "keep": 0.5}).reduce(step(1, 6, 2))


def test_costs_are_declared_without_weights():
    """What the bottleneck computes is then not counted, and said so."""
    found = measure.implied("llava-1.5-7b", "ifprune", {"keep": 64 / 576}, helper="llava-1.5-7b")
    assert found["per_layer"] == [64] * 32 and found["helper_tflops"] > 0
    assert "what the method was trained for: no checkpoint was given" in found["not_counted"]
    assert methods.build("ifprune").needs(shape())[0].helper.lora is None
