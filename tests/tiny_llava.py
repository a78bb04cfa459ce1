"""A tiny random LLaVA with a real processor, built in a second."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def processor() -> LlavaProcessor:
    """A processor with a character-level tokenizer and 56 x 56 images of 14 x 14 patches (16 visual tokens)."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>"]
    characters = ["\n"] + [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(specials + characters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<image>|[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        padding_side="left",
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def loaded(seed: int = 1) -> SimpleNamespace:
    """Model and processor, with the attributes of a `LoadedModel` that an evaluation reads."""
    torch.manual_seed(seed)
    maker = processor()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=56, patch_size=14, projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=3, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=maker.tokenizer.image_token_id,
        image_seq_length=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    # Weights large enough that every picture and question gets an answer of its own.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6.0)
    model.double()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    return SimpleNamespace(
        model=model, processor=maker, device=torch.device("cpu"), dtype=torch.float64, kernel="sdpa", adapter=None
    )
