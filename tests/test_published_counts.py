"""Visual tokens that enter each decoder layer under every published setting of a method inside the language model.

One table, written down from the papers' and the codes' own numbers, for LLaVA-1.5-7B (32 layers, 576 tokens) unless a
row says otherwise. Nothing is loaded: a method declares its counts, and other tests hold declarations against runs.
"""

from __future__ import annotations

import itertools

import pytest
from steps import shape

from pruneval import methods
from pruneval.methods import MethodError

# runs: "count*layers ..." from the first layer on; deleted: behind each layer; left: at the last layer
TABLE: dict[str, dict[str, dict]] = {
    "fastv": {
        "llava-1.5-7b@50%": {"runs": "576*2 288*30", "average": 306},
        "llava-1.5-7b@25%": {"runs": "576*2 144*30", "average": 171},
        "llava-1.5-7b@12.5%": {"runs": "576*2 72*30", "average": 103.5},
        "llava-1.5-7b@192": {"runs": "576*2 192*30", "average": 216},
        "llava-1.5-7b@128": {"runs": "576*2 128*30", "average": 156},
        "llava-1.5-7b@64": {"runs": "576*2 64*30", "average": 96},
        "llava-next-7b@640": {"n": 2880, "runs": "2880*2 640*30"},
        "llava-next-7b@320": {"n": 2880, "runs": "2880*2 320*30"},
        "llava-next-7b@160": {"n": 2880, "runs": "2880*2 160*30"},
    },
    "pdrop": {
        "llava-1.5-7b@270": {"runs": "576*8 288*8 144*8 72*8", "average": 270},
        "llava-1.5-7b@192": {"runs": "576*2 322*6 180*8 101*16", "average": 192},
        "llava-1.5-7b@128": {"runs": "576*2 241*6 101*8 42*16", "average": 127.4},
        "llava-1.5-7b@64": {"runs": "576*2 109*6 20*8 3*16", "average": 62.9},
        "llava-next-7b@640": {"n": 2880, "runs": "2880*2 1209*6 508*8 213*16", "average": 640},
        "llava-next-7b@320": {"n": 2880, "runs": "2880*2 552*6 106*8 20*16", "average": 320},
    },
    "sparsevlm": {
        "llava-1.5-7b@192": {"runs": "576*3 309*4 204*9 113*16", "average": 206.5},
        "llava-1.5-7b@128": {"runs": "576*3 312*4 117*9 39*16", "average": 145.4},
        "llava-1.5-7b@96": {"runs": "576*3 249*4 55*9 27*16", "average": 114.1},
        "llava-1.5-7b@64": {"runs": "576*3 82*4 32*9 18*16", "average": 82.3},
        "llava-1.5-7b@192/2.0": {"runs": "576*3 300*4 200*9 118*16"},
        "llava-1.5-7b@128/2.0": {"runs": "576*3 238*4 108*9 60*16"},
        "llava-1.5-7b@96/2.0": {"runs": "576*3 246*4 54*9 28*16"},
        "llava-1.5-7b@64/2.0": {"runs": "576*3 66*4 34*9 20*16"},
        "llava-1.5-7b@192/1.0": {"refused": "depends on the sample"},
        "llava-1.5-7b@128/1.0": {"refused": "depends on the sample"},
        "llava-1.5-7b@64/1.0": {"refused": "depends on the sample"},
    },
    "fitprune": {
        "llava-1.5-7b@541": {"left": 576 - 66},
        "llava-1.5-7b@493": {"left": 576 - 149},
        "llava-1.5-7b@424": {"left": 576 - 264},
        "llava-1.5-7b@362": {"left": 576 - 336},
        "llava-1.5-7b@302": {
            "deleted": "3 7 49 24 29 17 59 41 26 8 10 6 2 5 7 2 30 3 13 27 5 23 2 1 0 0 1 1 2 0 0 0",
            "average": 301.8,
        },
        "llava-1.5-7b@274": {"left": 576 - 424},
        "llava-1.5-7b@245": {
            "deleted": "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0",
            "average": 245,
        },
        "llava-1.5-7b@188": {"left": 576 - 488, "average": 187.9},
        "llava-1.5-7b@131": {
            "deleted": "128 127 118 35 26 8 13 3 2 1 0 0 0 2 1 8 7 8 5 11 2 6 1 1 0 0 0 1 0 0 0 0",
            "average": 130.6,
        },
        "llava-1.5-7b@73": {
            "deleted": "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0",
            "average": 72.8,
        },
    },
    "vtw": {
        "llava-1.5-7b@288": {"runs": "576*16 0*16", "average": 288},
        "llava-1.5-7b@270": {"runs": "576*15 0*17", "average": 270},
        "video-llava-7b@1024": {"n": 2048, "runs": "2048*16 0*16", "average": 1024},
    },
    "dart": {
        "llava-1.5-7b@192": {"runs": "576*2 196*30", "average": 219.75},
        "llava-1.5-7b@128": {"runs": "576*2 132*30", "average": 159.75},
        "llava-1.5-7b@64": {"runs": "576*2 68*30", "average": 99.75},
    },
    # Video: what is merged depends on the frames; of one image, which has no neighbours, the cost is what is promised.
    "framefusion": {
        f"{model}@{cost}%": {"layers": layers, "average": 5.76 * cost}
        for model, layers in (("llava-video-7b", 28), ("qwen2-vl-7b", 28), ("internvl2.5-8b", 32))
        for cost in (50, 30, 20)
    },
    "prunevid": {"pllava-7b@16frames": {"runs": "576*11 230*21"}},
    "dycoke": {"llava-onevision-7b@32frames": {"layers": 28, "runs": "576*28"}},  # nothing is dropped of an image
}
NONE = ("gsearch", "psigmoid", "feather", "pact", "st3")
"""In the language model too; no setting of theirs is published for a token count: rates are searched per model."""
ELSEWHERE = ("flowcut", "vflowopt", "sgp", "ifprune")
"""Begin in the vision encoder or beside the model; their own tests hold their counts."""
ROWS = [(name, preset) for name, rows in TABLE.items() for preset in rows]


@pytest.mark.parametrize("name, preset", ROWS)
def test_counts_per_layer(name, preset):
    row = TABLE[name][preset]
    method = methods.build(name, methods.method_class(name).presets[preset])
    n, model = row.get("n", 576), shape(row.get("layers", 32))
    if "refused" in row:
        with pytest.raises(MethodError, match=row["refused"]):
            method.schedule(model, n)
        return
    declared = method.schedule(model, n)
    assert len(declared) == model.layers and declared == sorted(declared, reverse=True)
    if "runs" in row:
        runs = [run.split("*") for run in row["runs"].split()]
        assert declared == [int(count) for count, layers in runs for _ in range(int(layers))]
    if "deleted" in row:
        deleted = [int(count) for count in row["deleted"].split()]
        assert declared == [n - sum(deleted[:layer]) for layer in range(model.layers)]
    if "left" in row:
        assert declared[-1] == row["left"] and declared[0] == n
    if "average" in row:
        assert sum(declared) / model.layers == pytest.approx(
            row["average"], abs=0.2 + 0.02 * (name == "framefusion") * n
        )


@pytest.mark.parametrize("name", methods.names())
def test_no_setting_is_missing(name):
    kind = methods.method_class(name)
    if name in ELSEWHERE or not {"layer", "decode"} & set(kind.card.seam):
        assert name not in TABLE
        return
    assert set(kind.presets) == set(TABLE.get(name, ()))
    assert (name in NONE) == (not kind.presets)


@pytest.mark.parametrize("name", ["fitprune", "vtw"])
def test_settings_are_named_after_their_average(name):
    for preset, params in methods.method_class(name).presets.items():
        if preset.startswith("llava-1.5"):
            declared = methods.build(name, params).schedule(shape(), 576)
            assert round(sum(declared) / 32) == int(preset.split("@")[1])


@pytest.mark.parametrize("average, kept", [(192, 166), (128, 98), (64, 30)])
def test_what_fastv_keeps_for_an_honest_average(average, kept):
    """(32 B - 2 * 576) / 30, and 32 is out of reach: two full layers alone are 36."""
    declared = methods.build("fastv", {"keep": kept / 576}).schedule(shape(), 576)
    assert declared[2] == kept and sum(declared) / 32 == pytest.approx(average, abs=0.5)
    assert sum(methods.build("fastv", {"keep": 1 / 576}).schedule(shape(), 576)) / 32 > 36


def test_rows_of_the_table_say_something():
    for name, preset in ROWS:
        assert {"runs", "deleted", "left", "average", "refused"} & set(TABLE[name][preset]), (name, preset)
    totals = [sum(map(int, row["deleted"].split())) for row in TABLE["fitprune"].values() if "deleted" in row]
    assert totals == [403, 449, 514, 539]
    assert len(ROWS) == len(set(ROWS)) == sum(len(rows) for rows in TABLE.values())
    assert not set(itertools.chain(NONE, ELSEWHERE)) & set(TABLE)
