"""Promises about answers: what they may depend on, and what they must not."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pruneval.harness.cases import Broken, Case, NotApplicable, generate, plain, same, steps
from pruneval.methods.base import Step


def keep_all(case: Case) -> None:
    """keep=1 is bit-identical to the plain model with the same kernel."""
    if "keep" not in case.method().params and case.name != "vanilla":
        raise NotApplicable("has no keep parameter")
    inputs = case.subject.batch(*case.subject.samples)
    expected = plain(case, "batch", inputs)
    with case.pruned(case.method(1.0)):
        found = steps(generate(case.model, inputs))
    if not torch.equal(found, expected):
        raise Broken(f"logits differ from the plain model's by {float((found - expected).abs().max()):.2g}")


def masking(case: Case) -> None:
    """Masking the dropped tokens in the un-pruned model gives the same first-token logits as dropping them."""
    method = case.method(position_mode="original")
    if method.card.merges:
        raise NotApplicable("merges tokens, so there is nothing to mask")
    if method.card.reorders:
        raise NotApplicable("reorders tokens, which no mask can do")
    if method.position_ids != "original":
        raise NotApplicable("renumbers positions, which no mask can do")
    sample = case.subject.samples[-1]
    with torch.no_grad():
        with case.pruned(method) as session:
            dropped = case.model(**sample).logits[:, -1]
        if any(bool(layout.samples[0].made.any()) for layout in session.trace.layouts):
            raise NotApplicable("makes tokens of its own, so there is nothing to mask")
        if session.trace.towers:
            raise NotApplicable("drops tokens inside the vision tower, where no mask of the language model reaches")
        length = len(session.trace.prompt.samples[0])
        if "visual_pos_masks" in session.adapter.__class__.__dict__:
            raise NotApplicable("the model adds visual features inside the decoder")

        def mask(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
            kept = torch.zeros(length, dtype=torch.bool)
            kept[session.trace.entering(index).samples[0].origin.cpu()] = True
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & kept
            return args, kwargs | {"attention_mask": causal.to(session.adapter.rotary.inv_freq.device)}

        handles = [
            layer.register_forward_pre_hook(functools.partial(mask, index), with_kwargs=True)
            for index, layer in enumerate(session.adapter.decoder_layers)
        ]
        try:
            masked = case.model(**sample).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
    same(dropped, masked, "dropping against masking", case.subject.tolerance)


def batches(case: Case) -> None:
    """A ragged, left-padded batch gives what its samples give one by one."""
    keys = [str(index) for index in range(len(case.subject.samples))]
    with case.pruned(case.method()) as session:
        singles = []
        for key, sample in zip(keys, case.subject.samples, strict=True):
            session.sample_keys = [key]
            singles.append(steps(generate(case.model, sample)))
        session.sample_keys = keys
        together = steps(generate(case.model, case.subject.batch(*case.subject.samples)))
    same(together, torch.cat(singles), "batch against single prompts", case.subject.tolerance)


def text_only(case: Case) -> None:
    """A prompt without images passes untouched, alone and beside others."""
    if case.subject.text is None:
        raise NotApplicable("no text-only prompt for this model")
    expected = plain(case, "text", case.subject.text)
    with case.pruned(case.method()):
        alone = steps(generate(case.model, case.subject.text))
        mixed = steps(generate(case.model, case.subject.batch(case.subject.samples[0], case.subject.text)))[1:]
    if not torch.equal(alone, expected):
        raise Broken("a text-only prompt is answered differently")
    same(mixed, expected, "text-only prompt in a batch", case.subject.tolerance)


def kernels(case: Case) -> None:
    """SDPA and eager attention give the same."""
    found = []
    for kernel in ("sdpa", "eager"):
        model = case.subject.model(kernel)
        with case.pruned(case.method(), model):
            found.append(steps(generate(model, case.subject.samples[0])))
    same(found[0], found[1], "sdpa against eager", max(1e-3, case.subject.tolerance))


def reversal(case: Case) -> None:
    """Scores matter: reversed, another set of tokens is kept."""
    method = case.method()
    kind = type(method)
    if not hasattr(kind, "score"):
        raise NotApplicable("does not rank tokens by one score")

    def reversed_score(self: Any, step: Step) -> Tensor:
        return -kind.score(self, step)

    backwards = type(kind.__name__, (kind,), {"score": reversed_score})
    kept = []
    for candidate in (method, backwards(**method.params)):
        with torch.no_grad(), case.pruned(candidate) as session:
            session.sample_keys = ["0"]
            case.model(**case.subject.samples[0])
            tokens = session.trace.entering(session.shape.layers - 1).samples[0]
            kept.append(set(tokens.origin[tokens.visual].tolist()))
    if len(kept[0]) == session.trace.budget(0).visual:
        raise NotApplicable("keeps every token at this budget")
    if not kept[0]:
        raise NotApplicable("keeps no token at this budget")
    if kept[0] == kept[1]:
        raise Broken("the same tokens are kept with reversed scores")


def stateless(case: Case) -> None:
    """The same prompt gives the same answer whatever was asked in between."""
    first, *others = case.subject.samples
    with case.pruned(case.method()) as session:
        session.sample_keys = ["0"]
        before = steps(generate(case.model, first))
        for other in others:
            generate(case.model, other)
        session.sample_keys = ["0"]
        after = steps(generate(case.model, first))
    if not torch.equal(before, after):
        raise Broken("another answer to the same prompt after other prompts")
