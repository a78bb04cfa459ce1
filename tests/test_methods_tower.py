"""Methods that work inside the vision tower: ToMe and FlowCut, on the worked examples of their cards."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from steps import shape

from pruneval import methods
from pruneval.harness.session import pruned
from pruneval.harness.subjects import subject
from pruneval.methods import flowcut, tome
from pruneval.methods.base import EncodeStep, MethodError


def test_tome_merges_the_worked_example():
    keys = torch.tensor([[1.0, 1.0], [1, 0], [0.9, 0.1], [0, 1], [1, 0.05], [0.1, 1]])
    hidden = torch.arange(6.0)[:, None] * 10
    keep, values, size = tome.merge(hidden, keys, torch.ones(6), 1, cls=1)
    assert keep.tolist() == [0, 2, 1, 3, 5]
    assert values[:, 0].tolist() == [0, 20, 25, 30, 50]  # token 4 joined token 1
    assert size.tolist() == [1, 1, 2, 1, 1]
    keep, values, size = tome.merge(hidden, keys, torch.ones(6), 2, cls=1)
    assert keep.tolist() == [0, 1, 3, 5]
    assert size.tolist() == [1, 3, 1, 1] and values[1, 0] == pytest.approx(70 / 3)


def test_tome_keeps_the_weighted_mean_and_the_sizes():
    torch.manual_seed(0)
    hidden, size = torch.randn(17, 4), torch.ones(17)
    for count in (3, 4, 2):
        keep, after, sizes = tome.merge(hidden, torch.randn(len(hidden), 3), size, count, cls=1)
        assert sizes.sum() == size.sum() == 17 and keep[0] == 0
        torch.testing.assert_close((after * sizes[:, None]).sum(0), (hidden * size[:, None]).sum(0))
        hidden, size = after, sizes


def test_tome_never_merges_the_cls_token():
    keys = torch.ones(5, 2)  # everything is equally alike
    keep, _, _ = tome.merge(torch.randn(5, 3), keys, torch.ones(5), 2, cls=1)
    assert keep.tolist() == [0, 1, 3]
    keep, _, _ = tome.merge(torch.randn(5, 3), keys, torch.ones(5), 2, cls=0)
    assert keep.tolist() == [4, 1, 3]  # ties: the lowest two of 0, 2, 4 merge


@pytest.mark.parametrize(("left", "share", "rest"), [(64, 22, 6), (192, 16, 16), (128, 19, 11), (32, 23, 15)])
def test_tome_merges_evenly_over_the_layers(left, share, rest):
    counts = tome.merges(576, left, shape())
    assert counts == [share + 1] * rest + [share] * (23 - rest) and sum(counts) == 576 - left
    method = methods.build("tome", {"keep": left / 576})
    entering = method.encoder_schedule(shape(), 576)
    assert (entering[0], entering[22], entering[23]) == (577, 577 - sum(counts[:22]), left + 1)
    assert method.schedule(shape(), 576) == [left] * 32


def test_tome_merges_earlier_where_halving_does_not_reach():
    assert tome.merges(16, 1, SimpleNamespace(feature_layer=2, has_cls=False)) == [8, 4, 2]
    counts = tome.merges(144, 16, SimpleNamespace(feature_layer=3, has_cls=True))
    assert sum(counts) == 128 and max(counts) == counts[0]


@pytest.mark.parametrize(
    ("alive", "target", "left", "ratio", "expected"),
    [(576, 64, 20, 0.9, 22), (576, 192, 20, 0.95, 8), (400, 64, 2, 0.6, 152)],
)
def test_flowcut_drops_what_the_entropy_says(alive, target, left, ratio, expected):
    assert flowcut.dropped(_attention(alive, ratio), target, left) == expected
    assert flowcut.dropped(_attention(alive, ratio), target, 0) == alive - target


def test_flowcut_drops_nothing_of_uniform_attention():
    assert flowcut.dropped(torch.full((576,), 1 / 576), 64, 20) == 0


def _attention(alive: int, ratio: float) -> torch.Tensor:
    """Weights whose entropy is `ratio` of the largest: one large, the rest alike."""
    low, high = 1 / alive, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        rest = (1 - middle) / (alive - 1)
        entropy = -middle * math.log(middle) - (1 - middle) * math.log(rest)
        low, high = (middle, high) if entropy / math.log(alive) > ratio else (low, middle)
    return torch.tensor([middle] + [rest] * (alive - 1), dtype=torch.float64)


def test_flowcut_ranks_the_worked_example():
    value = torch.tensor([1.0, 4, 2, 1])[None, :, None]
    seen, score = flowcut.fused(torch.tensor([0.4, 0.1, 0.3, 0.2]), torch.full((4,), 0.25), value)
    torch.testing.assert_close(score, torch.tensor([0.65, 1.40, 1.10, 0.45]))
    assert score.argsort(descending=True).tolist() == [1, 2, 0, 3] and seen.sum() == 1


def test_flowcut_averages_values_over_heads_before_their_size():
    value = torch.tensor([[[1.0, 0]], [[-1.0, 0]]])  # two heads that cancel
    assert flowcut.fused(torch.ones(1), None, value)[1].item() == 0


def test_flowcut_prunes_behind_every_second_layer_down_to_the_target():
    method, memory = methods.build("flowcut", {"keep": 64 / 576}), {}
    torch.manual_seed(0)
    cells, pruned_at = torch.arange(-1, 576), []
    for layer in method.encoding(shape()):
        n = len(cells)
        attention = _Values(torch.randn(2, n, 8), torch.randn(2, n, 8), torch.randn(2, n, 8))
        step = EncodeStep(layer, torch.zeros(n, 1), cells, cells, attention, 576, 576, shape(), memory=memory)
        result = method.at_encode(step)
        if result is not None:
            pruned_at.append(layer)
            cells = cells[result.keep]
    assert set(pruned_at) <= set(range(1, 22, 2)) and pruned_at[-1] == 21
    assert len(cells) == 65 and cells[0] == -1 and bool((cells.diff() > 0).all())


class _Values:
    scaling = 8**-0.5

    def __init__(self, query, key, value):
        self.query, self.key, self.value = query, key, value

    def rows(self, index):
        return (self.query[:, [index]] @ self.key.transpose(1, 2) * self.scaling).softmax(-1)


def test_flowcut_remembers_half_of_what_it_was():
    method, memory = methods.build("flowcut", {"keep": 0.25}), {}
    scores = iter([1.0, 3.0])
    for layer in (0, 1):
        value = torch.full((1, 9, 1), 1.0)
        attention = _Values(torch.zeros(1, 9, 1), torch.zeros(1, 9, 1), value * next(scores))
        cells = torch.arange(-1, 8)
        step = EncodeStep(layer, torch.zeros(9, 1), cells, cells, attention, 8, 8, shape(), memory=memory)
        assert method.at_encode(step) is None  # uniform attention drops nothing before the last layer
    torch.testing.assert_close(memory["score"], torch.full((8,), 0.5 * 0.25 + 0.5 * 0.75))


def test_flowcut_keeps_cells_of_a_block_together():
    blocks = torch.tensor([0, 1, 0, 1, 2, 2])
    chosen = flowcut.survivors(torch.tensor([9.0, 4, 0, 4, 1, 1]), blocks, 1)
    assert chosen.tolist() == [0, 2]  # mean 4.5 beats 4


def test_flowcut_has_two_stages_where_it_was_published_so():
    next_shape = SimpleNamespace(**{**vars(shape()), "sheets": True, "tiled": True})
    assert list(methods.build("flowcut").needs(shape())) == [0]
    assert list(methods.build("flowcut").needs(next_shape)) == [0, 2]
    assert methods.build("flowcut", {"keep": 160 / 2880}).target(next_shape, 576) == 64
    assert methods.build("flowcut", {"keep": 160 / 2880, "ahead": 2.5}).target(next_shape, 576) == 80
    with pytest.raises(MethodError, match="ahead must be at least 1"):
        methods.build("flowcut", {"ahead": 0.5})


@pytest.mark.parametrize("name", ["tome", "flowcut"])
def test_published_counts_leave_the_tower(name):
    for count in (192, 128, 64, 32):
        method = methods.build(name, dict(methods.method_class(name).presets[f"llava-1.5-7b@{count}"]))
        assert method.schedule(shape(), 576) == [count] * 32


@pytest.mark.parametrize("name", ["tome", "flowcut"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava"])
def test_tower_layers_compute_fewer_tokens(name, family):
    tiny = subject(family)
    with torch.no_grad(), pruned(tiny.model("sdpa"), methods.build(name, {"keep": 0.25, **_given(name)})) as session:
        tiny.model("sdpa")(**tiny.samples[0])
        (tiles,) = session.trace.towers.values()
    for entered in tiles:
        assert entered[0] > entered[-1] and list(entered) == sorted(entered, reverse=True)


def _given(name: str) -> dict:
    return {"ahead": 1.5} if name == "flowcut" else {}


def drawn(heads: int, tokens: int, width: int, seed: int = 0) -> _Values:
    generator = torch.Generator().manual_seed(seed)
    return _Values(*torch.randn(3, heads, tokens, width, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("cls", [1, 0])
def test_flowcut_scores_word_for_word(cls):
    """Attention is scaled, similarity of values is not; without a CLS token means over all tokens take its place."""
    one, attended, alike = drawn(3, 7, 4), [], []
    for query, key, value in zip(one.query, one.key, one.value, strict=True):
        to_query, to_value = (query[0], value[0]) if cls else (query.mean(0), value.mean(0))
        attended.append((key @ to_query / 8**0.5).softmax(0)[cls:])
        alike.append((value @ to_value).softmax(0)[cls:])
    attended, alike = sum(attended) / 3, sum(alike) / 3
    attended, alike = attended / attended.sum(), alike / alike.sum()
    size = (one.value.sum(0) / 3).abs().sum(1)[cls:]
    seen, score = flowcut.flow(one, cls)
    torch.testing.assert_close(seen, attended)
    torch.testing.assert_close(score, (attended + alike) * size)
    torch.testing.assert_close(flowcut.flow(one, cls, values=False)[1], attended * size)


def test_flowcut_in_the_decoder_looks_from_the_last_token_at_visual_ones_only():
    """Both softmaxes run over the visual tokens, both are scaled; two heads share keys and values."""
    one, visual, attended, alike = drawn(2, 6, 4, seed=1), torch.tensor([1, 2, 3]), [], []
    one.key, one.value = one.key[:1], one.value[:1]
    for query in one.query:
        attended.append((one.key[0, visual] @ query[-1] / 8**0.5).softmax(0))
        alike.append((one.value[0, visual] @ one.value[0, -1] / 8**0.5).softmax(0))
    expected = (sum(attended) + sum(alike)) / 2 * one.value[0, visual].abs().sum(1)
    torch.testing.assert_close(flowcut.instruction_flow(one, visual), expected)


def test_flowcut_survives_weights_of_nothing():
    """Where probabilities have underflowed, p log p is 0."""
    one_sees_all = torch.nn.functional.one_hot(torch.tensor(3), 100).float()
    assert flowcut.dropped(one_sees_all, 20, 4) == 40  # (100 - 20) / 2, entropy 0


@pytest.mark.parametrize("proportional", [True, False])
def test_tome_weighs_tokens_by_what_they_stand_for(proportional):
    """Where all patches are alike, merging changes nothing if a token counts as often as it was merged."""
    model = copy.deepcopy(subject("llava").model("sdpa"))
    sample = dict(subject("llava").samples[0])
    sample["pixel_values"] = torch.full_like(sample["pixel_values"], 0.3)
    position = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        position[1:] = position[1]
        whole = model.model.get_image_features(pixel_values=sample["pixel_values"]).pooler_output[0]
        features, kind = [], methods.method_class("tome")
        spy = type(
            "Spy", (kind,), {"reduce": lambda self, at: features.append(at.vision.passed()) or kind.reduce(self, at)}
        )
        with pruned(model, spy(keep=0.25, proportional=proportional)):
            model(**sample)
    (found,) = features[0]
    assert found.entered == (17, 13, 9, 5) and len(found.features) == 4
    assert torch.allclose(found.features, whole[:4]) == proportional
