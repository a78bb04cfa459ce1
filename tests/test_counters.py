"""calflops and torch beside the ledger; the kernel that hides attention from them is never counted under."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from calflops import calculate_flops

from pruneval.harness import cli, counters, subjects
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.errors import UserError
from pruneval.harness.flops import ledger, lengths_of

ALL = ("patch_embedding", "vision_linear", "projector", "llm_linear", "head_all")


@pytest.fixture
def model():
    return subjects.tiny("llava")


@pytest.fixture
def inputs():
    sample = subjects.subject("llava").samples[0]
    return {name: part.double() if part.is_floating_point() else part for name, part in sample.items()}


def test_calflops_does_not_see_attention_under_sdpa(model, inputs):
    """The fact behind the switch: its count is then the ledger's without any attention."""
    with torch.no_grad(), redirect_stdout(io.StringIO()):
        _, blind, _ = calculate_flops(model, kwargs=dict(inputs), print_results=False, output_as_string=False)
    dimensions = dimensions_of(model.config)
    visual = int((inputs["input_ids"] == subjects.IMAGE).sum())
    whole = ledger(dimensions, lengths_of(dimensions, text=inputs["input_ids"].shape[1] - visual))
    attention = whole.total("vision_attention", "llm_attention_square")
    assert attention > 0.02 * blind
    assert blind == pytest.approx(whole.total(*ALL), rel=1e-3)
    assert counters.calflops_count(model, inputs).macs == pytest.approx(blind + attention, rel=1e-3)


def test_the_switch_is_said_and_undone(model, inputs):
    config = model.config
    before = [part._attn_implementation for part in (config, config.text_config, config.vision_config)]
    for count in (counters.calflops_count(model, inputs), counters.torch_count(model, inputs)):
        assert "eager kernel: sdpa" in count.note
    assert [part._attn_implementation for part in (config, config.text_config, config.vision_config)] == before
    assert counters.calflops_count(subjects.tiny("llava", "eager"), inputs).note == "eager kernel"


def test_inputs_that_crash_calflops_are_named(model, inputs):
    with pytest.raises(UserError, match="tensors only, not use_cache"):
        counters.calflops_count(model, inputs | {"use_cache": False})


@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_three_counters_agree(family):
    ours, torchs, calflops = counters.compare(family, "fastv")
    assert torchs.macs == pytest.approx(ours.macs, rel=1e-3)
    assert calflops.macs == pytest.approx(ours.macs, rel=1e-3)


def test_the_command_says_all_of_it(capsys):
    assert cli.main(["measure", "--check", "internvl", "--method", "random"]) == 0
    text = capsys.readouterr().out
    for word in ("ledger", "torch.utils.flop_counter", "calflops", "sdpa", "eager"):
        assert word in text
    assert cli.main(["measure", "--check", "internvl", "--method", "random", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["counter"] == "ledger"
    assert cli.main(["measure", "--check", "qwen3_vl", "--method", "tome"]) == 2
