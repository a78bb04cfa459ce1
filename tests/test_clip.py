"""CLIP's other half: what is read of a prompt, what it becomes, and who may ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_llava
import torch
import transformers as hf
from tiny_llava import processor
from tokenizers import decoders
from torch.utils.flop_counter import FlopCounterMode

from pruneval import methods
from pruneval.harness import measure, models, subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.clip import ClipView, TextTower, asked
from pruneval.harness.dimensions_config import text_tower_of
from pruneval.harness.errors import UserError
from pruneval.harness.session import pruned
from pruneval.methods.base import Card, Method, Needs, Shape, Step

LONG = " ".join(f"w{number}" for number in range(100, 116))


@dataclass(frozen=True)
class Probe(Method):
    """Changes nothing and hands every step to `see`."""

    card: ClassVar[Card] = Card("probe", "Probe", seam=("embed",), summary="")
    see: Any = None

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,), clip=True)}

    def reduce(self, step: Step) -> None:
        return self.see(step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole tiny CLIPModel on disk, as a user has it; its weights are those of the subjects' text tower."""
    tower, path = subjects.text_tower(), tmp_path_factory.mktemp("clip")
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = width | {"image_size": 56, "patch_size": 14}
    model = hf.CLIPModel(
        hf.CLIPConfig(text_config=tower.text_model.config.to_dict(), vision_config=vision, projection_dim=16)
    )
    model.text_model.load_state_dict(tower.text_model.state_dict())
    model.text_projection.load_state_dict(tower.text_projection.state_dict())
    model.visual_projection.load_state_dict(tower.visual_projection.state_dict())
    model.save_pretrained(path)
    tower.tokenizer.save_pretrained(path)
    return path


def seen(model, adapter, sample, questions=None):
    """The steps of one prompt batch."""
    found = []
    with torch.no_grad(), pruned(model, Probe(found.append), adapter=adapter) as session:
        session.questions = questions
        model(**sample)
    return found


# What CLIP reads


@pytest.mark.parametrize(
    "behind, question",
    [
        ("What is this? ASSISTANT:", "What is this?"),
        ("What?\nAnswer the question using a single word or phrase. ASSISTANT:", "What?"),
        (
            "Which?\nA. one\nAnswer with the option's letter from the given choices directly. ASSISTANT:",
            "Which?\nA. one",
        ),
        ("What is this?", "What is this?"),
        (" ASSISTANT:", "Describe"),
    ],
)
def test_the_question_is_the_text_behind_the_image_without_template_and_instruction(behind, question):
    made = processor()
    made.tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # characters come back without spaces between them
    ids = made.tokenizer("USER: Describe <image><image>\n" + behind, return_tensors="pt")["input_ids"][0]
    assert asked(made, ids, ids == made.tokenizer.image_token_id) == question


def test_the_embedding_is_that_of_the_whole_clip_model(folder):
    """Pooled at the end token and projected; padding changes nothing; patches go through the last norm first."""
    model, view = hf.CLIPModel.from_pretrained(folder).eval(), ClipView(TextTower.load(folder), "w12 w3")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("w12 w3", return_tensors="pt")
    padded = tokenizer("w12 w3", padding="max_length", max_length=24, return_tensors="pt")
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(view.question, model.get_text_features(**plain).pooler_output[0])
        torch.testing.assert_close(view.segments, view.question[None])
        last = model.text_model(padded["input_ids"]).last_hidden_state[0, -1]
        torch.testing.assert_close(view.padded, model.text_projection(last))
        state = model.vision_model(pixels).last_hidden_state[0]
        torch.testing.assert_close(view.project(state)[0], model.get_image_features(pixels).pooler_output[0])
        torch.testing.assert_close(view.project(state, norm=False), model.visual_projection(state))
    assert not torch.allclose(view.padded, view.question)


def test_long_questions_are_cut_or_read_in_pieces():
    tower = subjects.text_tower()
    view, ids = ClipView(tower, LONG), tower.tokenizer(LONG)["input_ids"]
    assert len(ids) == 66 and tower.length == 24
    cut = torch.tensor([[*ids[:23], ids[-1]]])
    with torch.no_grad():
        torch.testing.assert_close(view.question, tower.text_projection(tower.text_model(cut).pooler_output)[0])
    assert view.segments.shape == (3, 16) and bool(view.segments.isfinite().all() & view.padded.isfinite().all())


# What a method gets


def test_cells_and_questions_of_a_batch_are_each_samples_own():
    subject = subjects.subject("llava")
    model, adapter = subject.model("sdpa"), subject.adapter(subject.model("sdpa"))
    singles = [seen(model, adapter, sample)[0] for sample in subject.samples]
    together = seen(model, adapter, subject.batch(*subject.samples))
    for alone, step in zip(singles, together, strict=True):
        torch.testing.assert_close(step.clip.question, alone.clip.question)
    assert not torch.allclose(singles[0].clip.question, singles[1].clip.question)
    cells = together[1].clip.project(together[1].vision.hidden(2)[0])
    norm = torch.nn.functional.layer_norm(together[1].vision.hidden(2)[0], (32,))
    torch.testing.assert_close(cells, norm @ subjects.text_tower().visual_projection.weight.detach().T)


def test_questions_may_be_given_and_beams_share_them():
    subject = subjects.subject("llava")
    model, sample = subject.model("sdpa"), subject.samples[0]
    adapter = adapter_for(model, None, subjects.text_tower())
    with pytest.raises(UserError, match="reads the question"):
        seen(model, adapter, sample)
    expected = ClipView(subjects.text_tower(), "w42").question
    assert torch.equal(seen(model, adapter, sample, ["w42"])[0].clip.question, expected)
    with pytest.raises(UserError, match=r"session\.questions names 2 samples, the batch has 1"):
        seen(model, adapter, sample, ["w42", "w43"])
    found = []
    with pruned(model, Probe(found.append), adapter=adapter) as session:
        session.questions = ["w42"]
        model.generate(**sample, num_beams=3, max_new_tokens=2)
        assert session.questions is None
    assert len(found) == 3 and all(step.clip is found[0].clip for step in found)


def test_it_works_in_a_users_own_program(folder):
    """A processor's prompt, a checkpoint named where the adapter is made, nothing else."""
    loaded = tiny_llava.loaded()
    model, made = loaded.model, loaded.processor
    adapter = adapter_for(model, made, text_tower=folder)
    pixels = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    texts = ["USER: <image>\nw1 w2 ASSISTANT:", "USER: <image>\nw7 ASSISTANT:"]
    ids = made.tokenizer([text.replace("<image>", "<image>" * 16) for text in texts], padding=True, return_tensors="pt")
    with pruned(model, methods.build("trim", {"keep": 0.5}), adapter=adapter) as session:
        model.generate(**ids, pixel_values=pixels, max_new_tokens=2)
        assert [session.trace.budget(row).per_layer for row in (0, 1)] == [[8] * 4] * 2
    assert adapter.clip.norm.weight.dtype == torch.float64


# Who may ask


def test_models_without_clip_or_without_its_text_tower_say_so(folder):
    method = methods.build("trim")
    assert "adapter_for(model, processor, text_tower=...)" in adapter_for(subjects.tiny("llava")).supports(method)
    for family in ("llava_onevision", "video_llava", "internvl", "qwen2_5_vl"):
        model = subjects.tiny(family)
        assert "does not look through CLIP" in adapter_for(model, None, folder).supports(method)
    with pytest.raises(UserError, match=r"text_tower=\.\.\."), pruned(subjects.tiny("llava"), method):
        pass


def test_a_wrong_text_tower_is_one_line(tmp_path):
    model, method = subjects.tiny("llava"), methods.build("trim")
    with (
        pytest.raises(UserError, match="a vision tower of width 64, this model's has 32"),
        pruned(model, method, adapter=adapter_for(model, None, subjects.text_tower(64))),
    ):
        pass
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        adapter_for(model, None, tmp_path).text_tower()
    assert "\n" not in str(caught.value)


def test_where_the_text_tower_of_a_registered_model_is(tmp_path, monkeypatch):
    located = models.Located(models.entry("llava-1.5-7b"), tmp_path / "model", "")
    monkeypatch.delenv("PRUNEVAL_MODELS", raising=False)
    assert models.text_tower(located).startswith("openai/clip-vit-large-patch14-336@")
    monkeypatch.setenv("PRUNEVAL_MODELS", str(tmp_path))
    (tmp_path / "clip-vit-large-patch14-336").mkdir()
    assert models.text_tower(located) == str(tmp_path / "clip-vit-large-patch14-336")
    (tmp_path / "model" / "text_tower").mkdir(parents=True)
    assert models.text_tower(located) == str(tmp_path / "model" / "text_tower")
    assert models.text_tower(models.Located(models.entry("qwen2.5-vl-7b"), tmp_path, "")) is None


# What it costs


def test_its_cost_is_what_torch_counts(folder):
    tower = TextTower.load(folder)
    tower.text_model.set_attn_implementation("eager")
    dimensions, view = text_tower_of(hf.AutoConfig.from_pretrained(folder)), ClipView(tower, LONG)
    with FlopCounterMode(display=False) as counter:
        view.question  # noqa: B018  is computed when it is read
    assert counter.get_total_flops() == 2 * dimensions.question
    with FlopCounterMode(display=False) as counter:
        view.project(torch.randn(16, 32)) @ view.question[:, None]
    assert counter.get_total_flops() == 2 * dimensions.cells(16, 32)


@pytest.mark.parametrize("name", ["trim", "cdpruner"])
def test_the_ledger_has_it_apart(name):
    found = measure.implied("llava-1.5-7b", name, {"keep": 64 / 576})
    assert (
        found["macs"]["helpers"] == 12 * 77 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 77 * 768) + 768**2 + 576 * 1025 * 768
    )
    assert any(line.startswith("helper models") for line in found["not_counted"])
    with pytest.raises(UserError, match="text tower are not known"):
        measure.implied("qwen2.5-vl-7b", name)
    assert measure.implied("llava-1.5-7b", "fastervlm")["macs"]["helpers"] == 0
