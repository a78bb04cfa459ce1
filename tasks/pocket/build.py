"""The parts of pocket-llava before training: tokenizer, processor and an untrained model, all of stock classes."""

from __future__ import annotations

import re

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AddedToken,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pruneval.tasks.pocket import image_prompts, prompts, questions, vision
from pruneval.tasks.pocket.benches_choice import COLOURS_CN, QUADRANTS_CN, SHAPES_CN
from pruneval.tasks.pocket.world import COLOURS, KINDS, PATCH, SIZE, SPLITS, draw

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PHRASES = (prompts.SHORT, prompts.LETTER)
"""Instructions that end nearly every prompt are one token each: like in the large models, whose images have hundreds
of tokens, nearly all of a prompt is then image and question."""

PIECES = r"\n|\d{1,2}|[A-Za-z]+|[^\sA-Za-z\d]"

CAPTIONS = {
    "kind": "Describe the objects in the image by name.",
    "colour": "Describe the objects in the image by color.",
    "place": "Describe the objects in the image by place.",
}

SPARE = """
Answer the question using a single word or phrase . Answer with the option's letter from the given choices directly .
Please answer yes or no Yes No Your response must be concise Provide a short and direct response Reference OCR token
tokens Context Question Options Option Choices Hint N / A B C D E F G H USER ASSISTANT Human Assistant System user
assistant image images picture photo figure diagram chart table video frame scene view answer answers question
questions letter letters option options choice choices correct best following select choose given according based
nothing none unknown something anything other another any some all each every both either neither more most less least
fewer few many much same different equal total sum difference plus minus times divided product number numbers digit
digits word words text sign label title read reads say says written write writing shown show shows displayed visible
seen see look looks looking appear appears contain contains object objects thing things item items shape shapes color
colors colored colour colours size sizes small smaller smallest large larger largest big bigger biggest tall taller
tallest short shorter shortest high higher highest low lower lowest long longer longest wide narrow bright dark light
top bottom left right middle center centre corner side above below under over behind front beside next near far
between inside outside around on in at to of from by with without for into onto off up down the a an this that these
those it its he she they his her their is are was were be been being am do does did has have had can could will would
should may might must and or not but if then else than as so too very also only just there here where what which who
whom whose when why how red green blue yellow purple white black orange pink brown gray grey cyan circle circles
square squares triangle triangles cross crosses ring rings star stars diamond diamonds heart hearts rectangle
rectangles oval ovals line lines bar bars dot dots arrow arrows axis value values highest lowest one two three four
five six seven eight nine ten zero first second third fourth fifth last before after during while always never again
man woman person people boy girl child dog cat bird horse car bus truck bicycle boat train plane table chair cup
bottle bowl plate book phone computer keyboard clock tree grass sky water road building house window door sports ball
moves moving move still still moved turn turns appears disappears changes change start end begin beginning time long
true false wrong maybe describe description explain list name names called place places located location position
positions direction relation compare comparison count counts counting calculate result greater equals python code
output print translate translation Chinese English famous actor movie landmark artwork poster painting made type
category kind kinds material pattern texture letter capital STOP GO OPEN EXIT SALE TAXI CAFE BANK stop go open exit
sale taxi cafe bank cat dog sun moon hat pen key box
"""

GLOSSES = {
    **{word: colour for colour, word in COLOURS_CN.items()}, **{word: shape for shape, word in SHAPES_CN.items()},
    **{word: place for place, word in QUADRANTS_CN.items()}, "图中": "image", "图中的": "image",
    "是什么颜色": "What color", "的物体是什么形状": "What shape", "在图中的什么位置": "Where",
    image_prompts.CHINESE: prompts.LETTER, "unanswerable": "unknown",
}  # fmt: skip
"""Words that the model got last, and the words whose embeddings (their mean) they begin from. Chinese has no spaces:
what MMBench's questions are made of are its words here."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def words() -> list[str]:
    """The vocabulary: special tokens, then all words the project asks with, then spare words for later editions."""
    found: dict[str, None] = dict.fromkeys(SPECIAL)
    rng = np.random.default_rng(0)
    texts = [*COLOURS, *KINDS, *questions.QUADRANTS, *questions.HINTS, *CAPTIONS.values(), prompts.chat("")]
    for split in SPLITS:
        for scene in (draw(rng, split) for _ in range(1500)):
            asked = [questions.ask(scene, rng, skill) for skill in questions.SKILLS]
            for category in questions.PAIR_CATEGORIES:
                asked += questions.pair(scene, rng, category) or ()
            texts += [q.text for q in asked if q]
    texts += ["\n.,:;?!'\"()-/&%$+*=<>#", *(str(n) for n in range(100)), SPARE]
    texts += [w.capitalize() for w in re.findall("[a-z]+", SPARE)]
    for text in texts:
        found.update(dict.fromkeys(re.findall(PIECES, text.replace("<image>", ""))))
    return list(found)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, number below 100, punctuation mark or newline; case is kept."""
    vocabulary = {word: i for i, word in enumerate(words())}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    return made


def own_tokenizer() -> PreTrainedTokenizerFast:
    """The same words with the same numbers, and pocket-llava's own `GLOSSES` behind them."""
    made = tokenizer()
    made.add_tokens([AddedToken(word, normalized=False) for word in GLOSSES])
    return made


def processor() -> LlavaProcessor:
    """The stock processor of the pocket model, with its own tokenizer."""
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    return LlavaProcessor(
        images, own_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def model(tokens: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """An untrained model; seed torch first."""
    ids = {
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=-(-len(tokens) // 32) * 32, hidden_size=160, intermediate_size=432, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.04,
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.config(), text_config=text, projector_hidden_act="gelu",
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision.FEATURE, vision_feature_select_strategy="default",
        image_seq_length=vision.TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config)
    made.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ids)
    return made


@torch.no_grad()
def widened(old: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model made with `tokenizer`, with embeddings for the words of `own_tokenizer` too."""
    tokens = own_tokenizer()
    made = model(tokens)
    weights = old.state_dict()
    for name, weight in made.state_dict().items():
        weight[: len(weights[name])] = weights[name]
    table = made.model.language_model.embed_tokens.weight
    for word, gloss in GLOSSES.items():
        table[tokens.convert_tokens_to_ids(word)] = table[tokens.encode(gloss, add_special_tokens=False)].mean(0)
    return made
