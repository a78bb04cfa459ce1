"""`pruneval bench`: the contest, what it measures, and what it leaves alone."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from pruneval import methods
from pruneval.harness import backend, bench, cli, contests, kv_cache, latency, subjects, unweighted
from pruneval.harness.adapters import adapter_for
from pruneval.harness.backend import Contestant, Runner
from pruneval.harness.dimensions import Input, load, names
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.errors import UserError
from pruneval.harness.workload import workload
from pruneval.methods.base import Card, Method, Needs
from pruneval.reports.bench import to_markdown

SLOW = 0.05


@dataclass(frozen=True)
class Sleeper(Method):
    """Does nothing, slowly."""

    card: ClassVar[Card] = Card("sleeper", "Sleeper", seam=("layer",), summary="Sleeps before layer 1.")

    def needs(self, shape):
        return {1: Needs()}

    def schedule(self, shape, n):
        return [n] * shape.layers

    def reduce(self, step):
        time.sleep(SLOW)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    """The whole command on pocket-llava, once."""
    out = tmp_path_factory.mktemp("measured") / "bench.json"
    words = "bench --model pocket-llava --method fastv --method gsearch --keep 0.5 --rounds 3 --warm-up 0 --energy"
    assert cli.main([*words.split(), "--new-tokens", "3", "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())


# Models and prompts


@pytest.mark.parametrize("size", [(1.0, 1.0), (0.125, 0.5), (0.0625, 0.25)], ids=str)
@pytest.mark.parametrize("name", names())
def test_a_model_built_from_dimensions_has_them(name, size):
    wanted = unweighted.scaled(load(name), *size)
    found = dimensions_of(unweighted.config_of(wanted), wanted.name)
    plain = {"input": Input(), "published_params": (), "text_tower": None}
    assert replace(found, **plain) == replace(wanted, **plain)


def test_too_small_a_model_is_refused():
    with pytest.raises(UserError, match="leave nothing"):
        unweighted.scaled(load("llava-1.5-7b"), 0.01)
    with pytest.raises(UserError, match="must be in"):
        unweighted.scaled(load("llava-1.5-7b"), 2)


@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_prompts_have_the_lengths_asked_for(family):
    adapter = adapter_for(subjects.tiny(family))
    prompts = workload(adapter, 40, text=9, batch=2)
    ids = prompts.inputs["input_ids"]
    assert ids.shape == (2, prompts.visual + 9)
    assert adapter.visual_mask(ids).sum(1).tolist() == [prompts.visual] * 2
    assert 20 <= prompts.visual <= 60
    with torch.no_grad():
        out = adapter.model.generate(**prompts.inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 2
    with pytest.raises(UserError, match="at least 4"):
        workload(adapter, 40, text=3)


# The contest


def test_contestants_take_turns():
    order = []

    def runner(name):
        return SimpleNamespace(measure=lambda: order.append(name) or {"prefill": 1.0, "decode": 1.0, "generate": 2.0})

    found = latency.contest([runner("a"), runner("b"), runner("c")], 3)
    assert "".join(order) == "abccbaabc"
    assert [len(one["prefill"]) for one in found] == [3, 3, 3]


def test_a_ratio_says_what_its_interval_shows():
    base = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert latency.speedup(base, [0.5 * one for one in base])["verdict"] == "faster"
    slower = latency.speedup(base, [2 * one for one in base])
    assert (slower["verdict"], slower["ratio"]) == ("slower", 0.5)
    noise = latency.speedup(base, [0.9, 1.1, 1.0, 0.95, 1.05])
    assert noise["verdict"] == "no difference shown"
    assert noise["low"] < 1 < noise["high"]
    with pytest.raises(ValueError, match="paired"):
        latency.speedup(base, base[:3])


def test_quartiles_surround_the_median():
    assert latency.spread([1, 2, 3, 4, 5]) == {"median": 3, "low": 2, "high": 4}


def test_optimum_benchmark_leaves_transformers_as_it_was():
    tools = backend.optimum()
    assert tools.Scenario.__module__.startswith("optimum_benchmark")
    assert not hasattr(sys.modules["transformers"], "SpecialTokensMixin")


def _runner(model, method, kernel="sdpa", **sizes):
    inputs = workload(adapter_for(model), sizes.pop("visual", 16), text=8, **sizes).inputs
    runner = Runner(model, inputs, Contestant("one", method, kernel), 3)
    runner.warm_up(0)
    return runner


def test_a_runner_times_a_generation_and_leaves_no_trace():
    model = subjects.tiny("llava")
    before = dict(model.__dict__), model.config._attn_implementation
    runner = _runner(model, methods.build("fastv", {"layer": 1}))
    seconds = runner.measure()
    assert 0 < seconds["prefill"] < seconds["generate"]
    assert seconds["prefill"] + 2 * seconds["decode"] == pytest.approx(seconds["generate"], rel=0.1)
    assert (dict(model.__dict__), model.config._attn_implementation) == before
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_the_split_says_where_the_time_goes():
    model = subjects.tiny("llava")
    adapter = adapter_for(model)
    runners = [_runner(model, None), _runner(model, Sleeper())]
    plain, slow = latency.parts(runners, adapter, 3, lambda: None)
    assert plain["selection"] < SLOW < slow["selection"] < slow["prefill"]
    assert slow["upkeep"] < SLOW
    for part in (plain, slow):
        assert 0 < part["vision"] < part["prefill"]
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert "get_image_features" not in model.model.__dict__


def test_a_slow_down_is_called_one():
    model = subjects.tiny("llava")
    base, slow = latency.contest([_runner(model, None), _runner(model, Sleeper())], 5)
    assert latency.speedup(base["prefill"], slow["prefill"])["verdict"] == "slower"


def test_the_kernel_is_that_of_the_contestant():
    model = subjects.tiny("llava")
    one = backend.Backend(model, {}, Contestant("x", None, "eager"))
    with one.ready():
        assert model.config.text_config._attn_implementation == "eager"
    with backend.Backend(model, {}, Contestant("x", None, "sdpa")).ready() as session:
        assert session is None
        assert model.config.text_config._attn_implementation == "sdpa"


def test_energy_is_measured_or_refused_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "RAPL", str(tmp_path))
    assert "can't be read" in backend.no_energy("cpu", True)
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1")
    assert backend.no_energy("cpu", True) is None
    assert "codecarbon" in backend.no_energy("cuda", False)
    assert backend.no_energy("cuda", True) is None
    assert "mps" in backend.no_energy("mps", True)


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    model = subjects.tiny("llava")
    prompts = workload(adapter_for(model), 16, text=8)
    one = SimpleNamespace(adapter=adapter_for(model))
    setting = contests.Setting(16, 8, 1, 3, None)

    def full(self, runs):
        if self.contestant.method is not None:
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    monkeypatch.setattr(Runner, "warm_up", full)
    line, left_out = [Contestant("vanilla", None, "sdpa"), Contestant("slow", Sleeper(), "sdpa")], []
    runners = contests._warmed(one, prompts, line, setting, 0, left_out, lambda: None)
    assert [runner.contestant.name for runner in runners] == ["vanilla"]
    assert left_out == [{"method": "slow", "reason": "does not fit: tried to allocate 7 GiB"}]


# The command


def test_the_document_holds_every_number_and_where_it_comes_from(pocket):
    assert pocket["machine"]["cpus"] and pocket["machine"]["threads"] and "load_before" in pocket["machine"]
    assert "optimum-benchmark" in pocket["protocol"]["tool"] and "interleaved" in pocket["protocol"]["order"]
    (setting,) = pocket["settings"]
    assert (setting["visual"], setting["text"], setting["batch"], setting["new_tokens"]) == (144, 75, 1, 3)
    assert [row["method"] for row in setting["left_out"]] == ["gsearch"]
    rows = {row["name"]: row for row in setting["contestants"]}
    vanilla, fastv = rows["vanilla"], rows["fastv(layer=2,keep=0.5,rows=last)"]
    assert len(fastv["seconds"]["prefill"]) == 3
    assert fastv["implied"]["avg_in"] == (2 * 144 + 6 * 72) / 8
    against = fastv["against"]["vanilla"]
    assert against["flops_ratio"] == vanilla["implied"]["tflops"] / fastv["implied"]["tflops"] > 1
    assert {"ratio", "low", "high", "verdict"} == set(against["prefill"])
    for row in rows.values():
        for phase in ("prefill", "end"):
            cache = row["kv_cache"][phase]
            assert cache["true"] == cache["formula"]
            assert cache["resident"] == sum(cache["true"])
        assert sum(row["kv_cache"]["end"]["true"]) - sum(row["kv_cache"]["prefill"]["true"]) == 2 * 8 * 2 * 160 * 4
    assert sum(fastv["kv_cache"]["prefill"]["true"]) < sum(vanilla["kv_cache"]["prefill"]["true"])
    assert not fastv["energy"]["available"] or fastv["energy"]["watt_hours"] > 0


def test_the_table_names_slow_downs_spread_and_a_busy_machine(pocket):
    setting = pocket["settings"][0]
    row = setting["contestants"][-1]
    row["against"]["vanilla"]["prefill"] = {"ratio": 0.8, "low": 0.7, "high": 0.9, "verdict": "slower"}
    text = to_markdown(pocket, setting)
    assert "0.80x [0.70, 0.90], slower" in text
    assert "left out: gsearch" in text
    assert "vanilla" in text and "FLOPs ratio (implied)" in text
    busy = {**pocket, "machine": {**pocket["machine"], "load_before": 99.0}}
    assert "Not for quoting" in to_markdown(busy, setting)
    row["kv_cache"]["prefill"]["formula"] = [0]
    assert "formula differs" in to_markdown(pocket, setting)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model llava-1.5-7 --no-weights", "unknown model 'llava-1.5-7'; did you mean 'llava-1.5-7b'"),
        ("--model llava-1.5-7b --no-weights --method fsatv", "did you mean 'fastv'"),
        ("--model llava-1.5-7b --no-weights --width 2", "width and depth"),
        ("--model llava-1.5-7b --width 0.5", "go with --no-weights"),
        ("--model llava-1.5-7b --no-weights --new-tokens 1", "--new-tokens must be at least 2"),
        ("--model llava-1.5-7b --no-weights --batch 0", "--batch must be at least 1"),
        ("--model llava-1.5-7b --no-weights --rounds 2", "--rounds must be at least 3"),
        ("--model llava-1.5-7b --no-weights --keep 1.5", "--keep takes numbers"),
        ("--model llava-1.5-7b --no-weights --set keep=0.5", "--set goes with one --method"),
        ("--model llava-1.5-7b --no-weights --kernel sdp", "did you mean 'sdpa'"),
        ("--no-weights", "--model"),
    ],
)
def test_nonsense_is_one_clear_line(words, message, capsys):
    assert cli.main(["bench", *words.split()]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_a_method_without_a_knob_says_so():
    built, left_out = bench.plan(["fastv", "vtw", "gsearch"], {}, 0.25)
    assert built[0].params["keep"] == 0.25
    assert {row["method"] for row in left_out} >= {"gsearch"}
    assert all(row["reason"] for row in left_out)


def test_cache_bytes_are_read_from_the_tensors():
    layers = [SimpleNamespace(keys=torch.zeros(1, 2, 10, 4)[:, :, :3], values=torch.zeros(1, 2, 3, 4))]
    cache = SimpleNamespace(layers=layers)
    assert kv_cache.held(cache) == [2 * (2 * 3 * 4) * 4]
    assert kv_cache.resident(cache) == [(2 * 10 * 4 + 2 * 3 * 4) * 4]  # a view keeps what it was cut from
