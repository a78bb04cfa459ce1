"""Tokenizer, image processor and chat template of InternVL2 checkpoints, from the plain files of their folders.

Tiles are those of the checkpoint's own preprocessing (PIL bicubic, ImageNet mean and deviation); prompts are those of
its `chat()`: a system message in Chinese, no newline after a turn in InternVL2, one in InternVL2.5 and 3. Consecutive
images are separated by a space, as lmms-eval joins them. Facts: OpenGVLab/InternVL at 2410d1d (`conversation.py`) and
lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, processors
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from pruneval.harness.errors import UserError, unknown
from pruneval.harness.internvl2 import load_internvl2
from pruneval.harness.internvl2_config import config_from_remote, read_json, special_ids
from pruneval.harness.sentencepiece_model import fast_tokenizer, read_model

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_25 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_CHATML = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
TEMPLATES = {  # `template` of config.json: system message, what opens a turn of each role, what closes a turn
    "Hermes-2": (_SYSTEM_2, _CHATML, "<|im_end|>"),
    "internlm2-chat": (_SYSTEM_2, _CHATML, "<|im_end|>"),
    "phi3-chat": (_SYSTEM_2, ("<|system|>\n", "<|user|>\n", "<|assistant|>\n"), "<|end|>"),
    "internvl2_5": (_SYSTEM_25, _CHATML, "<|im_end|>\n"),
}

_JINJA = """\
{%- set opening = OPENING -%}
{%- if messages[0]['role'] != 'system' -%}{{ opening['system'] + SYSTEM + CLOSING }}{%- endif -%}
{%- for message in messages -%}
{{ opening[message['role']] }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<IMG_CONTEXT>' + (' ' if not loop.last and loop.nextitem['type'] == 'image' else '\\n') }}
{%- elif part['type'] == 'video' -%}{{ '<video>\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ CLOSING }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ opening['assistant'] }}{%- endif -%}"""


def load_checkpoint(
    folder: str | Path, dtype: torch.dtype, device: str = "cpu", kernel: str | None = None
) -> tuple[InternVLForConditionalGeneration, InternVLProcessor]:
    """Model and processor of a checkpoint folder; see `load_internvl2` and `load_processor`. Raises: UserError."""
    return load_internvl2(folder, dtype, device, kernel), load_processor(folder)


def load_processor(folder: str | Path) -> InternVLProcessor:
    """The processor of a checkpoint folder.

    Raises:
        UserError: when a file it needs is missing or asks for something the native processor can't do.
    """
    folder = Path(folder)
    remote = read_json(folder / "config.json")
    config = config_from_remote(remote)
    if not remote.get("use_thumbnail", True) or remote.get("pad2square", False):
        raise UserError("tiles without a thumbnail, or padded to squares, have no native counterpart")
    height, width = config.vision_config.image_size
    pixels = {"size": {"height": height, "width": width}, "image_mean": MEAN, "image_std": DEVIATION}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(
            **pixels,
            crop_to_patches=bool(remote.get("dynamic_image_size", True)),
            min_patches=remote.get("min_dynamic_patch", 1),
            max_patches=remote.get("max_dynamic_patch", 12),
        ),
        tokenizer=load_tokenizer(folder),
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=config.image_seq_length,
        chat_template=chat_template(remote.get("template", "")),
    )


def chat_template(name: str) -> str:
    """The Jinja form of a conversation template, by its name in config.json. Raises: UserError for an unknown one."""
    if name not in TEMPLATES:
        raise unknown("chat template", name, TEMPLATES)
    system, openings, closing = TEMPLATES[name]
    opening = dict(zip(("system", "user", "assistant"), openings, strict=True))
    parts = {"OPENING": opening, "SYSTEM": system, "CLOSING": closing}
    source = _JINJA
    for word, part in parts.items():
        source = source.replace(word, json.dumps(part, ensure_ascii=False))
    return source


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder: of tokenizer.json, vocab.json and merges.txt, or a sentencepiece tokenizer.model.

    Raises:
        UserError: when none of these is there, or an added token would get an id other than the checkpoint's.
    """
    settings = read_json(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    common: dict[str, Any] = {name: _content(settings[name]) for name in names if settings.get(name)}
    common |= {"extra_special_tokens": NAMED, "padding_side": "left", "clean_up_tokenization_spaces": False}
    added = _added(folder, settings)
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), added_tokens_decoder=added, **common
        )
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        vocabulary = read_json(folder / "vocab.json")
        tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, added_tokens_decoder=added, **common)
    elif (folder / "tokenizer.model").is_file():
        inner = fast_tokenizer(read_model(folder / "tokenizer.model"), added, settings.get("legacy", True))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **common)
        _start(tokenizer, settings)
    else:
        raise UserError(
            f"{folder} holds no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor tokenizer.model"
        )
    for token, index in special_ids(folder).items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != index:
            raise UserError(f"{folder}: {token} must be token {index}, its tokenizer files make it {found}")
    missing = [token for role, token in NAMED.items() if role != "video_token" and token not in special_ids(folder)]
    if missing:
        raise UserError(f"{folder}: its tokenizer files name no {', '.join(missing)}")
    return tokenizer


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, with the flags of tokenizer_config.json where it has them."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    described = {token["content"]: token for token in settings.get("added_tokens_decoder", {}).values()}
    default = {"normalized": False, "special": True}
    return {
        index: AddedToken(token, **{flag: described[token][flag] for flag in flags if flag in described[token]})
        if token in described
        else AddedToken(token, **default)
        for token, index in special_ids(folder).items()
    }


def _start(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
    """Puts the start token before every text, where the checkpoint asks for it."""
    if settings.get("add_bos_token", True):
        token = tokenizer.bos_token
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.bos_token_id)]
        )
