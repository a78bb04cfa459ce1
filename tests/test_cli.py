"""The command line: what it lists, what it refuses in one line, and one run of the real thing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pruneval import methods, tasks
from pruneval.harness import cli, models
from pruneval.harness.records import read_records

POCKET = Path(models.__file__).parent.parent / "tasks" / "pocket" / "models" / "pocket-llava"
needs_model = pytest.mark.skipif(not (POCKET / "model.safetensors").is_file(), reason="pocket-llava is not trained yet")


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    code, out, err = call(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("pruneval: error: ") and err.count("\n") == 1
    return err.removeprefix("pruneval: error: ").strip()


# Lists ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, names",
    [
        ("methods", methods.names()),
        ("models", models.names()),
        ("suites", list(tasks.suites())),
        ("benchmarks", list(tasks.benchmarks())),
    ],
)
def test_lists_are_json_for_programs_and_lines_for_people(capsys, what, names):
    code, out, _ = call(capsys, "list", what, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == names
    _, out, _ = call(capsys, "list", what)
    assert [line.split()[0] for line in out.splitlines()] == names


def test_a_method_is_listed_with_its_whole_card(capsys):
    rows = {row["name"]: row for row in json.loads(call(capsys, "list", "methods", "--json")[1])}
    assert rows["fastv"]["prompt_aware"] is True and rows["fastv"]["paper"] and rows["fastv"]["seam"] == ["layer"]
    assert rows["fastv"]["parameters"]["keep"] == 0.5


def test_every_command_sets_what_the_user_has_not_set(capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    call(capsys, "list", "models")
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["TOKENIZERS_PARALLELISM"]) == ("ACTIVE", "false")


def test_help_teaches(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "pruneval eval --method fastv" in out
    code, out, _ = call(capsys, "eval", "--help")
    assert code == 0 and "examples:" in out and "--set" in out
    assert call(capsys)[1].startswith("usage: pruneval")
    assert call(capsys, "--version")[1].startswith("pruneval 0.")


# Bad input ------------------------------------------------------------------------------------------------------------

WRONG = [
    ("--method fsatv", "unknown method 'fsatv'; did you mean 'fastv'?"),
    ("--method fastv --set keep=1.5", "fastv: keep must be in (0, 1], not 1.5"),
    ("--method fastv --set kep=0.5", "fastv has no parameter 'kep'; did you mean 'keep'?"),
    ("--method fastv --set keep=half", "fastv: keep must be a number, not 'half'"),
    ("--method fastv --set keep", "--set takes NAME=VALUE, not 'keep'"),
    ("--method fastv --set keep=1 --set keep=0.5", "--set keep was given twice"),
    ("--method vanilla --set keep=0.5", "vanilla has no parameter 'keep'; it has none"),
    ("--method fastv --benchmark pocket-mne", "unknown benchmark 'pocket-mne'; did you mean 'pocket-mme'?"),
    ("--method fastv --suite pokcet", "unknown suite 'pokcet'; did you mean 'pocket'?"),
    ("--method fastv --model pocket-lava", "unknown model 'pocket-lava'; did you mean 'pocket-llava'?"),
    ("--method fastv --model /no/such/folder", "no model folder at /no/such/folder"),
    ("--method fastv --limit 0", "--limit must be a whole number of at least 1, not '0'"),
    ("--method fastv --limit many", "--limit must be a whole number of at least 1, not 'many'"),
    ("--method fastv --batch-size 0", "the batch size must be auto or a whole number of at least 1, not '0'"),
    ("--method fastv --seed -1", "--seed must be a whole number of at least 0, not '-1'"),
    ("--method fastv --dtype fp17", "unknown dtype 'fp17'; did you mean 'fp16'?"),
    ("--method fastv --kernel spda", "unknown kernel 'spda'; did you mean 'sdpa'?"),
    ("--method fastv --device gpu", "unknown device 'gpu'; did you mean 'cpu'?"),
    ("--method fastv --device cuda:x", "device must look like cuda:0, not 'cuda:x'"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[one for one, _ in WRONG])
def test_bad_input_is_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # nothing heavy is needed to say no
    monkeypatch.setattr(models, "load", None)
    assert refused(capsys, "eval", *arguments.split()) == message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evla"], "invalid choice: 'evla'"),
        (["eval"], "--method"),
        (["eval", "--method", "fastv", "--suite", "pocket", "--benchmark", "mme"], "not allowed with"),
        (["eval", "--method", "fastv", "--limt", "3"], "--limt"),
        (["list", "method"], "invalid choice"),
        (["report", "--out", "/no/such/folder"], "no records in /no/such/folder"),
    ],
)
def test_bad_commands_are_one_line(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_a_hub_model_that_is_out_of_reach_says_what_to_do(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused(capsys, "eval", "--method", "fastv", "--model", "llava-1.5-7b")
    for part in ("llava-hf/llava-1.5-7b-hf", "--revision b234b80", "--model /path/to/folder", "PRUNEVAL_MODELS="):
        assert part in message


def test_a_hub_that_does_not_answer_is_one_line_and_no_wait(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(capsys, "eval", "--method", "fastv", "--model", "llava-1.5-13b")
    assert "the hub could not be reached" in message and "hf download llava-hf/llava-1.5-13b-hf" in message


def folder(base: Path, **files: str) -> Path:
    base.mkdir(parents=True)
    for name, text in files.items():
        (base / name.replace("__", ".")).write_text(text)
    return base


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "has no config.json"),
        ({"config__json": "{"}, "cannot be read"),
        ({"config__json": '{"model_type": "bert"}'}, "type 'bert'; supported: llava, "),
        ({"config__json": '{"model_type": "llava"}'}, "incomplete: model.safetensors, processor_config.json missing"),
        (
            {
                "config__json": '{"model_type": "llava"}',
                "processor_config__json": "{}",
                "model__safetensors__index__json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
                "1__safetensors": "",
            },
            "incomplete: 2.safetensors missing",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_said_before_loading(capsys, tmp_path, files, words):
    path = folder(tmp_path / "model", **files)
    assert words in refused(capsys, "eval", "--method", "fastv", "--model", str(path))


def test_unexpected_errors_leave_a_log(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "locate", lambda name: 1 / 0)
    code, _, err = call(capsys, "eval", "--method", "fastv", "--out", str(tmp_path))
    assert code == 1 and "Traceback" not in err
    assert err.startswith("pruneval: internal error: ZeroDivisionError: division by zero\n")
    log = next((tmp_path / "logs").iterdir())
    assert str(log) in err and "Traceback" in log.read_text()


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "locate", interrupted)
    code, _, err = call(capsys, "eval", "--method", "fastv", "--out", str(tmp_path))
    assert code == 130 and "the same command goes on from there" in err


# Models ---------------------------------------------------------------------------------------------------------------


@needs_model
def test_a_model_is_found_by_name_by_folder_and_in_the_users_folder(monkeypatch, tmp_path):
    by_name, by_path = models.locate("pocket-llava"), models.locate(str(POCKET))
    assert by_name.revision == by_path.revision and by_path.entry.name == "pocket-llava"
    shutil.copytree(POCKET, tmp_path / "llava-1.5-7b")
    monkeypatch.setenv("PRUNEVAL_MODELS", str(tmp_path))
    own = models.locate("llava-1.5-7b")
    assert own.folder == tmp_path / "llava-1.5-7b" and own.revision == by_name.revision
    config = tmp_path / "llava-1.5-7b" / "config.json"
    config.write_text(config.read_text() + " ")
    assert models.locate("llava-1.5-7b").revision != by_name.revision


# The real thing -------------------------------------------------------------------------------------------------------


@needs_model
def test_a_run_ends_in_a_table_and_a_repeat_does_no_inference(capsys, monkeypatch, tmp_path):
    command = (
        "eval",
        "--method",
        "fastv",
        "--set",
        "keep=0.25",
        "--benchmark",
        "pocket-gqa",
        "--benchmark",
        "pocket-pope",
    )
    command += ("--limit", "12", "--batch-size", "5", "--device", "cpu", "--out", str(tmp_path))
    code, first, err = call(capsys, *command)
    assert code == 0, err
    assert "| vanilla" in first and "| fastv(layer=2,keep=0.25" in first and "n=12" in first
    assert "pocket scores" in first and "pruneval|fastv(layer=2,keep=0.25" in first
    file = next((tmp_path / "tables").iterdir())
    assert file.read_text() == first.removesuffix("\n")
    records = read_records(tmp_path)
    assert len(records) == 4 and all(record.done for record in records)
    pruned = [record for record in records if record.spec.method == "fastv"]
    assert all(record.budget["avg_in"] == 144 * (2 + 6 * 0.25) / 8 for record in pruned)
    assert all(record.implied["avg_in"] == record.budget["avg_in"] for record in pruned)
    assert all(record.implied["tflops"] < record.implied["unpruned_tflops"] for record in pruned)

    monkeypatch.setattr(models, "load", None)
    code, again, _ = call(capsys, *command)
    assert code == 0 and again == first
    code, report, _ = call(capsys, "report", "--out", str(tmp_path))
    assert code == 0 and report.startswith(first) and "which differences are more than chance (pocket)" in report


@needs_model
def test_a_sample_that_cannot_be_answered_is_named_and_not_scored(capsys, monkeypatch, tmp_path):
    from pruneval.harness import lmms_model

    whole = lmms_model.PrunevalModel._generate

    def broken(self, batch, session):
        if any(request.doc_id == 3 for request in batch):
            raise RuntimeError("image file is truncated")
        return whole(self, batch, session)

    command = ("eval", "--method", "vanilla", "--benchmark", "pocket-gqa", "--limit", "6", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(lmms_model.PrunevalModel, "_generate", broken)
        code, out, err = call(capsys, *command, "--out", str(tmp_path))
    assert code == 1 and "failed [1]" in out and "failed at sample gqa/3: RuntimeError: image file is truncated" in out
    assert "FAILED at sample gqa/3" in err and "Traceback" not in err
    code, out, _ = call(capsys, *command, "--out", str(tmp_path))
    assert code == 0 and "failed" not in out


# Presets and budgets


@pytest.mark.parametrize(
    "arguments, keep",
    [
        (["--budget", "avg_in=128"], 98),
        (["--budget", "kept_after=64"], 64),
        (["--budget", "tflops=5.468"], 288),
        (["--set", "layer=3", "--budget", "avg_in=192"], 152),
    ],
)
def test_a_budget_is_solved_for_the_knob(capsys, arguments, keep):
    code, out, _ = call(
        capsys, "measure", "--model", "llava-1.5-7b", "--method", "fastv", "--implied", "--json", *arguments
    )
    assert code == 0 and json.loads(out)["kept_after"] == keep


def test_a_preset_is_a_published_setting_and_set_goes_over_it(capsys):
    argv = ["measure", "--model", "llava-1.5-7b", "--method", "sparsevlm", "--preset", "llava-1.5-7b@192"]
    code, out, _ = call(capsys, *argv, "--implied", "--json")
    preset = methods.method_class("sparsevlm").presets["llava-1.5-7b@192"]
    assert code == 0 and preset.items() <= json.loads(out)["params"].items()
    code, out, _ = call(capsys, *argv, "--set", "keep=0.2", "--implied", "--json")
    assert code == 0 and json.loads(out)["params"]["keep"] == 0.2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--budget", "avg_in"], "--budget takes CURRENCY=VALUE"),
        (["--budget", "avg=3"], "unknown currency 'avg'; did you mean 'avg_in'?"),
        (["--budget", "avg_in=-1"], "must be a number above 0"),
        (["--budget", "avg_in=32"], "can't be reached"),
        (["--set", "keep=0.5", "--budget", "avg_in=128"], "keep is what is looked for"),
        (["--preset", "llava-1.5-7b@191"], "unknown preset 'llava-1.5-7b@191'; did you mean"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(capsys, arguments, words):
    model = ["--model", "llava-1.5-7b"]
    assert words in refused(capsys, "measure", *model, "--method", "fastv", "--implied", *arguments)


def test_a_pocket_model_runs_a_papers_suite_in_its_pocket_editions(capsys, tmp_path):
    assert cli.main(["eval", "--method", "fastv", "--suite", "gsearch12", "--dry-run", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "gsearch12 in its pocket editions" in err
    named = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ") and ":" in line]
    assert sum(name.startswith("pocket-") for name in named) == 12
    assert cli.main(["eval", "--method", "fastv", "--suite", "core5", "--model", "llava-1.5-7b", "--dry-run",
                     "--out", str(tmp_path)]) in (0, 2)  # fmt: skip
    assert "pocket-" not in capsys.readouterr().out
