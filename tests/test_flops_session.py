"""What a pruned run multiplies is what the ledger says of its trace, scores included and merging not."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from pruneval import methods
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.flops import ledger, lengths_of
from pruneval.harness.kv_cache import kv_bytes
from pruneval.harness.scoring import scoring, shape_of
from pruneval.harness.session import pruned

IMAGE, BEFORE, AFTER = 250, 10, 11
COUNTED = (
    "patch_embedding", "vision_linear", "vision_attention", "projector", "scoring",
    "llm_linear", "llm_attention_square", "head_last",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vanilla", {}),
        ("random", {"keep": 0.25}),
        ("fastv", {"layer": 1, "keep": 0.5}),
        ("fastv", {"layer": 2, "keep": 0.125}),
        ("uniform", {"keep": 0.5}),
        ("pdrop", {"keep": 0.5}),
        ("visionzip", {"keep": 0.5}),
    ],
    ids=str,
)
def test_a_pruned_prefill_costs_what_its_trace_implies(model, name, params):
    dimensions, method = dimensions_of(model.config), methods.build(name, params)
    ids = torch.tensor([[1] * BEFORE + [IMAGE] * 16 + [2] * AFTER])
    with torch.no_grad(), pruned(model, method) as session, FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56), logits_to_keep=1)
    per_layer = session.trace.budget(0).per_layer
    assert per_layer == method.schedule(shape_of(dimensions), 16)
    lengths = lengths_of(dimensions, per_layer, text=BEFORE + AFTER)
    lengths = lengths_of(dimensions, per_layer, text=lengths.text, scoring=scoring(method, dimensions, lengths))
    assert 2 * ledger(dimensions, lengths).total(*COUNTED) == pytest.approx(
        counter.get_total_flops(), rel=5e-3 if method.card.merges else 1e-3
    )
    held = sum(t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert kv_bytes(dimensions.decoder, lengths.llm, bytes_per_value=4) == held


def test_a_config_gives_methods_the_shape_the_adapter_gives(model):
    with pruned(model, methods.build("vanilla")) as session:
        assert session.shape == shape_of(dimensions_of(model.config))
