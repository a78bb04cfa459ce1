"""What cards say of methods in, behind or beside the vision tower, against the index of their specifications."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pruneval import methods
from pruneval.harness.cli import main

BASELINES = ("random", "uniform", "avgpool", "cls_topk", "resize")
INDEX = {  # where tokens go, then: m merges, o leaves the order, q reads the question, c calibrated or trained
    "random": ("embed", ""),
    "uniform": ("embed", ""),
    "avgpool": ("embed", "m"),
    "resize": ("pixels", ""),
    "cls_topk": ("embed", ""),
    "flowcut": ("vision layer", "q"),  # its second stage looks from the last token
    "vflowopt": ("embed layer", "m c"),
    "ifprune": ("embed layer", "q c"),
    "sgp": ("layer", "q"),
    "visionzip": ("embed", "m o"),  # contextual tokens come last
    "fastervlm": ("embed", ""),
    "prumerge": ("embed", "m o"),
    "prumerge_plus": ("embed", "m o"),
    "hiprune": ("embed", ""),
    "tome": ("vision", "m o"),
    "divprune": ("embed", ""),
    "vispruner": ("embed", ""),
    "cdpruner": ("embed", "q"),
    "holov": ("embed", "o"),  # inside crops
    "trim": ("embed", "m q"),
    "gprune": ("embed", ""),
}
PROVISIONAL = {  # no published configuration; code not read; weights not there or not compared
    "tome": "no configuration for language models is published",
    "ifprune": "the code was not available",
    "deco": "released no weights",
    "tokenpacker": "not been compared with a released checkpoint",
}


@pytest.mark.parametrize("name", INDEX)
def test_cards_say_what_the_specification_says(name):
    card, (seam, flags) = methods.card(name), INDEX[name]
    assert card.seam == tuple(seam.split())
    found = {"m": card.merges, "o": card.reorders, "q": card.prompt_aware, "c": card.calibrated}
    assert {flag for flag, there in found.items() if there} == set(flags.split())
    assert bool(card.repository) == (name not in BASELINES)
    assert bool(card.commit) == (name not in (*BASELINES, "tome", "ifprune")), "read at a commit, where code was read"
    assert (name in PROVISIONAL) == bool(card.provisional)


def test_lists_mark_what_is_provisional(capsys):
    assert main(["list", "methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert main(["list", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for name in methods.names():
        reason = PROVISIONAL.get(name, methods.card(name).provisional)
        assert (" [provisional: " in lines[name]) == bool(reason) and reason in lines[name]
        assert reason in rows[name]["provisional"]


def test_the_readme_names_what_is_provisional():
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.replace("\n  ", " ").splitlines() if line.startswith("- Provisional"))
    titles = {methods.card(name).title for name in methods.names() if methods.card(name).provisional}
    assert set(line.partition(":")[2].rstrip(".").strip().split(", ")) == titles
