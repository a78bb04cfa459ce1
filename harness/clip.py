"""The CLIP model that a vision tower comes from: its text encoder, and both projections to the space they share.

A multimodal model keeps of CLIP the vision tower only. Methods that compare patches with the question need the rest:
`adapter_for(model, processor, text_tower="openai/clip-vit-large-patch14-336")`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruneval.harness.chat import chat
from pruneval.harness.errors import UserError

SHORT_ANSWER = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""What LLaVA's evaluation puts behind a question; CDPruner's loaders leave it out of what CLIP reads."""
_MARK = "\N{WHITE SQUARE}"


class TextTower(nn.Module):
    """What a multimodal model has not kept of its CLIP.

    Attributes:
        length: tokens the text encoder reads at most.
        width: features of the vision tower that the projection takes.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """
        Args:
            model: a `CLIPModel`; its vision encoder is not used and not kept.
            tokenizer: the one that belongs to it.
        """
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.norm, self.visual_projection = model.vision_model.post_layernorm, model.visual_projection
        self.tokenizer = tokenizer
        self.length: int = model.config.text_config.max_position_embeddings
        self.width: int = model.config.vision_config.hidden_size

    @classmethod
    def load(cls, name: str | Path) -> TextTower:
        """From a folder, or from the hub as `id` or `id@revision`. Raises: UserError."""
        from transformers import AutoTokenizer, CLIPModel

        where, _, revision = (str(name), "", "") if Path(name).is_dir() else str(name).partition("@")
        options = {"revision": revision} if revision else {}
        try:
            model = CLIPModel.from_pretrained(where, dtype=torch.float32, **options)
            return cls(model, AutoTokenizer.from_pretrained(where, **options)).eval().requires_grad_(False)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the text tower {str(name)!r} cannot be loaded: {reason}") from error

    @torch.no_grad()
    def pooled(self, pieces: list[list[int]]) -> Tensor:
        """(M, p) embeddings of pieces of at most `length` token ids."""
        return self.text_projection(self.text_model(self._padded(pieces)).pooler_output)

    @torch.no_grad()
    def last(self, piece: list[int]) -> Tensor:
        """(p,) the state of the last of `length` positions, projected."""
        return self.text_projection(self.text_model(self._padded([piece])).last_hidden_state[0, -1])

    @torch.no_grad()
    def project(self, hidden: Tensor, norm: bool) -> Tensor:
        """(..., d_v) outputs of a vision layer through the vision tower's last norm, or not, and CLIP's projection."""
        precise = hidden.to(self.norm.weight)
        return self.visual_projection(self.norm(precise) if norm else precise)

    def _padded(self, pieces: list[list[int]]) -> Tensor:
        fill = self.tokenizer.pad_token_id or 0
        rows = [piece + [fill] * (self.length - len(piece)) for piece in pieces]
        return torch.tensor(rows, device=self.norm.weight.device)


class ClipView:
    """The view of one question: see `pruneval.methods.clip.Clip`."""

    def __init__(self, tower: TextTower, text: str) -> None:
        """
        Args:
            tower: the text encoder.
            text: the question.
        """
        self._tower = tower
        self._ids: list[int] = tower.tokenizer(text, verbose=False)["input_ids"]

    @property
    def _cut(self) -> list[int]:
        fits = len(self._ids) <= self._tower.length
        return self._ids if fits else [*self._ids[: self._tower.length - 1], self._ids[-1]]

    @functools.cached_property
    def question(self) -> Tensor:
        """(p,) the embedding of the question, cut at the encoder's length."""
        return self._tower.pooled([self._cut])[0]

    @functools.cached_property
    def segments(self) -> Tensor:
        """(M, p) the embeddings of its pieces."""
        length = self._tower.length
        return self._tower.pooled([self._ids[start : start + length] for start in range(0, len(self._ids), length)])

    @functools.cached_property
    def padded(self) -> Tensor:
        """(p,) the state behind it, at the last position."""
        return self._tower.last(self._cut)

    def project(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """(..., d_v) outputs of a vision layer in the common space, (..., p)."""
        return self._tower.project(hidden, norm)


class Questions:
    """The questions of one batch of prompts; rows with the same text share a view."""

    def __init__(self, tower: TextTower | None, processor: Any) -> None:
        """
        Args:
            tower: the text encoder; None where no method asks for it.
            processor: the model's processor, or None.
        """
        self._tower, self._processor = tower, processor
        self._views: dict[str, ClipView] = {}

    def view(self, ids: Tensor, visual: Tensor, text: str | None) -> ClipView:
        """The view of a prompt's question.

        Args:
            ids, visual: (n,) the prompt without padding, and which of its tokens are visual.
            text: the question itself, where it is known.

        Raises: UserError when it can't be known.
        """
        if self._tower is None:
            raise RuntimeError("no text tower was asked for")
        if text is None:
            if self._processor is None:
                raise UserError("this method reads the question: give adapter_for the processor, or session.questions")
            text = asked(self._processor, ids, visual)
        if text not in self._views:
            self._views[text] = ClipView(self._tower, text)
        return self._views[text]


def asked(processor: Any, ids: Tensor, visual: Tensor) -> str:
    """The user's question in a prompt: see `pruneval.methods.clip.Clip`.

    Text in front of the first visual token counts when there is none behind the last.

    Args:
        processor: the model's processor (or its tokenizer), which has the chat template.
        ids: (n,) the prompt without padding.
        visual: (n,) which of them are visual.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    places = visual.nonzero().squeeze(-1)
    head, tail = (plain(tokenizer, part) for part in template(processor))
    text = tokenizer.decode(ids[int(places[-1]) + 1 :], skip_special_tokens=True).strip().removesuffix(tail).strip()
    if not text:
        text = tokenizer.decode(ids[: int(places[0])], skip_special_tokens=True).strip().removeprefix(head).strip()
    for instruction in SHORT_ANSWER:
        text = text.removesuffix(instruction).strip()
    return text


def template(processor: Any) -> tuple[str, str]:
    """What the chat template puts in front of a user's text and behind it."""
    if not getattr(processor, "chat_template", None):
        return "", ""
    head, _, tail = chat(processor, _MARK, images=0).partition(_MARK)
    return head, tail


def plain(tokenizer: Any, text: str) -> str:
    """Text as it comes back from ids, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
