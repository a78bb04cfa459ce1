"""Promises about what runs and what is kept: layers, caches, positions, budgets, and the model itself afterwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pruneval.harness.cases import NEW, Broken, Case, NotApplicable, generate, plain, steps
from pruneval.harness.session import Session
from pruneval.methods.base import MethodError


def layers_once(case: Case) -> None:
    """Every decoder layer runs exactly once per prefill."""
    with case.pruned(case.method()) as session, _counting(session) as calls:
        generate(case.model, case.subject.samples[0], max_new_tokens=1, min_new_tokens=1)
    wrong = {layer: count for layer, count in enumerate(calls) if count != 1}
    if wrong:
        raise Broken(f"runs per decoder layer in one prefill, where not 1: {wrong}")


@contextmanager
def _counting(session: Session) -> Iterator[list[int]]:
    """Counts the attention runs of each decoder layer, where the work is done, not the calls of the layer."""
    calls = [0] * session.shape.layers

    def count(index: int, *_: Any) -> None:
        calls[index] += 1

    attentions = [session.adapter.attention(layer) for layer in range(session.shape.layers)]
    handles = [module.register_forward_hook(functools.partial(count, i)) for i, module in enumerate(attentions)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tower_lengths(case: Case) -> None:
    """Each layer of the vision tower runs once, on exactly the tokens the trace says."""
    method = case.method()
    entered: dict[int, list[int]] = {}

    def note(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        entered.setdefault(index, []).append(hidden.shape[-2])

    with torch.no_grad(), case.pruned(method) as session, ExitStack() as stack:
        if not method.encoding(session.shape):
            raise NotApplicable("leaves the vision tower alone")
        for tower in range(len(session.adapter.towers)):
            for index in range(session.shape.vision_layers):
                module = session.adapter.vision_attention(index, tower)
                hook = functools.partial(note, index)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        case.model(**case.subject.samples[0])
        tiles = session.trace.towers.get(0)
        if tiles is None:
            raise NotApplicable("keeps every token of the tower at this budget")
        packed = entered[0] == [sum(tile[0] for tile in tiles)]
    for index in range(session.shape.vision_layers):
        lengths = [tile[index] for tile in tiles]
        expected = [sum(lengths) if packed else max(lengths)]
        if entered[index] != expected:
            raise Broken(f"vision layer {index} ran on {entered[index]} tokens, the trace says {expected}")


def cache_lengths(case: Case) -> None:
    """The KV length of each layer equals the trace, after prefill and after every decoded token."""
    inputs = case.subject.batch(*case.subject.samples)
    with case.pruned(case.method()) as session:
        for new in (1, NEW):
            cache = generate(case.model, inputs, max_new_tokens=new, min_new_tokens=new).past_key_values
            for layer in range(session.shape.layers):
                found = cache.layers[layer].keys.shape[-2]
                expected = session.trace.stored(layer).width + new - 1
                if found != expected:
                    raise Broken(f"layer {layer} caches {found} tokens after {new - 1} decode steps, not {expected}")


def text_stays(case: Case) -> None:
    """Text tokens are never dropped, and no token goes on twice."""
    inputs = case.subject.batch(*case.subject.samples)
    with torch.no_grad(), case.pruned(case.method()) as session:
        case.model(**inputs)
        for row, prompt in enumerate(session.trace.prompt.samples):
            text = prompt.origin[~prompt.visual]
            for layer in range(session.shape.layers):
                tokens = session.trace.entering(layer).samples[row]
                if not torch.equal(tokens.origin[~tokens.visual].sort().values, text):
                    raise Broken(f"sample {row}: text tokens are missing at layer {layer}")
                if len(tokens.origin.unique()) != len(tokens):
                    raise Broken(f"sample {row}: a token goes on twice at layer {layer}")


def positions(case: Case) -> None:
    """Each layer rotates the survivors at the position ids the layout declares: kept, or renumbered from 0."""
    seen: dict[int, Any] = {}
    sample = case.subject.samples[0]
    with torch.no_grad(), case.pruned(case.method()) as session:

        def note(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen[index] = kwargs["position_embeddings"]

        handles = [
            layer.register_forward_pre_hook(functools.partial(note, index), with_kwargs=True)
            for index, layer in enumerate(session.adapter.decoder_layers)
        ]
        case.model(**sample)
        for handle in handles:
            handle.remove()
        rotary, prompt = session.adapter.rotary, session.trace.prompt.samples[0]
        for layer in range(session.shape.layers):
            tokens = session.trace.entering(layer).samples[0]
            old = tokens.origin < len(prompt)
            if session.method.position_ids == "original":
                if not torch.equal(tokens.position[..., old], prompt.position[..., tokens.origin[old]]):
                    raise Broken(f"layer {layer}: survivors' position ids changed")
            elif len(tokens) < len(prompt) and not bool((tokens.position.diff(dim=-1) <= 1).all()):
                raise Broken(f"layer {layer}: renumbered position ids have gaps")
            expected = rotary(seen[layer][0], tokens.position[..., None, :])
            for found, right in zip(seen[layer], expected, strict=True):
                if not torch.allclose(found.squeeze(), right.squeeze().to(found.dtype)):
                    raise Broken(f"layer {layer}: the rotation is not that of the layout's position ids")


def budget(case: Case) -> None:
    """The realised budget is the declared one."""
    with torch.no_grad(), case.pruned(case.method()) as session:
        case.model(**case.subject.samples[0])
        found = session.trace.budget(0)
    try:
        declared = session.method.schedule(session.shape, found.visual)
    except MethodError as error:
        raise NotApplicable(str(error)) from None
    if found.per_layer != declared:
        raise Broken(f"declared {declared} visual tokens per layer, realised {found.per_layer}")


class _Planted(Exception):
    pass


def restored(case: Case) -> None:
    """After the block, or an error inside it, the model is exactly as before."""
    expected = plain(case, "sample", case.subject.samples[0])  # transformers installs hooks in the first forward
    before = fingerprint(case.model)
    with case.pruned(case.method()):
        generate(case.model, case.subject.samples[0])
    if fingerprint(case.model) != before:
        raise Broken("hooks, forwards or configs differ after the block")
    try:
        with case.pruned(case.method()):
            case.model(**case.subject.samples[0])
            raise _Planted
    except _Planted:
        pass
    if fingerprint(case.model) != before:
        raise Broken("hooks, forwards or configs differ after an error inside the block")
    if not torch.equal(steps(generate(case.model, case.subject.samples[0])), expected):
        raise Broken("the plain model answers differently after the block")


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything a session may touch, module by module."""
    return [
        (
            name,
            [list(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            sorted(key for key, value in module.__dict__.items() if callable(value) and not key.startswith("_")),
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            module.forward,
        )
        for name, module in model.named_modules()
    ]
