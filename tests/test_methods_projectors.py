"""DeCo and TokenPacker: their grids and windows, random checkpoints on a tiny model, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from steps import shape
from torch import nn

from pruneval import methods
from pruneval.harness.adapters import adapter_for
from pruneval.harness.conformance import CHECKS, Case, verdicts
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject, tiny
from pruneval.methods import MethodError
from pruneval.methods.deco import pooled
from pruneval.methods.tokenpacker import HEADS, pack, windows

LEVELS = "1,2,3,3"


def modules(width: int = 32, levels: int = 4, hidden: int = 64) -> nn.ModuleDict:
    """TokenPacker's projector, in PyTorch's own modules."""
    torch.manual_seed(0)

    def two(inside: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inside, width), nn.GELU(), nn.Linear(width, out))

    return nn.ModuleDict(
        {
            "q_proj_1": nn.Linear(width, width, bias=False),
            **{f"{one}_proj_1": two(levels * width, width) for one in "kv"},
            **{f"ln_{one}_1": nn.LayerNorm(width, eps=1e-6) for one in "qkv"},
            "clip_attn": nn.MultiheadAttention(width, HEADS),
            "mlp": nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)),
        }
    ).double()  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64)).double()
    save_file({f"model.mm_projector.{key}": each for key, each in layers.state_dict().items()}, folder / "deco")
    save_file({f"mm_projector.{key}": each for key, each in modules().state_dict().items()}, folder / "tokenpacker")
    return {name: folder / name for name in ("deco", "tokenpacker")}


def built(name: str, checkpoints: dict[str, Path], **given) -> methods.Method:
    extra = {"levels": LEVELS} if name == "tokenpacker" else {}
    return methods.build(name, {"checkpoint": str(checkpoints[name])} | extra | given)


def cells(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


# DeCo


def test_the_cards_pools():
    assert pooled(cells(*range(16)), (4, 4), 2).squeeze(1).tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled(cells(*range(9)), (3, 3), 2).squeeze(1).tolist() == [2, 3, 5, 6]  # windows that overlap


@pytest.mark.parametrize("side", [12, 8, 6, 7, 24])
def test_constants_stay_and_whole_windows_keep_the_mean(side):
    assert torch.allclose(pooled(torch.full((576, 3), 1.25), (24, 24), side), torch.tensor(1.25))
    numbers = torch.randn(576, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pooled(numbers, (24, 24), side)
    assert found.shape == (side**2, 3)
    assert torch.allclose(found.mean(0), numbers.mean(0)) == (24 % side == 0)


def test_half_precision_is_pooled_in_float32():
    numbers = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(pooled(numbers, (4, 4), 2), pooled(numbers.float(), (4, 4), 2))


@pytest.mark.parametrize("count", [144, 64, 36])
def test_published_counts(count):
    params = methods.method_class("deco").presets[f"llava-1.5-7b@{count}"]
    assert methods.build("deco", params).schedule(shape(), 576) == [count] * 32
    packer = methods.build("tokenpacker", methods.method_class("tokenpacker").presets[f"llava-1.5-7b@{count}"])
    assert packer.schedule(shape(), 576) == [count] * 32


def test_pooling_comes_before_the_projector(checkpoints):
    """The stream carries MLP(pool(X)), for each image of the prompt."""
    model, sample = tiny("llava"), subject("llava").samples[1]
    seen = {}
    with torch.no_grad(), pruned(model, built("deco", checkpoints)) as session:
        hook = model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
            lambda module, args: seen.update(stream=args[0][0])
        )
        model(**sample)
        hook.remove()
        tokens = session.trace.entering(0).samples[0]
        features = model.model.vision_tower(sample["pixel_values"], output_hidden_states=True).hidden_states[-2]
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64)).double()
    from safetensors.torch import load_file

    found = load_file(checkpoints["deco"])
    layers.load_state_dict({key.removeprefix("model.mm_projector."): each for key, each in found.items()})
    expected = torch.cat([layers(pooled(each[1:], (4, 4), 2)) for each in features])
    torch.testing.assert_close(seen["stream"][tokens.visual], expected.detach())
    assert int(tokens.visual.sum()) == 8 and tokens.position.tolist() == list(range(len(tokens)))


# TokenPacker


def sample(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(144, width, generator=generator, dtype=torch.float64) for width in (32, 128))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@torch.no_grad()
def test_it_is_pytorchs_attention_window_by_window(scale):
    made, (single, levels), side = modules(), sample(), 12 // scale
    found = pack(dict(made.state_dict()), single, levels, 12, side)
    query = single.unflatten(0, (12, 12)).movedim(-1, 0)[None]
    query = nn.functional.interpolate(query, size=(side, side), mode="bilinear")[0].flatten(1).T
    query = made["ln_q_1"](made["q_proj_1"](query))
    key, value = (made[f"ln_{one}_1"](made[f"{one}_proj_1"](levels)) for one in "kv")
    for token in range(side * side):
        row, column = divmod(token, side)
        mine = [(row * scale + i) * 12 + column * scale + j for i in range(scale) for j in range(scale)]
        out, _ = made["clip_attn"](query[token][None], key[mine], value[mine])
        torch.testing.assert_close(found[token], made["mlp"](out)[0])


@torch.no_grad()
def test_a_cell_of_the_levels_reaches_its_own_token_only():
    tensors, (single, levels) = dict(modules().state_dict()), sample()
    before = pack(tensors, single, levels, 12, 6)
    levels[0] += 1
    changed = (pack(tensors, single, levels, 12, 6) != before).any(1)
    assert changed.nonzero().squeeze(1).tolist() == [0]


@torch.no_grad()
def test_cells_of_a_window_have_no_order_for_keys_and_values():
    tensors, (single, levels) = dict(modules().state_dict()), sample()
    other = levels.clone()
    other[[0, 1, 12, 13]] = levels[[13, 0, 1, 12]]
    torch.testing.assert_close(pack(tensors, single, other, 12, 6), pack(tensors, single, levels, 12, 6))


def test_windows_are_in_raster_order_inside_and_outside():
    found = windows(torch.arange(16)[:, None], 4, 2).squeeze(-1)
    assert found.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_its_levels_are_outputs_of_the_layers_before():
    assert methods.build("tokenpacker").layers == [11, 15, 21, 22]


@pytest.mark.parametrize("scale, text", [(5, "does not divide a grid of 24 x 24"), (1, "at least 2")])
def test_scales_that_do_not_go(scale, text):
    with pytest.raises(MethodError, match=text):
        methods.build("tokenpacker", {"scale": scale}).schedule(shape(), 576)


# Both


@pytest.mark.parametrize("name", ["deco", "tokenpacker"])
def test_the_engines_promises(name, checkpoints):
    method = built(name, checkpoints)
    found = list(verdicts(Case(name, subject("llava"), keep=0.25, given=tuple(method.given.items()))))
    assert [verdict for verdict in found if verdict.status == "fail"] == []
    passed = {verdict.check for verdict in found if verdict.status == "pass"}
    assert passed >= set(CHECKS) - {"keep=1", "tower", "masking", "reversal"}
    assert ("keep=1" in passed) == (name == "deco")


@pytest.mark.parametrize("name", ["deco", "tokenpacker"])
def test_what_does_not_fit_is_one_line(name, checkpoints, tmp_path):
    model = tiny("llava")
    adapter = adapter_for(model)
    assert "needs its weights: parameter checkpoint" in adapter.supports(methods.build(name))
    given = {} if name == "deco" else {"levels": LEVELS}
    assert "there is no checkpoint" in adapter.supports(methods.build(name, given | {"checkpoint": "/no/where"}))
    broken = tmp_path / "broken"
    broken.write_text("nothing")
    assert "can't be read" in adapter.supports(methods.build(name, given | {"checkpoint": str(broken)}))
    for family in ("llava_next", "internvl", "qwen2_5_vl", "video_llava", "llava_onevision"):
        assert "one square grid per image" in adapter_for(tiny(family)).supports(built(name, checkpoints))
    wrong = tmp_path / "wrong"
    if name == "deco":
        save_file({"0.weight": torch.zeros(64, 16), "0.bias": torch.zeros(64)}, wrong)
        text = "layer 0 takes 16 features, not 32"
    else:
        state = modules(levels=3).state_dict()
        save_file(dict(state), wrong)
        text = "layer 0 takes 96 features, not 128"
    with torch.no_grad(), pytest.raises(MethodError, match=text), pruned(model, built(name, {name: wrong})):
        model(**subject("llava").samples[0])


def test_the_projector_is_priced(checkpoints):
    """Multiply-adds as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from pruneval.harness.subjects import tiny as model_of

    shape_ = adapter_for(model_of("llava")).shape
    deco, packer = (built(name, checkpoints) for name in ("deco", "tokenpacker"))
    assert deco.work(shape_, 16, 0) == {"trained projector": 4 * (32 * 64 + 64 * 64)}
    state, generator = dict(modules().state_dict()), torch.Generator().manual_seed(0)
    single, levels = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (32, 128))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pack(state, single, levels, 4, 2)
    assert 2 * packer.work(shape_, 16, 0)["trained projector"] == counter.get_total_flops()


def test_wrong_levels():
    with pytest.raises(MethodError, match="levels must be numbers from 1"):
        methods.build("tokenpacker", {"levels": "0,3"})


def test_levels_the_tower_does_not_have(checkpoints):
    method = methods.build("tokenpacker", {"checkpoint": str(checkpoints["tokenpacker"])})
    assert "levels go up to 4 for this model" in adapter_for(tiny("llava")).supports(method)
