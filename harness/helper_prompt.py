"""A helper's prompt: what a prompt of the pruned model says, in the helper's tokens and chat template."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruneval.harness.clip import plain, template
from pruneval.harness.errors import UserError

if TYPE_CHECKING:
    from pruneval.harness.adapters.base import Adapter

KINDS = ("image_token_id", "video_token_id")


class Prompts:
    """Makes a helper's prompts.

    A helper without a processor, or with the model's own tokenizer and chat template, reads the prompt's ids as they
    are; only placeholders may have another id. For any other both processors are needed: text is decoded, the chat
    template around it replaced by the helper's, and placeholders (with the special token at either side of them) stay
    where they were.
    """

    def __init__(self, target: Adapter, helper: Adapter) -> None:
        self.target, self.helper = target, helper

    def of(self, ids: Tensor, visual: Tensor, question_first: bool) -> Tensor:
        """(n',) the helper's ids for a prompt.

        Args:
            ids, visual: (n,) the prompt without padding, and which of its tokens are visual.
            question_first: whether placeholders go behind the user's text: where the chat template's end is known in
                front of that, else behind everything.

        Raises:
            UserError: when it can't be made.
        """
        if not self._shared:
            return self._translated(ids, visual, question_first)
        out = ids.clone()
        for kind in KINDS:
            mine, theirs = (getattr(one.config, kind, None) for one in (self.target, self.helper))
            if mine is not None and theirs is not None:
                out[ids == mine] = theirs
        known = self.helper.model.get_input_embeddings().num_embeddings
        if int(out.max()) >= known:
            raise UserError(
                f"the helper knows {known} tokens and the prompt has token {int(out.max())}: give adapter_for both "
                "processors, so that its text can be translated"
            )
        if question_first:
            block, tail = self._blocks(ids, visual), self._tail(ids)
            head = torch.arange(len(ids), device=ids.device) < len(ids) - tail
            out = torch.cat([out[~block & head], out[block & head], out[len(ids) - tail :]])
        return out

    @functools.cached_property
    def _shared(self) -> bool:
        """Whether the helper reads ids as the model does."""
        if self.helper.processor is None:
            return True
        if self.target.processor is None:
            raise UserError("the helper has a processor, so this model's is needed too: adapter_for(model, processor)")
        one, other = self.target.processor, self.helper.processor
        same = getattr(one, "chat_template", None) == getattr(other, "chat_template", None)
        return one is other or (same and _tokenizer(one).get_vocab() == _tokenizer(other).get_vocab())

    def _blocks(self, ids: Tensor, visual: Tensor) -> Tensor:
        """(n,) the placeholders, and the special token right before and behind each run of them."""
        if self.target.processor is None:
            return visual
        tokenizer = _tokenizer(self.target.processor)
        other = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        special = [each for each in tokenizer.all_special_ids if each not in other]
        beside = torch.zeros_like(visual)
        beside[:-1] |= visual[1:]
        beside[1:] |= visual[:-1]
        return visual | beside & torch.isin(ids, ids.new_tensor(special))

    def _tail(self, ids: Tensor) -> int:
        """How many tokens at the end of the prompt are the chat template's."""
        if self.target.processor is None:
            return 0
        tokenizer = _tokenizer(self.target.processor)
        end = plain(tokenizer, template(self.target.processor)[1])
        fits = [
            size
            for size in range(1, min(len(ids), 64))
            if tokenizer.decode(ids[-size:], skip_special_tokens=True).strip() == end
        ]
        return max(fits) if end and fits else 0

    def _translated(self, ids: Tensor, visual: Tensor, question_first: bool) -> Tensor:
        theirs, own = (_tokenizer(one.processor) for one in (self.target, self.helper))
        block = self._blocks(ids, visual)
        cuts = (block.diff() != 0).nonzero().squeeze(-1) + 1
        parts = list(zip(ids.tensor_split(cuts.cpu()), block.tensor_split(cuts.cpu()), strict=True))
        said = ["" if bool(flag[0]) else theirs.decode(part, skip_special_tokens=True) for part, flag in parts]
        head, tail = (plain(theirs, text) for text in template(self.target.processor))
        said[0] = said[0].lstrip().removeprefix(head).lstrip() if head else said[0]
        said[-1] = said[-1].rstrip().removesuffix(tail).rstrip() if tail else said[-1]
        shown = [self._shown(part) if bool(flag[0]) else "" for part, flag in parts]
        body = [text for pair in zip(said, shown, strict=True) for text in pair]
        if question_first:
            body = ["".join(said).strip(), *shown]
        head, tail = template(self.helper.processor)
        made = torch.tensor(own(head + "".join(body) + tail)["input_ids"], device=ids.device)
        count, expected = int(self.helper.visual_mask(made).sum()), int(visual.sum())
        if count != expected:
            raise UserError(f"the helper's prompt has {count} visual tokens, this model's {expected}")
        return made

    def _shown(self, part: Tensor) -> str:
        """The helper's text of placeholders and the special tokens at their side."""
        theirs, own = (_tokenizer(one.processor) for one in (self.target, self.helper))
        known, out = own.get_vocab(), []
        for each in part.tolist():
            kind = next((kind for kind in KINDS if each == getattr(self.target.config, kind, None)), None)
            token = theirs.convert_ids_to_tokens(each)
            if kind is not None:
                token = own.convert_ids_to_tokens(getattr(self.helper.config, kind))
            out.append(token if token in known else "")
        return "".join(out)


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)
