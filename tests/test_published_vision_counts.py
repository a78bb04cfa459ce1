"""Tokens that enter each layer of tower and language model, for methods in, behind or beside the vision tower.

One table, written down from what cards, papers and released codes state; `None` where they state no number. What a
method declares without weights is held against it here, and so is what it realises on random models of the real
classes with the real grids of tokens (24 x 24, five tiles of that, tiles of 27 x 27) and depths.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from pruneval import methods
from pruneval.harness import measure, subjects
from pruneval.harness.adapters import Adapter, adapter_for
from pruneval.harness.cli import main
from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.methods.base import MethodError
from pruneval.methods.bottleneck import fresh

LLAVA, NEXT, OV = "llava-1.5-7b", "llava-next-7b", "llava-ov-7b"
HELPER = {"sgp": {"answer": 2}, "ifprune": {}}


@dataclass(frozen=True)
class Row:
    """What is stated of one setting.

    Attributes:
        llm: "count*layers ..." of the language model from layer 0 on; None where nothing is stated.
        tower: the same of a tile in the tower, with its CLS token; "whole" when nothing leaves, None where it is not
            stated or depends on the image.
        average: mean of the counts over the decoder's layers as a fraction, where that is what is stated.
        params: where there is no preset.
    """

    llm: str | None
    tower: str | None = "whole"
    average: float | None = None
    params: tuple[tuple[str, Any], ...] = ()


def before(text: str, tower: str | None = "whole") -> dict[tuple[str, str], Row]:
    """Rows of a method that leaves T tokens before the language model: "LLaVA-1.5 | LLaVA-NeXT | LLaVA-OneVision"."""
    found, layers, total = {}, {LLAVA: 32, NEXT: 32, OV: 28}, {LLAVA: 576, NEXT: 2880, OV: 4403}
    for model, budgets in zip((LLAVA, NEXT, OV), text.split("|"), strict=True):
        for budget in budgets.split():
            share = float(budget[:-1]) / 100 if budget.endswith("%") else int(budget) / total[model]
            given = (("keep", share),)
            found[model, budget] = Row(f"{round(share * total[model])}*{layers[model]}", tower, params=given)
    return found


def entering(tokens: int, merges: tuple[int, int]) -> str:
    """ToMe's tower: (r, rest), so that r + 1 pairs merge in the first `rest` of 23 layers and r in the others."""
    rate, rest = merges
    counts = [tokens - rate * layer - min(layer, rest) for layer in range(24)]
    return " ".join(f"{count}*1" for count in counts)


# visual tokens of LLaVA-1.5 of 576 | of LLaVA-NeXT of the nominal 5 x 576 | shares of the prompt of LLaVA-OneVision
TABLE: dict[str, dict[tuple[str, str], Row]] = {
    "random": before("192 128 64 | 640 320 160 | 50% 25% 10%"),
    "uniform": before("192 128 64 | 640 320 160 | 50% 25% 10%"),
    "cls_topk": before("192 128 64 | 640 320 160 | 50% 25% 10%"),
    "visionzip": before("192 128 64 32 | 640 320 160 | 50% 25% 10%"),
    "fastervlm": before("288 192 144 128 64 58 29 | 640 320 160 145 |"),
    "prumerge": before("192 128 64 32 | |") | {(LLAVA, "outliers"): Row(None)},
    "prumerge_plus": before("192 128 64 32 | |") | {(LLAVA, "outliers"): Row(None)},
    "hiprune": before("192 128 64 | 640 320 160 |"),
    "divprune": before("56 192 128 64 32 | 640 320 160 |"),
    "vispruner": before("192 128 64 32 | 640 320 160 |"),
    "cdpruner": before("192 128 64 32 | 640 320 160 |"),
    "trim": before("192 128 64 32 | 640 320 160 |") | {(LLAVA, "outliers"): Row(None)},
    "holov": before("192 128 64 | |"),
    # int(r N) of each graph, whose newlines the nominal 2880 does not have
    "gprune": before("192 128 64 | 640 320 160 |") | {(NEXT, "50%"): Row("1440*32", params=(("keep", 0.5),))},
    # the largest grid of at most T tokens whose directions differ least: 13 x 14, 11 x 11, 8 x 8
    "avgpool": {
        (LLAVA, "192"): Row("182*32", params=(("keep", 192 / 576),)),
        (LLAVA, "128"): Row("121*32", params=(("keep", 128 / 576),)),
        (LLAVA, "64"): Row("64*32", params=(("keep", 64 / 576),)),
    },
    "resize": {
        (LLAVA, "192"): Row("182*32", "183*24", params=(("keep", 192 / 576),)),
        (LLAVA, "128"): Row("121*32", "122*24", params=(("keep", 128 / 576),)),
        (LLAVA, "64"): Row("64*32", "65*24", params=(("keep", 64 / 576),)),
    },
    "tome": {
        (LLAVA, "192"): Row("192*32", entering(577, (16, 16))),
        (LLAVA, "128"): Row("128*32", entering(577, (19, 11))),
        (LLAVA, "64"): Row("64*32", entering(577, (22, 6))),
        (LLAVA, "32"): Row("32*32", entering(577, (23, 15))),
        (NEXT, "640"): Row("640*32", entering(577, (19, 11))),
        (NEXT, "320"): Row("320*32", entering(577, (22, 6))),
        (NEXT, "160"): Row("160*32", entering(577, (23, 15))),
    },
    # the tower loses tokens by the entropy of each image; two stages on LLaVA-NeXT, twice the target to begin with
    "flowcut": {
        (LLAVA, "192"): Row("192*32", None),
        (LLAVA, "128"): Row("128*32", None),
        (LLAVA, "64"): Row("64*32", None),
        (LLAVA, "32"): Row("32*32", None),
        (NEXT, "640"): Row("1280*2 640*30", None),
        (NEXT, "320"): Row("640*2 320*30", None),
        (NEXT, "160"): Row("320*2 160*30", None),
        ("video-llava-7b", "256"): Row("256*32", None),
    },
    # n - round(n (1 - R1)), then of what is left; squares make a few more or fewer
    "vflowopt": {
        (OV, "50%"): Row("3185*9 2385*9 1161*10", average=0.5008),
        (OV, "25%"): Row("1167*9 1148*9 1007*10", average=0.2507),
        (OV, "10%"): Row("513*18 308*10", average=0.1000),
    },
    "sgp": {
        ("internvl2-26b", "64%"): Row("1280*19 512*29", average=0.6375),
        ("internvl2-26b", "35%"): Row("1280*9 256*39", average=0.35),
        ("internvl2-26b", "9%"): Row("1280*2 64*46", average=0.0896),
    },
    "ifprune": {
        **before("192 128 64 | |"),
        ("internvl2-26b", "35%"): Row("1280*9 256*39", average=0.35),
        ("internvl2-26b", "9%"): Row("1280*2 64*46", average=0.0896),
        ("internvl2-26b", "5%"): Row("64*48", average=0.05),
    },
}
ELSEWHERE = {"qwen2.5-vl-7b", "llava-next-video-7b"}
"""Models of presets whose tokens depend on the image or whose frames are counted in the methods' own tests."""
VIDEO = {"dycoke", "framefusion", "prunevid"}
ROWS = [(name, *setting) for name, rows in TABLE.items() for setting in rows]


def runs(text: str) -> list[int]:
    pairs = [run.split("*") for run in text.split()]
    return [int(count) for count, layers in pairs for _ in range(int(layers))]


def params(name: str, model: str, budget: str) -> dict[str, Any]:
    preset = methods.method_class(name).presets.get(f"{model}@{budget}")
    return dict(TABLE[name][model, budget].params if preset is None else preset)


@pytest.mark.parametrize("name, model, budget", ROWS)
def test_declared_without_weights(name, model, budget):
    row, given = TABLE[name][model, budget], params(name, model, budget)
    helper = ("internvl2-2b" if model.startswith("internvl") else model) if name in HELPER else None
    if row.llm is None:
        with pytest.raises(UserError, match="depends on the sample"):
            measure.implied(model, name, given, helper=helper)
        return
    found = measure.implied(model, name, given, helper=helper)
    assert found["per_layer"] == runs(row.llm)
    tiles, whole = measure.implied(model)["tower"][0][0]
    entered = [size for ((many, size),) in found["tower"] if many == tiles]
    depends = any("inside the vision tower" in line for line in found["not_counted"])
    assert depends == (row.tower is None)
    if row.tower is not None:
        assert entered == ([whole] * len(found["tower"]) if row.tower == "whole" else runs(row.tower))
    if row.average is not None:
        assert found["keep"] == pytest.approx(row.average, abs=2e-4)


@pytest.mark.parametrize("name", TABLE)
def test_no_setting_is_missing(name):
    settings = {tuple(preset.split("@")) for preset in methods.method_class(name).presets}
    assert {setting for setting in settings if setting[0] not in ELSEWHERE} <= set(TABLE[name])


def test_no_method_is_missing():
    """Others have theirs elsewhere: trained projectors, one that counts by the question, and those of videos."""
    outside = {name for name in methods.names() if {"pixels", "vision", "embed"} & set(methods.card(name).seam)}
    assert outside | {"sgp"} == set(TABLE) | {"deco", "tokenpacker", "rcom", *VIDEO}


@pytest.mark.parametrize("name", TABLE)
def test_the_command_says_what_enters_every_layer(name, capsys):
    model, budget = next((model, budget) for model, budget in TABLE[name] if TABLE[name][model, budget].llm)
    words = [f"{key}={value}" for key, value in params(name, model, budget).items()]
    words += ["helper=internvl2-2b"] if name == "sgp" else [f"helper={model}"] if name in HELPER else []
    command = ["measure", "--implied", "--model", model, "--method", name]
    assert main([*command, *itertools.chain(*(("--set", word) for word in words))]) == 0
    text = capsys.readouterr().out
    first, _, layers = TABLE[name][model, budget].llm.split()[0].partition("*")
    assert f"visual tokens   {first} in layers 0-{int(layers) - 1}" in text
    assert "  vision tower    " in text and ("at most" in text) == (TABLE[name][model, budget].tower is None)


# On random models of the real classes, with the real grids and depths; one image of two by two crops

REALISED: dict[tuple[str, str], tuple[str, str]] = {
    **{(name, LLAVA): ("64*32", "577*24") for name in TABLE},
    (("resize"), LLAVA): ("64*32", "65*24"),
    ("tome", LLAVA): ("64*32", entering(577, (22, 6))),
    ("flowcut", LLAVA): ("64*32", ""),
    ("vflowopt", LLAVA): ("80*10 60*10 54*12", "577*24"),  # nothing published: automatic rates, their mean is 64
    ("sgp", LLAVA): ("576*12 64*20", "577*24"),
    # 576 + 48 x 48 tokens and 48 newlines. What goes by tiles has an 18th or ninth of each; 320 of 2928 of the others.
    **{(name, NEXT): ("320*32", "577*24") for name in TABLE},
    ("gprune", NEXT): ("361*32", "577*24"),  # int(62.9) + int(251.8) and all newlines
    ("resize", NEXT): ("320*32", "65*24"),
    ("tome", NEXT): ("320*32", entering(577, (22, 6))),
    ("flowcut", NEXT): ("640*2 325*30", ""),  # of the prompt's tokens in the second stage, so newlines count
    ("vflowopt", NEXT): ("400*10 300*10 270*12", "577*24"),
    ("sgp", NEXT): ("2928*12 320*20", "577*24"),
    # 729 + 54 x 54 tokens and 54 newlines, a quarter of 3699
    **{(name, OV): ("925*28", "729*26") for name in TABLE},
    ("gprune", OV): ("965*28", "729*26"),  # int(182.25) + int(729) and all newlines
    ("avgpool", OV): ("911*28", "729*26"),  # 13 x 14 and 27 x 27
    ("resize", OV): ("910*28", "182*26"),  # 13 x 14 of each of five tiles
    ("tome", OV): ("910*28", " ".join(f"{729 - 21 * layer - (layer > 0)}*1" for layer in range(26))),
    ("flowcut", OV): ("1820*2 925*26", ""),
    ("vflowopt", OV): ("981*9 965*9 847*10", "729*26"),
    ("sgp", OV): ("3699*11 924*17", "729*26"),
    ("ifprune", OV): ("924*28", "729*26"),
}
BY_TILES = ("avgpool", "resize", "tome", "flowcut")
TEXT = {
    "vocab_size": 256, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
    "max_position_embeddings": 8192, "pad_token_id": 3,
}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "patch_size": 14}


@functools.cache
def network(name: str, layers: int, seed: int = 0) -> Any:
    """A random model of a family's real class, so small that only its lengths are real."""
    torch.manual_seed(seed)
    if name == OV:
        side, text = 384, hf.Qwen2Config(**TEXT, num_hidden_layers=layers)
        vision = hf.SiglipVisionConfig(**VISION, num_hidden_layers=26, image_size=side, vision_use_head=False)
        kind, config = hf.LlavaOnevisionForConditionalGeneration, hf.LlavaOnevisionConfig
    else:
        side, text = 336, hf.LlamaConfig(**TEXT, num_hidden_layers=layers)
        vision = hf.CLIPVisionConfig(**VISION, num_hidden_layers=24, image_size=side, projection_dim=16)
        kind, config = hf.LlavaForConditionalGeneration, hf.LlavaConfig
        if name == NEXT:
            kind, config = hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig
    given = (
        {} if name == LLAVA else {"image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]}
    )
    ids = {"image_token_id": subjects.IMAGE, "tie_word_embeddings": False}
    model = kind(config(vision_config=vision, text_config=text, **given, **ids))
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [subjects.IMAGE]
    return model.eval()


def prompt(name: str) -> dict[str, torch.Tensor]:
    """A question about one image; of square shape and two by two crops where images are cut."""
    side, rows = (384, 27) if name == OV else (336, 24)
    count = rows**2 if name == LLAVA else rows**2 + 2 * rows * (2 * rows + 1)
    ids = torch.tensor([[1, 10, 11, *[subjects.IMAGE] * count, 20, 21, 22]])
    pixels = torch.randn(1 if name == LLAVA else 5, 3, side, side, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == LLAVA:
        return given | {"pixel_values": pixels}
    return given | {"pixel_values": pixels[None], "image_sizes": torch.tensor([[2 * side, 2 * side]])}


@functools.cache
def adapter(name: str) -> Adapter:
    layers = 28 if name == OV else 32
    words = subjects._word_tokenizer()
    return adapter_for(network(name, layers), words, subjects.text_tower(8), helper=(network(name, 2, 1), words))


@pytest.mark.parametrize("model", [LLAVA, NEXT, OV])
@pytest.mark.parametrize("name", TABLE)
def test_realised_on_random_models(name, model, tmp_path):
    inputs, one = prompt(model), adapter(model)
    visual = int((inputs["input_ids"] == subjects.IMAGE).sum())
    keep = {LLAVA: 64 / 576, NEXT: 320 / (2880 if name in BY_TILES else visual), OV: 0.25}[model]
    given = {"keep": keep} | HELPER.get(name, {})
    if name == "vflowopt":
        given = dict(methods.method_class(name).presets["llava-ov-7b@25%"]) if model == OV else given
        given["recycle"] = "exact"
    if name == "ifprune":
        given["checkpoint"] = str(tmp_path / "bottleneck")
        save_file(fresh(8), given["checkpoint"])
    method, entered = methods.build(name, given), []
    if model == OV and name in ("cdpruner", "trim"):
        assert "CLIP" in one.supports(method)
        return
    with torch.no_grad(), pruned(one.model, method, adapter=one) as session:
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: entered.append(args[0].shape[1]))
            for layer in one.towers[0]
        ]
        one.model(**inputs, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
    llm, tower = REALISED[name, model]
    assert session.trace.budget(0).visual == visual
    assert session.trace.budget(0).per_layer == runs(llm)
    if tower:
        assert entered[: len(runs(tower))] == runs(tower)
    if name == "flowcut":
        last = 22 if model != OV else 25
        target, layers = {LLAVA: 64, NEXT: 128, OV: 364}[model], len(one.towers[0])
        for tile in session.trace.towers[0]:
            assert len(tile) == layers and tile[0] == {OV: 729}.get(model, 577)
            assert set(tile[last:]) == {target + (model != OV)} and list(tile) == sorted(tile, reverse=True)
            changes = [layer for layer in range(1, layers) if tile[layer] < tile[layer - 1]]
            assert all((last - layer) % 2 == 0 for layer in changes), "behind every second layer only"
    origin = session.trace.entering(session.shape.layers - 1).samples[0].origin
    survivors = origin[origin < inputs["input_ids"].shape[1]]  # tokens of a method's own stand behind
    assert bool((survivors.diff() > 0).all()) != method.card.reorders
    whole = replace(session.shape, whole=((729,) * 2 if model == OV else (576,) * 2,) * (1 if model == LLAVA else 5))
    if name not in ("gprune", "flowcut"):  # these two count newlines in
        assert method.schedule(whole, visual) == runs(llm)


PER_TILE = [name for name in TABLE if "per_tile" in methods.method_class(name).__dataclass_fields__]


@pytest.mark.parametrize("tall, tiles", [(2, 5), (1, 3)])
@pytest.mark.parametrize("name", PER_TILE)
def test_papers_count_tokens_of_tiles(name, tall, tiles):
    """The papers' "320" of LLaVA-NeXT: 64 of each tile, newlines or not, however many tiles and how much padding."""
    preset = methods.method_class(name).presets[f"{NEXT}@320"]
    one, inputs = adapter(NEXT), prompt(NEXT)
    if tiles == 3:  # 288 x 672 in two crops of 336 x 336: two rows of cells above, and below, show nothing
        size = (288, 672)
        count = 576 + 20 * 49
        ids = torch.tensor([[1, 10, 11, *[subjects.IMAGE] * count, 20, 21, 22]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": inputs["pixel_values"][:, :3],
            "image_sizes": torch.tensor([size]),
        }
    with torch.no_grad(), pruned(one.model, methods.build(name, preset), adapter=one) as session:
        one.model(**inputs, logits_to_keep=1)
    assert session.trace.budget(0).per_layer == [64 * tiles] * 32
    assert "per_tile=64" in methods.build(name, preset).signature
    assert "per_tile" not in methods.build(name).signature
    with pytest.raises(MethodError, match="per_tile must be a number of tokens"):
        methods.build(name, {"per_tile": -1})
    with pytest.raises(MethodError, match="depends on how many tiles"):
        methods.build(name, preset).schedule(one.shape, 2928)


@pytest.mark.parametrize("name, count", [("flowcut", 16), ("tome", 16), ("resize", 16), ("avgpool", 16)])
def test_frames_are_counted_one_by_one(name, count):
    """Four frames of 4 x 4 cells and a CLS token, which goes: a quarter of each is four tokens."""
    one = subjects.subject("video_llava")
    model, method = one.model("sdpa"), methods.build(name, {"keep": 0.25})
    with torch.no_grad(), pruned(model, method) as session:
        model(**one.samples[1])
    budget = session.trace.budget(0)
    assert budget.visual == 68 and budget.per_layer == [count] * session.shape.layers
    assert method.schedule(replace(session.shape, whole=((16, 16),) * 4), 68) == budget.per_layer
