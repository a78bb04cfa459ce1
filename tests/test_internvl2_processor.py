"""Tokenizers, tiles and prompts of InternVL2 checkpoints, from the files a folder may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import test_internvl2 as checkpoint
import tiny_internvl as tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pruneval import methods
from pruneval.harness.errors import UserError
from pruneval.harness.internvl2 import load_internvl2
from pruneval.harness.internvl2_processor import TEMPLATES, chat_template, load_processor, load_tokenizer
from pruneval.harness.session import pruned

NINE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "the cat sat on the mat and saw the fox",
    "Frame1: what is it?",
]
TEXTS = ["the quick fox", "  two  spaces ", "日本 é the", "\n\nthe cat sat.", "FULL width ＡＢ x", "", " ", "<s"]


def described(tokens: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Added tokens as tokenizer_config.json has them."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(index): {"content": token} | flags for index, token in tokens.items()}


def write_sentencepiece(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """A tokenizer.model with two reserved pieces, which added tokens take over, and nine tokens past its end."""
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 10))
    defaults = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        user_defined_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"], **defaults | options,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    start = model.get_piece_size()
    added = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_start|>", 4: "<|im_end|>"}
    added |= {start + index: token for index, token in enumerate(NINE)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["remote.Tokenizer", None]},
             "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
             "added_tokens_decoder": described(added)} | (settings or {})
        )
    )  # fmt: skip
    return model


def write_byte_level(folder: Path, single_file: bool) -> Tokenizer:
    """A Qwen2 tokenizer of tokenizer.json, or of vocab.json and merges.txt with added_tokens.json."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    size = inner.get_vocab_size()
    added = {size + index: token for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NINE])}
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
    settings |= {"pad_token": "<|endoftext|>"}
    if single_file:
        inner.add_special_tokens(list(added.values()))
        inner.save(str(folder / "tokenizer.json"))
    else:
        inner.model.save(str(folder))
        settings["added_tokens_decoder"] = described(added)
        (folder / "added_tokens.json").write_text(json.dumps({token: index for index, token in added.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return inner


# Tokenizers


def test_a_sentencepiece_model_splits_text_as_sentencepiece_does(tmp_path: Path) -> None:
    reference = write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *reference.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    first, size = reference.encode("the cat"), reference.get_piece_size()
    prompt = tokenizer("<|im_start|>the cat<img><IMG_CONTEXT></img><|im_end|>the cat")["input_ids"]
    assert prompt == [1, 3, *first, size, size + 2, size + 1, 4, *first]
    assert tokenizer("[UNUSED_TOKEN_0]")["input_ids"] != [1, 3]


@pytest.mark.parametrize(("legacy", "squeeze"), [(False, False), (True, False), (True, True)])
def test_normalization_rules_of_the_model_are_kept(legacy: bool, squeeze: bool, tmp_path: Path) -> None:
    rules = {"add_dummy_prefix": True, "remove_extra_whitespaces": squeeze}
    rules["normalization_rule_name"] = "nmt_nfkc" if legacy else "identity"
    reference = write_sentencepiece(tmp_path, {"legacy": legacy, "add_bos_token": False}, **rules)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        if text.strip() and (legacy or text[0] != " "):
            assert tokenizer(text)["input_ids"] == reference.encode(text), text
    after = tokenizer("<|im_end|>the cat")["input_ids"][1:]
    assert (after == reference.encode("the cat")) is legacy
    assert tokenizer.decode(reference.encode("the cat")) == "the cat"


@pytest.mark.parametrize("single_file", [False, True], ids=["vocab.json", "tokenizer.json"])
def test_byte_level_tokenizers(single_file: bool, tmp_path: Path) -> None:
    inner = write_byte_level(tmp_path, single_file)
    tokenizer = load_tokenizer(tmp_path)
    size = len(tokenizer) - 12 - 1  # without the added tokens and <video>
    assert tokenizer("the quick fox")["input_ids"] == inner.encode("the quick fox").ids
    assert tokenizer("<|im_start|><img><IMG_CONTEXT></img>")["input_ids"] == [size + 1, size + 3, size + 5, size + 4]
    assert tokenizer.context_image_token_id == size + 5
    assert tokenizer.pad_token_id == size and tokenizer.padding_side == "left"


def test_missing_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    write_byte_level(tmp_path, single_file=False)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(
        UserError, match=r"neither tokenizer\.json, nor vocab\.json and merges\.txt, nor tokenizer\.model"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x7fnothing")
    with pytest.raises(UserError, match="is no sentencepiece model"):
        load_tokenizer(tmp_path)


def test_tokens_at_the_wrong_id_are_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, single_file=False)
    ids = json.loads((tmp_path / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids | {"<box>": 9999}))
    with pytest.raises(UserError, match="<box> must be token 9999"):
        load_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(UserError, match="name no <img>, </img>, <IMG_CONTEXT>"):
        load_tokenizer(tmp_path)


# Prompts


def rendered(name: str, messages: list[dict[str, Any]], folder: Path) -> str:
    """A conversation as a template renders it."""
    write_byte_level(folder, single_file=True)
    tokenizer = load_tokenizer(folder)
    return tokenizer.apply_chat_template(
        messages, chat_template=chat_template(name), tokenize=False, add_generation_prompt=True
    )


def test_prompts_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    one = [{"role": "user", "content": [image, text]}]
    old, new = TEMPLATES["Hermes-2"][0], TEMPLATES["internvl2_5"][0]
    assert old.startswith("你是由上海人工智能实验室") and new.startswith("你是书生·万象")
    assert rendered("internlm2-chat", one, tmp_path) == (
        f"<|im_start|>system\n{old}<|im_end|><|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|><|im_start|>assistant\n"
    )
    assert rendered("phi3-chat", one, tmp_path) == (
        f"<|system|>\n{old}<|end|><|user|>\n<IMG_CONTEXT>\nWhat?<|end|><|assistant|>\n"
    )
    assert rendered("internvl2_5", one, tmp_path) == (
        f"<|im_start|>system\n{new}<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    many = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Sure?"},
    ]
    assert rendered("Hermes-2", many, tmp_path) == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<IMG_CONTEXT> <IMG_CONTEXT>\nWhat?<|im_end|>"
        "<|im_start|>assistant\nThat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n"
    )
    video = [{"role": "user", "content": [{"type": "video"}, text]}]
    assert "user\n<video>\nWhat?" in rendered("Hermes-2", video, tmp_path)
    with pytest.raises(UserError, match="unknown chat template 'internlm3'"):
        chat_template("internlm3")


# The whole folder


def write_folder(folder: Path, **changes: Any) -> torch.nn.Module:
    """Weights, config and tokenizer of a tiny InternVL2-2B; the model's ids are the tokenizer's."""
    reference = write_sentencepiece(folder)
    size = reference.get_piece_size() + len(NINE)
    model = tiny.internvl("llama")
    model.resize_token_embeddings(size)
    model.model.language_model.double(), model.lm_head.double()
    checkpoint.write(model, "llama", folder)
    remote = json.loads((folder / "config.json").read_text())
    remote["llm_config"]["vocab_size"] = size
    (folder / "config.json").write_text(json.dumps(remote | changes))
    return model


def test_a_folder_answers_questions_about_images_and_videos(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model, processor = load_internvl2(tmp_path, torch.float64), load_processor(tmp_path)
    assert processor.image_token_id == model.config.image_token_id
    picture = Image.radial_gradient("L").convert("RGB").resize((80, 60))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "the fox?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 13 * 4 and inputs["pixel_values"].shape == (13, 3, 56, 56)
    assert ids[:2] == [1, 3] and ids.count(1) == 1  # <s><|im_start|>
    with pruned(model, methods.build("fastv", {"keep": 0.25})) as session:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=[])
    assert session.trace.budget().per_layer == [52, 52, 13, 13] and out.shape[1] == len(ids) + 2

    frames = torch.zeros(8, 3, 90, 70, dtype=torch.uint8)
    film = processor(text="<video>\nthe fox?", videos=[frames], return_tensors="pt")
    assert film["pixel_values"].shape == (8, 3, 56, 56)
    assert int((film["input_ids"] == processor.image_token_id).sum()) == 8 * 4
    with torch.no_grad(), pruned(model, methods.build("random")) as session:
        model(**film)
    assert session.trace.budget().visual == 32


def test_models_are_loaded_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pruneval.harness import models as registry

    folder = tmp_path / "InternVL2-2B"
    folder.mkdir()
    original = write_folder(folder)
    (folder / "preprocessor_config.json").write_text("{}")  # the checkpoints have one, of another kind
    assert registry.locate(str(folder)).entry.family == "internvl"
    monkeypatch.setenv("PRUNEVAL_MODELS", str(tmp_path))
    loaded = registry.load("internvl2-2b", device="cpu", kernel="eager")
    assert loaded.model.dtype == torch.float32 and loaded.kernel == loaded.model.config._attn_implementation == "eager"
    assert type(loaded.adapter).__name__ == "InternVL" and loaded.entry.paper_tokens == 1280
    assert loaded.processor.image_token_id == loaded.model.config.image_token_id
    torch.testing.assert_close(loaded.model.lm_head.weight, original.lm_head.weight.float())


def test_tiles_are_the_published_ones(tmp_path: Path) -> None:
    write_folder(tmp_path)
    remote = json.loads((tmp_path / "config.json").read_text())
    remote["vision_config"]["image_size"] = 448
    (tmp_path / "config.json").write_text(json.dumps(remote))
    processor = load_processor(tmp_path)
    assert processor.image_seq_length == 256
    sizes = {(448, 448): 1, (480, 640): 13, (1080, 1920): 9, (899, 1024): 10, (1000, 100): 11, (300, 300): 1}
    count = processor.image_processor.get_number_of_image_patches
    assert {size: count(*size) for size in sizes} == sizes
    images = processor.image_processor
    assert images.max_patches == 12 and images.min_patches == 1
    white = images(Image.new("RGB", (448, 448), "white"), return_tensors="pt")["pixel_values"]
    expected = torch.tensor([(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))])
    torch.testing.assert_close(white.mean((0, 2, 3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"use_thumbnail": False}, {"pad2square": True}])
def test_other_ways_of_cutting_are_refused(change: dict[str, bool], tmp_path: Path) -> None:
    write_folder(tmp_path, **change)
    with pytest.raises(UserError, match="no native counterpart"):
        load_processor(tmp_path)
