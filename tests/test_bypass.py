"""A budget of all visual tokens changes nothing: every method in, behind or beside the vision tower, on pocket-llava.

By the path a user takes (cells, lmms-eval, records), and logit by logit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pruneval import methods
from pruneval.harness import models, records, run, subjects
from pruneval.harness.cases import Case, Subject
from pruneval.harness.conformance import CHECKS, verdicts
from pruneval.harness.subjects_real import subject_of
from pruneval.methods.bottleneck import fresh

MODEL = "pocket-llava"
OTHERS = ("deco", "tokenpacker", "dycoke", "framefusion", "prunevid")
"""Put a trained projector in the place of the model's, or are for videos."""
NAMES = [
    name
    for name in methods.names()
    if name not in OTHERS and ({"pixels", "vision", "embed"} & set(methods.card(name).seam) or name == "sgp")
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with pocket-llava's tower and tokens and two layers of language model, and a bottleneck for it."""
    folder = tmp_path_factory.mktemp("small")
    loaded = models.load(MODEL, "cpu", "float32", None)
    config = copy.deepcopy(loaded.model.config)
    config.text_config.num_hidden_layers = 2
    torch.manual_seed(0)
    type(loaded.model)(config).save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    save_file(fresh(config.text_config.hidden_size), folder / "bottleneck")
    return folder


def given(name: str, small: Path) -> dict[str, Any]:
    """What a method needs besides its budget."""
    helper = {"helper": str(small)}
    needed = {"sgp": helper, "ifprune": helper | {"checkpoint": str(small / "bottleneck")}, "rcom": {"count": "keep"}}
    return needed.get(name, {})


def test_every_family_of_methods_is_among_them():
    assert {"visionzip", "prumerge", "vflowopt", "flowcut", "tome", "resize", "avgpool", "trim", "ifprune"} < set(NAMES)
    assert len(NAMES) >= 21


def test_answers_are_vanillas(small, tmp_path):
    located = models.locate(MODEL)
    built = [run.build_method("vanilla")]
    built += [run.build_method(name, {"keep": 1, **given(name, small)}) for name in NAMES]
    built.append(run.build_method("uniform", {"keep": 0.02}))  # so that the questions can tell
    cells = run.expand(located, built, ["pocket-textvqa"], limit=4)
    found, missed = run.run_cells(cells, tmp_path, lambda: models.load(located, "cpu", "float32", None))
    assert not missed and [record.spec.method for record in found] == ["vanilla", *NAMES, "uniform"]
    tables = [records.read_samples(tmp_path / record.spec.hash, record) for record in found]
    expected = list(tables[0].answer)
    assert list(tables[-1].answer) != expected
    for name, table in zip(NAMES, tables[1:-1], strict=True):
        assert list(table.answer) == expected, name
        assert set(table.avg_in) == {144.0} and set(table.final) == {144.0}, name


@pytest.fixture(scope="module")
def pocket(small: Path) -> Subject:
    """pocket-llava with four prompts, its CLIP and the small model."""
    return subject_of(MODEL, str(small))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_vanillas(name, small, pocket):
    CHECKS["keep=1"](Case(name, pocket, given=tuple(given(name, small).items())))


@pytest.mark.parametrize("family", subjects.FAMILIES)
def test_logits_are_vanillas_on_every_family(family, small, tmp_path):
    save_file(fresh(64), tmp_path / "bottleneck")
    checked = []
    for name in NAMES:
        needed = {"ifprune": {"checkpoint": str(tmp_path / "bottleneck")}, "rcom": {"count": "keep"}}.get(name, {})
        case = Case(name, subjects.subject(family), given=tuple(needed.items()))
        (verdict,) = verdicts(case, {"keep=1": CHECKS["keep=1"]})
        assert verdict.status in ("pass", "n/a"), (name, verdict.note)
        checked += [name] * (verdict.status == "pass")
    assert {"visionzip", "prumerge", "vflowopt", "sgp", "ifprune", "resize"} <= set(checked)
