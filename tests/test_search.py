"""Searches: they find what is known to be best, share work without changing answers, and go on after a kill."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from steps import shape

from pruneval import methods
from pruneval.harness import cli, models
from pruneval.harness.errors import UserError
from pruneval.harness.search import data, fitprune, gsearch, psigmoid, recipe, vtw
from pruneval.harness.search.bayes import Study, best
from pruneval.harness.search.objective import Objective
from pruneval.methods.base import MethodError
from pruneval.methods.budget import solve


class Killed(Exception):
    pass


# On synthetic objectives


@pytest.mark.parametrize("needed", [{2: 0.5, 5: 0.25, 8: 0.1}, {2: 0.9, 5: 0.9, 8: 0.02}])
def test_gsearch_finds_known_thresholds_within_one_grid_step(tmp_path, needed):
    tokens = 48

    def accuracy(rates):
        return float(all(rate >= needed[boundary] for boundary, rate in rates.items()))

    rates = gsearch.search(accuracy, layers=10, tokens=tokens, study=Study(tmp_path / "t", 0), trials=6)
    assert list(rates) == [2, 5, 8]
    for boundary, rate in rates.items():
        assert needed[boundary] - 1e-9 <= rate <= math.ceil(needed[boundary] * tokens) / tokens + 1 / tokens


def test_gsearch_evaluates_every_count_once_and_never_grows(tmp_path):
    asked = []

    def accuracy(rates):
        asked.append(tuple(sorted(rates.items())))
        return 0.9

    rates = gsearch.search(accuracy, layers=12, tokens=20, study=Study(tmp_path / "t", 0), trials=4)
    assert len(asked) == len(set(asked))
    assert list(rates.values()) == sorted(rates.values(), reverse=True)
    assert rates[2] == 1 / 20  # nothing is lost, so the penalty alone decides


def test_a_drop_of_accuracy_is_worth_at_most_lambda(tmp_path):
    """Keeping everything costs 0.01: 1.1 points are not given up for it, 0.9 points are."""
    for lost, expected in ((0.011, 20), (0.009, 1)):
        rates = gsearch.search(
            lambda rates, lost=lost: 1.0 if rates[2] == 1 else 1 - lost,
            layers=3, tokens=20, study=Study(tmp_path / str(lost), 0), trials=10,
        )  # fmt: skip
        assert rates[2] * 20 == expected


def test_psigmoid_finds_the_best_slope_at_the_same_budget(tmp_path):
    tried = {}

    def keep_for(slope):
        return solve("psigmoid", {"slope": slope}, shape(), 576, "avg_in", 128)["keep"]

    def accuracy(keep, slope):
        tried[slope] = keep
        return 1 - (slope - 0.37) ** 2

    found = psigmoid.search(accuracy, keep_for, study=Study(tmp_path / "t", 0))
    assert found["slope"] == pytest.approx(0.37, abs=0.02)
    for slope, keep in tried.items():
        plan = methods.build("psigmoid", {"keep": keep, "slope": slope}).schedule(shape(), 576)
        assert sum(plan) / 32 == pytest.approx(128, abs=1)


def test_vtw_takes_the_first_layer_below_the_threshold_and_none_when_there_is_none():
    curve = {5: 0.1, 6: 0.002, 7: 0.01, 8: 0.001}
    assert vtw.search(curve.__getitem__, layers=9, eta=0.003)[0] == 6
    assert vtw.search(curve.__getitem__, layers=9, eta=0.0001) == (9, curve)


def test_vtw_measures_from_the_withdrawn_to_the_full():
    half, most = (torch.tensor([row]).log() for row in ([0.5, 0.5], [0.9, 0.1]))
    assert vtw.divergence(most, half) == pytest.approx(0.368, abs=1e-3)
    assert vtw.divergence(half, half) == 0


def test_fitprune_deletes_prefixes_that_leave_enough():
    mass = torch.tensor([0.4, 0.1, 0.2, 0.3])
    assert fitprune.prefix(mass, 0.65).tolist() == [1, 2]
    assert fitprune.prefix(mass, 1.0).tolist() == []
    assert len(fitprune.prefix(mass, 0.0)) == 3  # never all


def test_fitprune_counts_flops_as_its_authors():
    """The published table for 60 % leaves .403 of LLaVA-1.5-7B's."""
    published = methods.build("fitprune")._table[2]
    left = next(rows for ratio, rows in published if ratio == 0.6)
    deleted = [a - b for a, b in zip(left, [*left[1:], left[-1]], strict=True)]
    assert fitprune.Cost(4096, 11008).share(576, deleted) == pytest.approx(0.403, abs=1e-3)


def test_fitprune_rounds_until_the_budget_is_met():
    cost = fitprune.Cost(64, 128)
    mean = [3.7, 2.6, 0.4, 0.0]
    keep = cost.share(20, mean)
    deleted = fitprune.whole(mean, 20, cost, keep)
    assert cost.share(20, deleted) <= keep < cost.share(20, [int(count) for count in mean])
    assert deleted[3] == 0


# Going on


def test_a_killed_search_goes_on_to_the_same_end(tmp_path):
    def value(params):
        return -((params["x"] - 0.3) ** 2) - (params["y"] + 1) ** 2, {}

    space = {"x": (0.0, 1.0), "y": (-2.0, 0.0)}
    first = [{"x": 0.9, "y": -0.1}, {"x": 0.1, "y": -1.9}]
    whole = Study(tmp_path / "whole", 3).maximise("s", space, value, first=first, trials=9)
    for budget in (1, 2, 3, 2, 5):
        left = [budget]

        def until_killed(params, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return value(params)

        try:
            again = Study(tmp_path / "again", 3).maximise("s", space, until_killed, first=first, trials=9)
        except Killed:
            continue
    assert [trial.params for trial in again] == [trial.params for trial in whole]
    assert best(again).value == best(whole).value > -0.02


# On the pocket model


@pytest.fixture(scope="module")
def objective():
    loaded = models.load("pocket-llava", "cpu", "float32", None)
    return Objective(loaded, data.load("pocket", 10), batch_size=5)


def test_the_pocket_model_answers_its_training_questions(objective):
    assert objective.tokens() == 144
    assert objective.accuracy(methods.build("vanilla")) >= 0.8


def test_shared_layers_change_no_answer(objective):
    """What a search sees with cached features and layers is what an evaluation sees."""
    rates = [{"rates": f"0.5,{rate}"} for rate in (0.5, 0.2, 0.05)]
    plain = [torch.stack(objective.states(methods.build("gsearch", given))) for given in rates]
    with objective.sharing() as kept:
        kept.deeper(4)  # the second boundary, 5, scores with layer 4
        found = [torch.stack(objective.states(methods.build("gsearch", given))) for given in rates]
        accuracy = [objective.accuracy(methods.build("gsearch", given)) for given in rates]
        assert len(kept.caches) == 2 * 4 * len(objective.batches)  # states and answers
    for expected, state in zip(plain, found, strict=True):
        torch.testing.assert_close(state, expected)
    assert not torch.allclose(found[0], found[2])
    assert accuracy == [objective.accuracy(methods.build("gsearch", given)) for given in rates]


def test_fitprune_meets_its_budget_from_below(objective):
    text = objective.loaded.model.config.get_text_config()
    cost = fitprune.Cost(text.hidden_size, text.intermediate_size)
    shares = []
    alpha, deleted = fitprune.search(
        objective.states, layers=8, tokens=144, cost=cost, keep=0.4, on_trial=lambda a, share: shares.append((a, share))
    )
    assert 0 < alpha < 1 and len(deleted) == 8 and sum(deleted) < 144
    assert 0.38 < cost.share(144, deleted) <= 0.4
    ordered = [share for _, share in sorted(shares)]
    assert ordered == sorted(ordered, reverse=True)  # more tolerance, fewer FLOPs


def test_the_command_writes_a_recipe_that_is_used(tmp_path, capsys):
    out = tmp_path / "vtw.json"
    argv = ["search", "--method", "vtw", "--samples", "4", "--first", "6", "--eta", "9", "--out", str(out)]
    assert cli.main(argv) == 0
    found = json.loads(out.read_text())
    assert {"model", "revision", "layers", "tokens", "data", "seed", "trials", "versions", "objective"} <= set(found)
    assert (found["layer"], found["tokens"], found["data"]["samples"]) == (6, 144, 4)
    assert (tmp_path / "vtw.png").stat().st_size > 5000
    assert "--set recipe=" in capsys.readouterr().out
    small = shape(8)
    assert methods.build("vtw", {"recipe": str(out)}).schedule(small, 144) == [144] * 6 + [0] * 2
    with pytest.raises(MethodError, match="for 8 layers, this model has 32"):
        methods.build("vtw", {"recipe": str(out)}).needs(shape())
    recipe.check(str(out), "vtw", "llava-1.5-7b")
    assert "was searched on pocket-llava" in capsys.readouterr().err
    with pytest.raises(UserError, match="is for vtw, not for gsearch"):
        recipe.check(str(out), "gsearch", "pocket-llava")
    assert cli.main([*argv[:-1], str(out), "--seed", "5"]) == 2
    assert "holds the trials of another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "gsearch", "--budget", "avg_in=5"], "--budget is for psigmoid"),
        (["--method", "psigmoid"], "psigmoid needs --budget or --match"),
        (["--method", "fitprune", "--keep", "2"], "--keep must lie between 0 and 1"),
        (["--method", "vtw", "--data", "pocket-gqaa"], "unknown calibration data 'pocket-gqaa'"),
        (["--method", "vtw", "--data", "/no/such/folder"], "can't read the calibration data"),
        (["--method", "vtw", "--samples", "0"], "--samples must be at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, message):
    assert cli.main(["search", *argv, "--out", str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_users_data_is_read(tmp_path):
    import datasets
    from PIL import Image

    images = [Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)) for value in range(6)]
    rows = {"image": images, "question": ["What?"] * 6, "answer": [f"a{i}" for i in range(6)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "mine.parquet")
    found = data.load(str(tmp_path / "mine.parquet"), 4, seed=1)
    assert len(found.samples) == 4 and found.samples[0].prompt.startswith("What?\n")
    assert found.digest == data.load(str(tmp_path / "mine.parquet"), 4, seed=1).digest
    assert found.digest != data.load(str(tmp_path / "mine.parquet"), 4, seed=2).digest
    with pytest.raises(UserError, match="has 6 rows, 7 samples were asked for"):
        data.load(str(tmp_path / "mine.parquet"), 7)


def test_a_shipped_recipe_is_known_by_name_and_content_and_belongs_to_its_model(capsys):
    from pruneval.harness.run import identified

    (given,) = identified("gsearch", {"recipe": "pocket-llava"}).values()
    assert given.startswith("pocket-llava@")
    assert given != identified("vtw", {"recipe": "pocket-llava"})["recipe"]
    recipe.check("pocket-llava", "gsearch", "pocket-llava")
    assert capsys.readouterr().err == ""
    recipe.check("pocket-llava", "gsearch", "llava-1.5-7b")
    assert "was searched on pocket-llava" in capsys.readouterr().err
