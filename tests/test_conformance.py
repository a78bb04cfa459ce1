"""The conformance checks pass on the engine, and each catches the fault it is there for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from pruneval import methods
from pruneval.harness import cli, prefill, session, stream, subjects
from pruneval.harness.adapters import Adapter
from pruneval.harness.check import FAMILIES, to_text
from pruneval.harness.conformance import CHECKS, Broken, Case, NotApplicable, Verdict, verdicts
from pruneval.methods.base import Card, Needs, Positions, Ranking, Reduction, Shape, Step, kept

LLAVA = "llava"


def failed(name: str = "fastv", **given) -> dict[str, str]:
    """Which promises are found broken on the tiny LLaVA, and what was seen."""
    case = Case(name, subjects.subject(LLAVA), given=tuple(given.items()))
    return {verdict.check: verdict.note for verdict in verdicts(case) if verdict.status == "fail"}


def test_families_are_those_of_the_subjects_and_the_adapters():
    from pruneval.harness.adapters import ADAPTERS

    assert list(FAMILIES) == list(subjects.FAMILIES)
    assert set(FAMILIES) == set(ADAPTERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_promises_hold_on_every_family(family):
    """One method per seam here; `pruneval check --all` walks the whole registry."""
    subject = subjects.subject(family)
    for name in ("random", "fastv"):
        found = list(verdicts(Case(name, subject)))
        assert [verdict for verdict in found if verdict.status == "fail"] == []
        assert {verdict.check for verdict in found if verdict.status == "pass"} >= set(CHECKS) - {"reversal", "tower"}


def test_a_pair_that_is_not_supported_says_why():
    (verdict,) = verdicts(Case("fastv", subjects.subject(LLAVA), given=(("layer", 99),)))
    assert (verdict.check, verdict.status) == ("*", "n/a") and "between 0 and 3" in verdict.note


# One planted fault per promise


def test_a_layer_that_runs_twice_is_caught(monkeypatch):
    enter = prefill.Prefill.enter

    def twice(self, index, hidden, kwargs):
        if index == 1:
            layer = self.session.adapter.decoder_layers[1]
            hooks, layer._forward_pre_hooks = layer._forward_pre_hooks, {}
            rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")}
            layer(hidden, **rest)
            layer._forward_pre_hooks = hooks
        return enter(self, index, hidden, kwargs)

    monkeypatch.setattr(prefill.Prefill, "enter", twice)
    with pytest.raises(Broken, match=r"not 1: \{1: 2\}"):
        CHECKS["once"](Case("fastv", subjects.subject(LLAVA)))


def test_tokens_computed_in_the_tower_against_the_trace_are_caught(monkeypatch):
    attend = Adapter.attend

    def padded(self, layer, hidden, mask):
        return attend(self, layer, torch.nn.functional.pad(hidden, (0, 0, 0, 1)), None)[:, :-1]

    assert failed("tome") == {}
    monkeypatch.setattr(Adapter, "attend", padded)
    assert "the trace says" in failed("tome")["tower"]


def test_a_cache_one_too_long_is_caught(monkeypatch):
    finish = prefill.Prefill.finish

    def longer(self):
        finish(self)
        if self.cache is not None:
            layer = self.cache.layers[2]
            layer.keys = torch.cat([layer.keys, layer.keys[..., -1:, :]], dim=-2)
            layer.values = torch.cat([layer.values, layer.values[..., -1:, :]], dim=-2)

    monkeypatch.setattr(prefill.Prefill, "finish", longer)
    found = failed()
    assert "layer 2 caches" in found["cache"]


def test_positions_renumbered_by_mistake_are_caught(monkeypatch):
    rotation = stream.Stream.rotation

    def renumbered(self, hidden):
        self.position = torch.arange(self.layout.width).expand_as(self.position)
        return rotation(self, hidden)

    monkeypatch.setattr(stream.Stream, "rotation", renumbered)
    found = failed()
    assert "rotation is not that of the layout" in found["positions"]
    assert "dropping against masking" in found["masking"]


def test_dropped_text_is_caught(monkeypatch):
    monkeypatch.setattr(prefill.Prefill, "_checked", lambda self, result, tokens: result)
    keep = Step.keep

    def greedy(self, chosen):
        return Reduction(keep(self, chosen).keep[1:])

    monkeypatch.setattr(Step, "keep", greedy)
    assert "text tokens are missing" in failed()["text"]


def test_a_hook_left_behind_is_caught(monkeypatch):
    install = session.Session.install
    left = []

    def careless(self, stack):
        install(self, stack)
        left.append(self.adapter.decoder_layers[0].register_forward_hook(lambda *_: None))

    monkeypatch.setattr(session.Session, "install", careless)
    try:
        assert "after the block" in failed()["restored"]
    finally:
        for handle in left:
            handle.remove()


@dataclass(frozen=True)
class Planted(Ranking):
    """A ranking with faults to choose from."""

    card: ClassVar[Card] = Card("planted", "Planted", seam=("layer",), summary="")
    keep: float = 0.4
    fault: str = ""
    position_mode: Positions = "original"

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {1: Needs(attention=(0,))}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        return {1: kept(n, self.keep)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [n - (self.fault == "schedule"), *super().schedule(shape, n)[1:]]

    def score(self, step: Step) -> torch.Tensor:
        score = step.seen[0].received([-1]).mean(0)[step.visual]
        if self.fault == "state":
            CALLS.append(1)
            return score.roll(len(CALLS))
        if self.fault == "constant":
            return torch.zeros_like(score)
        if self.fault == "batch":
            return score * torch.cos(torch.arange(len(score)) * len(CALLS))
        return score

    def reduce(self, step: Step) -> Reduction | None:
        if self.fault == "keep-all" and self.keep == 1:
            return step.keep(torch.arange(len(step.visual) - 1))
        return super().reduce(step)


CALLS: list[int] = []


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "planted", "Planted")
    ours = methods.method_class
    monkeypatch.setattr(methods, "method_class", lambda name: Planted if name == "planted" else ours(name))
    CALLS.clear()


@pytest.mark.parametrize(
    "fault, check, message",
    [
        ("state", "state", "another answer to the same prompt"),
        ("constant", "reversal", "the same tokens are kept"),
        ("schedule", "budget", "declared"),
        ("keep-all", "keep=1", "differ from the plain model"),
    ],
)
def test_faults_of_a_method_are_caught(planted, fault, check, message):
    assert failed("planted") == {}
    assert message in failed("planted", fault=fault)[check]


def test_a_batch_that_answers_differently_is_caught(monkeypatch):
    gather = stream.Stream.gather

    def shifted(self, hidden, keep, starts):
        out = gather(self, hidden, keep, starts)
        return out.roll(1, dims=0) if len(keep) > 1 else out

    monkeypatch.setattr(stream.Stream, "gather", shifted)
    assert "batch against single prompts" in failed()["batch"]


def test_kernels_that_disagree_are_caught(monkeypatch):
    build = stream.Stream._build_mask

    def open_mask(self, queries, keys, dtype):
        mask = build(self, queries, keys, dtype)
        return None if self.kernel == "eager" else mask

    monkeypatch.setattr(stream.Stream, "_build_mask", open_mask)
    assert "sdpa against eager" in failed()["kernels"]


def test_text_prompts_that_are_touched_are_caught(monkeypatch):
    start = prefill.Prefill._start

    def touched(self, hidden, *rest):
        start(self, hidden, *rest)
        if not bool(self.visual.any()):
            hidden.mul_(1.5)

    monkeypatch.setattr(prefill.Prefill, "_start", touched)
    assert "text-only prompt is answered differently" in failed()["text-only"]


# The table


def test_the_table_leaves_no_hole_unexplained():
    found = [
        Verdict("a", "m", "keep=1", "pass"),
        Verdict("a", "m", "cache", "fail", "layer 2 caches 9"),
        Verdict("b", "m", "*", "n/a", "needs a CLS token"),
    ]
    text = to_text(found)
    assert "FAIL a/cache: layer 2 caches 9" in text and "b/all: needs a CLS token" in text
    assert text.endswith("1 passed, 1 failed, 1 not applicable (reasons above)")


def test_the_command_answers_with_its_exit_code(capsys):
    assert cli.main(["check", "--method", "vanilla", "--family", "llava", "--jobs", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in rows} == {"pass", "n/a"} and len(rows) == len(CHECKS)
    for argv, message in (
        (["check"], "say what to check"),
        (["check", "--method", "fastv", "--family", "lava"], "did you mean 'llava'?"),
        (["check", "--method", "fsatv"], "did you mean 'fastv'?"),
    ):
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err


def test_not_applicable_reasons_are_kept():
    with pytest.raises(NotApplicable, match=r"renumbers|merges"):
        CHECKS["masking"](Case("visionzip", subjects.subject(LLAVA)))
