"""Studies: strict files, the cells they expand to, and a sweep that goes on."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruneval.harness import cli, runner, study
from pruneval.harness.errors import UserError

GOOD = {
    "models": ["pocket-llava"],
    "methods": ["random", {"fastv": {"layer": 1}}, {"pact": {"keep": 0.2}}],
    "budgets": [{"keep": 0.5}, {"avg_in": 48}],
    "benchmarks": ["pocket-mme", "pocket-pope"],
    "limit": 4,
}


def test_a_study_expands_to_methods_budgets_and_benchmarks():
    (plan,) = study.plans(study.parse(GOOD))
    signatures = [cell.spec.method_signature for cell in plan.cells[: len(plan.cells) // 2]]
    assert len(plan.cells) == 2 * (1 + 2 + 2 + 1) and plan.refused == []
    assert signatures[0] == "vanilla" and sum(text.startswith("pact") for text in signatures) == 1
    assert sum("fastv(layer=1" in text for text in signatures) == 2
    assert {cell.spec.limit for cell in plan.cells} == {4}


def test_a_suite_is_its_pocket_editions_on_a_pocket_model():
    read = study.parse({**GOOD, "benchmarks": ["pocket-gqa"], "suites": ["core5", "gsearch12"]})
    found = [cell.spec.benchmark for cell in study.plans(read)[0].cells]
    assert list(dict.fromkeys(found))[:5] == [
        "pocket-gqa",
        "pocket-mme",
        "pocket-pope",
        "pocket-scienceqa",
        "pocket-textvqa",
    ]
    assert all(name.startswith("pocket-") for name in found)
    assert read.asked(pocket=False)[1:3] == ["mme", "gqa"]


def test_a_budget_that_cannot_be_met_is_refused_with_its_reason():
    (plan,) = study.plans(study.parse({**GOOD, "methods": ["st3", "random"], "budgets": [{"avg_in": 48}]}))
    assert plan.refused[0][0] == "st3 at avg_in=48" and "can't be reached" in plan.refused[0][1]
    assert {cell.spec.method for cell in plan.cells} == {"vanilla", "random"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["fastv"]}, "unknown key of a study 'method'; did you mean 'methods'"),
        ({"methods": ["fsatv"]}, "did you mean 'fastv'"),
        ({"methods": [{"fastv": {"kep": 1}}]}, "kep"),
        ({"methods": [{"fastv": {"keep": 7}}]}, "keep must be in (0, 1]"),
        ({"methods": {"fastv": {}}}, "methods of a study must be a list"),
        ({"methods": []}, "needs methods"),
        ({"models": []}, "needs models"),
        ({"benchmarks": ["pocket-mne"]}, "did you mean 'pocket-mme'"),
        ({"benchmarks": []}, "needs benchmarks or suites"),
        ({"budgets": [{"avg_im": 3}]}, "did you mean 'avg_in'"),
        ({"budgets": [{"keep": 2}]}, "must be at most 1"),
        ({"budgets": [{"avg_in": "many"}]}, "must be a number above 0"),
        ({"limit": 0}, "limit of a study must be a whole number of at least 1"),
        ({"limit": True}, "limit of a study must be a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change, message):
    with pytest.raises(UserError) as caught:
        study.parse({**GOOD, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _mutations():
    """A study with one place replaced, removed or renamed by anything."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
        max_leaves=4,
    )
    return st.tuples(st.sampled_from([*GOOD, "suites", "seed", ""]), st.integers(0, 3), anything)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_mutations())
def test_mutated_studies_end_in_a_study_or_a_line(mutation):
    key, place, value = mutation
    data = copy.deepcopy(GOOD)
    target = data.get(key)
    if isinstance(target, list) and place < len(target):
        target[place] = value
    else:
        data[key] = value
    with contextlib.suppress(UserError):
        assert isinstance(study.parse(data), study.Study)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_files_that_are_no_study_end_in_a_line(content):
    path = Path(_folder()) / "study.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError):
        study.read(path)


def _folder() -> str:
    import tempfile

    return tempfile.mkdtemp()


def test_a_sweep_does_nothing_twice_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "methods": ["random"], "budgets": [{"keep": 0.5}]}))
    asked = []
    real = runner._evaluate

    def sometimes(loaded, method, benchmark, **options):
        asked.append((method.card.name, benchmark.name))
        if asked[-1] == ("random", "pocket-mme") and asked.count(asked[-1]) == 1:
            raise RuntimeError("out of luck")
        return real(loaded, method, benchmark, **options)

    monkeypatch.setattr(runner, "_evaluate", sometimes)
    argv = ["sweep", str(path), "--out", str(tmp_path / "runs")]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "4 cells on pocket-llava, 4 to run" in capsys.readouterr().out
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert "3 of 4 cells" in said.out and "RuntimeError: out of luck" in said.err and "Traceback" not in said.err
    assert cli.main(argv) == 0
    assert len(asked) == 5 and asked[-1] == ("random", "pocket-mme")
