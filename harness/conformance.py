"""What the engine promises about every method on every model, as checks that can be run on anybody's method or model.

A check gets a `Case` (one method on one subject) and returns when the promise holds, raises `Broken` with what was
seen when it does not, and `NotApplicable` with the reason where the promise makes no sense for the pair.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruneval import methods
from pruneval.harness.adapters import Adapter, adapter_for
from pruneval.harness.errors import UserError
from pruneval.harness.session import Session, pruned
from pruneval.methods.base import Method, MethodError, Step

NEW = 3
"""Tokens generated per prompt."""

Inputs = dict[str, Any]


class Broken(AssertionError):
    """A promise does not hold; the message says what was seen."""


class NotApplicable(Exception):
    """The promise makes no sense for the pair; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A model to check on, with prompts.

    Attributes:
        name: for the table.
        model: kernel -> the model under that attention kernel.
        samples: single prompts of different lengths, each with images or videos; the first with one.
        batch: samples -> one left-padded batch.
        text: a prompt without images, or None.
        tolerance: largest difference between logits that should be equal, relative to their spread.
        adapter: the adapter of a model, with whatever its methods need besides.
        plain: what the plain model under the default kernel says to some inputs, once it has been asked.
    """

    name: str
    model: Callable[[str], nn.Module]
    samples: tuple[Inputs, ...]
    batch: Callable[..., Inputs]
    text: Inputs | None = None
    tolerance: float = 1e-6
    adapter: Callable[[nn.Module], Adapter] = adapter_for
    plain: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Case:
    """One method on one subject. `given` are parameters besides `keep`."""

    name: str
    subject: Subject
    keep: float = 0.4
    given: tuple[tuple[str, Any], ...] = ()

    def method(self, keep: float | None = None, **params: Any) -> Method:
        """The method at this case's budget (or at `keep`)."""
        known = {item.name for item in dataclasses.fields(methods.method_class(self.name))}
        budget = {"keep": self.keep if keep is None else keep} if "keep" in known else {}
        return methods.build(self.name, budget | dict(self.given) | {k: v for k, v in params.items() if k in known})

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model under the default kernel."""
        return self.subject.model("sdpa")

    def pruned(self, method: Method, model: nn.Module | None = None) -> AbstractContextManager[Session]:
        """The block in which the subject's model (or `model`) is pruned."""
        model = self.model if model is None else model
        return pruned(model, method, adapter=self.subject.adapter(model))


def generate(model: Any, inputs: Inputs, **options: Any) -> Any:
    """Greedy generation of `NEW` tokens with the logits of every step and the cache."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def steps(out: Any) -> Tensor:
    """(B, NEW, vocabulary) logits of a generation."""
    return torch.stack(out.logits, dim=1)


def _plain(case: Case, name: str, inputs: Inputs) -> Tensor:
    """The plain model's logits for these inputs, which it is asked for once."""
    if name not in case.subject.plain:
        case.subject.plain[name] = steps(generate(case.model, inputs))
    return case.subject.plain[name]


def _same(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    finite = expected.isfinite() & found.isfinite()
    spread = float(expected[finite].std()) if bool(finite.any()) else 1.0
    worst = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    if worst > tolerance * max(spread, 1e-12):
        raise Broken(f"{what}: logits differ by {worst:.2g} (spread {spread:.2g})")


def _samples(case: Case) -> Iterator[tuple[str, Inputs]]:
    for index, sample in enumerate(case.subject.samples):
        yield str(index), sample


# The promises


def keep_all(case: Case) -> None:
    """keep=1 is bit-identical to the plain model with the same kernel."""
    if "keep" not in case.method().params and case.name != "vanilla":
        raise NotApplicable("has no keep parameter")
    inputs = case.subject.batch(*case.subject.samples)
    expected = _plain(case, "batch", inputs)
    with case.pruned(case.method(1.0)):
        found = steps(generate(case.model, inputs))
    if not torch.equal(found, expected):
        raise Broken(f"logits differ from the plain model's by {float((found - expected).abs().max()):.2g}")


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
    _same(dropped, masked, "dropping against masking", case.subject.tolerance)


def batches(case: Case) -> None:
    """A ragged, left-padded batch gives what its samples give one by one."""
    with case.pruned(case.method()) as session:
        singles = []
        for key, sample in _samples(case):
            session.sample_keys = [key]
            singles.append(steps(generate(case.model, sample)))
        session.sample_keys = [key for key, _ in _samples(case)]
        together = steps(generate(case.model, case.subject.batch(*case.subject.samples)))
    _same(together, torch.cat(singles), "batch against single prompts", case.subject.tolerance)


def text_only(case: Case) -> None:
    """A prompt without images passes untouched, alone and beside others."""
    if case.subject.text is None:
        raise NotApplicable("no text-only prompt for this model")
    expected = _plain(case, "text", case.subject.text)
    with case.pruned(case.method()):
        alone = steps(generate(case.model, case.subject.text))
        mixed = steps(generate(case.model, case.subject.batch(case.subject.samples[0], case.subject.text)))[1:]
    if not torch.equal(alone, expected):
        raise Broken("a text-only prompt is answered differently")
    _same(mixed, expected, "text-only prompt in a batch", case.subject.tolerance)


def kernels(case: Case) -> None:
    """SDPA and eager attention give the same."""
    found = []
    for kernel in ("sdpa", "eager"):
        model = case.subject.model(kernel)
        with case.pruned(case.method(), model):
            found.append(steps(generate(model, case.subject.samples[0])))
    _same(found[0], found[1], "sdpa against eager", max(1e-3, case.subject.tolerance))


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


class _Planted(Exception):
    pass


def restored(case: Case) -> None:
    """After the block, or an error inside it, the model is exactly as before."""
    plain = _plain(case, "sample", case.subject.samples[0])  # transformers installs hooks in the first forward
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
    if not torch.equal(steps(generate(case.model, case.subject.samples[0])), plain):
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


CHECKS: dict[str, Callable[[Case], None]] = {
    "keep=1": keep_all,
    "once": layers_once,
    "tower": tower_lengths,
    "cache": cache_lengths,
    "text": text_stays,
    "positions": positions,
    "masking": masking,
    "batch": batches,
    "text-only": text_only,
    "kernels": kernels,
    "budget": budget,
    "reversal": reversal,
    "state": stateless,
    "restored": restored,
}
"""The promises by their column in the table."""


@dataclass(frozen=True)
class Verdict:
    """How one check ended: "pass", "fail" or "n/a", with what was seen or the reason."""

    method: str
    subject: str
    check: str
    status: str
    note: str = ""


def verdicts(case: Case, checks: dict[str, Callable[[Case], None]] = CHECKS) -> Iterator[Verdict]:
    """Runs the checks on one pair; an unsupported pair is one "n/a" with its reason."""
    try:
        with case.pruned(case.method()):
            pass
    except (UserError, MethodError) as error:
        yield Verdict(case.name, case.subject.name, "*", "n/a", str(error))
        return
    for name, check in checks.items():
        try:
            check(case)
            status, note = "pass", ""
        except NotApplicable as reason:
            status, note = "n/a", str(reason)
        except Exception as error:  # a check that crashes has found something too
            status, note = "fail", str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        yield Verdict(case.name, case.subject.name, name, status, " ".join(note.split())[:300])
