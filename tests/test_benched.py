"""Measured times in the papers' layouts: which documents may fill a cell, and what a footnote says about them."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import pytest
from test_layouts import OURS, SPEC, run

from pruneval.harness.cli import main
from pruneval.reports import layout as layouts
from pruneval.reports.filled import HOLE, fill

SHIPPED = json.loads(files("pruneval.reports").joinpath("measured", "cpu.json").read_text(encoding="utf-8"))
ON = "AMD EPYC, 2 thread(s)"


def document(**changes):
    """What the bench wrote about a scaled model, as if it were about the whole one."""
    return {**copy.deepcopy(SHIPPED), "model": "llava-1.5-7b", **changes}


def cells(name, *documents, records=()):
    table = fill(layouts.load(name), list(records), benches=documents)
    headings = [f"{column.group} {column.heading}".strip() for column in table.columns]
    return {row.label: dict(zip(headings, row.cells, strict=True)) for row in reversed(table.rows)}


def contestant(text, keep=0.5):
    setting = next(setting for setting in SHIPPED["settings"] if setting["keep"] == keep)
    return next(row for row in setting["contestants"] if row["name"].startswith(text))


def test_times_stand_where_model_method_and_setting_fit():
    found = cells("gsearch-table8", document())
    times = {label: row["Prefill time (s) ↓"] for label, row in found.items()}
    for label, name in (("LLaVA-1.5-7B", "vanilla"), ("+ FastV (R=50%)", "fastv("), ("+ PDrop", "pdrop(")):
        assert times[label].value == contestant(name)["prefill"]["median"]
        assert times[label].text == f"{times[label].value:.3f}"
        decode = found[label]["Decode time (s) ↓"]
        assert decode.value == contestant(name)["decode"]["median"]
    assert times["+ VTW"].text == times["+ G-Search (Ours)"].text == HOLE
    assert times["+ VTW"].notes == ("not measured: no vtw with the table's parameters in the run",)
    assert times["InternVL2-8B"].notes == ("not measured: what is given is of llava-1.5-7b",)
    assert times["+ FastV (R=50%)"].rank == "best" and times["LLaVA-1.5-7B"].rank == ""


def test_a_time_is_never_without_its_machine():
    cell = cells("gsearch-table1", document())["+ FastV (R=50%)"]["Prefill time (s) ↓"]
    (note,) = cell.notes
    assert note.startswith(f"measured on {ON}: random weights, float32, sdpa, batch 1, 576 visual + 75 text tokens")
    assert "other work" not in note and ON in cell.signatures[0] and "fastv(layer=2,keep=0.5" in cell.signatures[0]
    machine = {**SHIPPED["machine"], "gpu": "NVIDIA A100", "load_after": 9.5}
    (note,) = cells("gsearch-table1", document(machine=machine))["LLaVA-1.5-7B"]["Prefill time (s) ↓"].notes
    assert "measured on NVIDIA A100:" in note and note.endswith("the machine had other work: load 9.5 on 2 cores")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model": SHIPPED["model"]}, f"what is given is of {SHIPPED['model']}"),
        ({"visual": 288}, "there is no run with batch 1 and about 576 visual tokens"),
        ({"batch": 8}, "there is no run with batch 1 and about 576 visual tokens"),
    ],
    ids=["another model", "another prompt", "another batch"],
)
def test_what_does_not_fit_is_a_hole_with_its_reason(change, reason):
    other = document()
    other.update({key: value for key, value in change.items() if key in other})
    for setting in other["settings"]:
        setting.update({key: value for key, value in change.items() if key in setting})
    cell = cells("gsearch-table1", other)["LLaVA-1.5-7B"]["Prefill time (s) ↓"]
    assert (cell.text, cell.notes) == (HOLE, (f"not measured: {reason}",))


def test_without_a_document_a_time_is_not_measured():
    cell = cells("gsearch-table1", records=OURS)["LLaVA-1.5-7B"]["Prefill time (s) ↓"]
    assert (cell.text, cell.notes) == (HOLE, ("not measured: no document of `pruneval bench` is given (--bench)",))


def test_a_method_that_was_left_out_says_why():
    other = document()
    other["settings"][0]["left_out"] = [{"method": "vtw(keep=0.5)", "reason": "does not fit: out of memory"}]
    cell = cells("gsearch-table1", other)["+ VTW"]["Prefill time (s) ↓"]
    assert cell.notes == ("not measured: does not fit: out of memory",)


def test_a_table_in_bfloat16_takes_only_such_times_and_kernels_are_told_apart():
    assert cells("gsearch-table10", document())["LLaVA-1.5-7B"]["Prefill time (s) ↓"].notes == (
        "not measured: there is no run with batch 1 and about 576 visual tokens in bfloat16",
    )
    half = document(dtype="bfloat16")
    found = cells("gsearch-table10", half)
    assert found["LLaVA-1.5-7B"]["Prefill time (s) ↓"].value == contestant("vanilla")["prefill"]["median"]
    assert found["+ FlashAttention2"]["Prefill time (s) ↓"].text == HOLE
    best = half["settings"][0]["contestants"][1]
    best.update(kernel="flash_attention_2", name="vanilla (its best kernel: flash_attention_2)")
    fast = cells("gsearch-table10", half)["+ FlashAttention2"]["Prefill time (s) ↓"]
    assert fast.value == best["prefill"]["median"] and "flash_attention_2" in fast.notes[0]


def test_changes_are_against_vanilla_of_the_same_run():
    other = document(model="llava-ov-7b", dtype="float16")
    for setting in other["settings"]:
        setting["visual"] = 4450
    row = contestant("visionzip(")
    found = cells("vflowopt-table1", other)["+ VisionZip (50%)"]
    assert found["Latency ms ↓"].value == pytest.approx(1e3 * row["prefill"]["median"])
    change = found["Latency Δ %"]
    assert change.value == pytest.approx(100 * (1 / row["against"]["vanilla"]["prefill"]["ratio"] - 1))
    assert "against vanilla in the same run" in change.notes[0] and "x faster [" in change.signatures[0]
    cache = sum(row["kv_cache"]["prefill"]["true"]) / sum(contestant("vanilla")["kv_cache"]["prefill"]["true"])
    assert found["KV cache Δ %"].value == pytest.approx(100 * (cache - 1))
    assert found["KV cache MB ↓"].value == pytest.approx(row["kv_cache"]["prefill"]["full_heads"] / 1e6)
    wide = cells("vflowopt-table1", {**other, "dtype": "float32"})["+ VisionZip (50%)"]["KV cache MB ↓"]
    assert wide.text == HOLE and "in float16 or bfloat16" in wide.notes[0]


def test_records_keep_their_places_beside_measured_times():
    found = cells("gsearch-table1", document(), records=[run("vanilla", "gqa", 0.5, 9.18)])["LLaVA-1.5-7B"]
    assert found["TFLOPs ↓"].text == "9.18" and found["Prefill time (s) ↓"].value
    assert found["Memory cost ↓"].text == "1.0" and found["Memory cost ↓"].notes[0].startswith("measured on")


def test_another_kernels_run_does_not_fill_flash_attentions_row():
    layout = layouts.parse("x", {
        "title": "t", "head": "Method", "columns": [{"heading": "GQA", "metric": "gqa"}],
        "rows": [{"label": "f", "model": SPEC.model, "ours": {"method": "vanilla", "kernel": "flash_attention_2"}}],
    })  # fmt: skip
    texts = [
        fill(layout, [run("vanilla", "gqa", 0.5, kernel=kernel)]).rows[0].cells[0].text
        for kernel in ("sdpa", "flash_attention_2")
    ]
    assert texts == [HOLE, "50.0"]


def test_the_command_takes_documents(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document()))
    code = main(["report", "--layout", "gsearch-table1", "--bench", str(path), "--out", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert code == 0 and f"measured on {ON}" in out
    assert f"{contestant('fastv(')['prefill']['median']:.3f}" in out


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("no", "is no JSON; it takes what `pruneval bench --out` wrote"),
        ("[]", "is no document of `pruneval bench`"),
        (json.dumps({**SHIPPED, "schema": 7}), "has schema 7; this version reads 1"),
    ],
)
def test_other_files_are_refused_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert main(["report", "--layout", "gsearch-table1", "--bench", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("pruneval: error: --bench ") and err.count("\n") == 1


def test_documents_need_a_layout(capsys):
    assert main(["report", "--bench", "x.json"]) == 2
    assert "--bench needs a paper's table: add --layout" in capsys.readouterr().err
