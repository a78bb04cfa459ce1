"""`pruneval measure --implied` and the published tables beside it."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import pytest

from pruneval import methods
from pruneval.harness import measure, models
from pruneval.harness.conventions import CONVENTIONS
from pruneval.harness.dimensions import load, names
from pruneval.harness.errors import UserError
from pruneval.harness.flops import Work, ledger, lengths_of
from pruneval.harness.published import TABLES, schedule
from pruneval.harness.scoring import scoring, shape_of

FIELDS = {
    "model",
    "method",
    "params",
    "convention",
    "tflops",
    "tmacs",
    "params_b",
    "kv_ratio",
    "kv_bytes",
    "avg_in",
    "kept_after",
    "not_counted",
}


def _run(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    return parser.parse_args(words)


def _document(capsys, *words: str):
    assert measure.main(_run(*words, "--json")) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("model", names())
def test_every_model_in_every_convention(model, convention):
    pruned = measure.implied(model, "fastv", {"keep": "0.5"}, convention=convention)
    whole = measure.implied(model, convention=convention)
    assert set(pruned) >= FIELDS
    assert 0 < pruned["tflops"] < whole["tflops"] == pruned["unpruned_tflops"]
    assert pruned["tflops"] == CONVENTIONS[convention].factor * pruned["tmacs"]
    assert 0 < pruned["kv_bytes"] < whole["kv_bytes"]
    assert pruned["not_counted"]
    assert json.loads(json.dumps(pruned)) == pruned


@pytest.mark.parametrize("model", models.names())
def test_every_model_with_every_method_has_a_cost_or_a_reason(model):
    start, refused = time.process_time(), []
    for name in methods.names():
        try:
            found = measure.implied(model, name, new_tokens=5)
        except UserError as error:
            refused.append((name, str(error)))
            continue
        assert set(found) >= FIELDS
        assert found["tflops"] > 0 and found["kv_bytes"] > 0 and found["kv_bytes_end"] > 0
        assert 0 <= found["kept_after"] <= found["avg_in"] <= found["visual"]
        assert found["not_counted"]
        assert json.loads(json.dumps(found)) == found
    assert time.process_time() - start < 2 * len(methods.names())
    assert all(name in reason and "\n" not in reason for name, reason in refused)
    assert "vanilla" not in dict(refused) and "fastv" not in dict(refused)


def test_what_leaves_the_caches_while_decoding_is_in_the_implied_cache(capsys):
    words = ("--model", "llava-1.5-7b", "--method", "st3", "--implied", "--new-tokens", "65")
    found = _document(capsys, *words)
    method, entered = methods.build("st3"), found["per_layer"]
    left = [method.remaining(count, 64) for count in entered]
    assert sum(left) < sum(entered)
    assert found["kv_bytes_end"] == 2 * 2 * 4096 * (sum(left) + 32 * (74 + 64))
    assert found["kv_ratio_end"] == pytest.approx(sum(left) / (32 * 576))
    kept = _document(capsys, *words, "--set", "decode_keep=1")
    assert kept["kv_bytes_end"] == kept["kv_bytes"] + 2 * 2 * 4096 * 32 * 64
    assert found["decode_tflops"] < kept["decode_tflops"]
    assert found["tflops"] == kept["tflops"]


def test_what_a_method_does_not_declare_is_named(capsys):
    found = _document(capsys, "--model", "llava-1.5-7b", "--method", "dycoke", "--implied")
    assert any("attend to fewer" in text for text in found["not_counted"])


def test_what_leaves_inside_the_tower_is_in_the_implied_cost():
    whole, merged = (measure.implied("llava-1.5-7b", name)["macs"] for name in ("vanilla", "tome"))
    for part in ("vision_linear", "vision_attention", "projector"):
        assert merged[part] < whole[part]
    assert measure.implied("llava-1.5-7b", "flowcut")["macs"]["vision_linear"] == whole["vision_linear"]
    assert any("counted whole" in text for text in measure.implied("llava-1.5-7b", "flowcut")["not_counted"])


def test_fastv_on_llava_as_published(capsys):
    """G-Search, Table 8."""
    found = _document(capsys, "--model", "llava-1.5-7b", "--method", "fastv", "--set", "keep=0.5", "--implied")
    assert found["tflops"] == pytest.approx(5.47, rel=0.003)
    assert found["tmacs"] == pytest.approx(2.73, rel=0.003)
    assert found["params_b"] == pytest.approx(6.76, rel=0.003)
    assert found["kv_ratio"] == pytest.approx(0.531, rel=0.003)
    assert (found["avg_in"], found["kept_after"], found["visual"], found["text"]) == (306, 288, 576, 74)
    assert found["kv_bytes"] == 2 * 2 * 32 * 128 * (2 * 650 + 30 * 362)
    assert any("vision" in text for text in found["not_counted"])


def test_overrides(capsys):
    video = _document(capsys, "--model", "internvl2-8b", "--frames", "8", "--implied")
    assert video["tflops"] == pytest.approx(38.71, rel=0.003)
    tiles = _document(capsys, "--model", "internvl2-8b", "--tiles", "2", "--text-tokens", "10", "--implied")
    assert (tiles["visual"], tiles["text"], tiles["projected"]) == (512, 10, 512)
    fewer = _document(capsys, "--model", "llava-1.5-7b", "--visual-tokens", "144", "--implied")
    assert (fewer["visual"], fewer["patches"]) == (144, 576)
    qwen = _document(capsys, "--model", "qwen2.5-vl-7b", "--visual-tokens", "256", "--implied")
    assert (qwen["visual"], qwen["patches"]) == (256, 1024)
    clip = _document(capsys, "--model", "qwen2.5-vl-7b", "--frames", "7", "--implied")
    assert clip["visual"] == 4 * 391
    longer = _document(capsys, "--model", "llava-1.5-7b", "--new-tokens", "11", "--implied", "--convention", "true")
    assert longer["decode_tflops"] > 0
    assert longer["tflops"] == pytest.approx(measure.implied("llava-1.5-7b", convention="true")["tflops"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llava-1.5-7", "--implied"], "unknown model 'llava-1.5-7'; did you mean 'llava-1.5-7b'"),
        (["--model", "llava-1.5-7b", "--method", "fsatv", "--implied"], "unknown method 'fsatv'; did you mean 'fastv'"),
        (["--model", "llava-1.5-7b", "--convention", "gserch", "--implied"], "did you mean 'gsearch'"),
        (["--model", "llava-1.5-7b", "--method", "fastv", "--set", "keep=2", "--implied"], "keep must be in"),
        (["--model", "llava-1.5-7b", "--method", "fastv", "--set", "layer=99", "--implied"], "layer must be between"),
        (["--model", "llava-1.5-7b", "--method", "fastv", "--set", "keep", "--implied"], "NAME=VALUE"),
        (["--model", "llava-1.5-7b", "--tiles", "0", "--implied"], "tiles must be at least 1, not 0"),
        (["--model", "llava-1.5-7b", "--visual-tokens", "-5", "--implied"], "visual tokens must be at least 1"),
        (["--model", "llava-1.5-7b", "--text-tokens", "-1", "--implied"], "text tokens must be at least 0"),
        (["--model", "llava-1.5-7b", "--frames", "8", "--implied"], "takes no video"),
        (["--model", "llava-1.5-7b"], "--implied"),
        (["--implied"], "--model"),
        (["--published", "gsearch/table99"], "unknown published table"),
        (["--check", "lava"], "unknown family 'lava'; did you mean 'llava'"),
        (["--check", "llava", "--method", "fsatv"], "unknown method 'fsatv'; did you mean 'fastv'"),
    ],
)
def test_nonsense_is_one_clear_line(words, message):
    with pytest.raises(UserError) as raised:
        measure.main(_run(*words))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_text_says_convention_and_what_is_missing(capsys):
    assert measure.main(_run("--model", "llava-ov-7b", "--method", "fastv", "--implied", "--new-tokens", "5")) == 0
    text = capsys.readouterr().out
    for word in ("gsearch", "not counted", "vision tower, attention", "decode", "TFLOPs", "KV cache"):
        assert word in text


@pytest.mark.parametrize("table", TABLES)
def test_published_tables_name_the_convention_of_each_column(capsys, table):
    assert measure.main(_run("--published", table)) == 0
    text = capsys.readouterr().out
    assert "implied here (gsearch)" in text
    assert "difference (gsearch)" in text
    rows = _document(capsys, "--published", table)
    assert {"published", "implied", "difference_pct", "convention"} <= set(rows[0])


def test_fastv_declares_the_published_schedule():
    shape = shape_of(load("llava-1.5-7b"))
    for keep in (0.5, 0.125):
        declared = methods.build("fastv", {"keep": keep}).schedule(shape, 576)
        assert declared == schedule("fastv", str(1 - keep), 576, 32)


def test_scores_are_counted_by_what_a_method_asks_for():
    dimensions = load("llava-1.5-7b")
    lengths = lengths_of(dimensions)
    assert scoring(methods.build("vanilla"), dimensions, lengths) == ()
    assert [work.macs for work in scoring(methods.build("fastv"), dimensions, lengths)] == [4096 * 650]
    found = measure.implied("llava-1.5-7b", "fastv", convention="true")
    assert found["macs"]["scoring"] == sum(found["scoring"].values()) > 0


def test_helper_models_enter_the_true_cost_only():
    dimensions = load("llava-1.5-7b")
    helper = (Work("a small model", 10**12),)
    whole, helped = (measure.cost(dimensions, lengths_of(dimensions, helpers=h), "true") for h in ((), helper))
    assert helped["tflops"] - whole["tflops"] == pytest.approx(2)
    printed = measure.cost(dimensions, lengths_of(dimensions, helpers=helper))
    assert printed["tflops"] == measure.cost(dimensions, lengths_of(dimensions))["tflops"]
    assert "helper models (2 TFLOP)" in printed["not_counted"]


def test_observed_lengths_cost_what_declared_ones_do():
    dimensions = load("internvl2-8b")
    per_layer = methods.build("fastv").schedule(shape_of(dimensions), 1280)
    observed = measure.cost(dimensions, lengths_of(dimensions, per_layer))
    declared = measure.implied("internvl2-8b", "fastv")
    assert observed["tflops"] == declared["tflops"]
    assert ledger(dimensions, lengths_of(dimensions, per_layer)).llm_linear == declared["macs"]["llm_linear"]


def test_a_folder_with_a_config_is_a_model(tmp_path):
    text = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "vocab_size": 256,
    }
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    text |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = measure.implied(str(tmp_path), "fastv", {"layer": 1})
    assert (found["visual"], found["per_layer"]) == (16, [16, 8, 8, 8])


def test_under_two_seconds_and_without_torch():
    code = (
        "import sys; from pruneval.harness import measure; measure.implied('llava-1.5-7b', 'fastv', {'keep': '0.5'});"
        "sys.exit('torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # other work on the machine is not what is tested
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
