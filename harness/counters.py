"""What others count: torch's own counter and calflops, beside the ledger.

Both see matrix products as they are called, so a fused attention kernel hides from calflops everywhere and from torch
on a CPU. Counts are therefore taken on the eager kernel: the model is switched for the count and back, and the result
says so. A number counted under a fused kernel is never reported.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruneval import methods
from pruneval.harness.dimensions_config import dimensions_of
from pruneval.harness.errors import UserError
from pruneval.harness.flops import ledger
from pruneval.harness.observed import observing
from pruneval.harness.session import pruned

EAGER = (
    "patch_embedding", "vision_linear", "vision_attention", "projector", "scoring", "llm_linear",
    "llm_attention_square", "head_all",
)  # fmt: skip
"""What runs in a forward that returns all logits, on the eager kernel."""


@dataclass(frozen=True)
class Count:
    """One forward as one counter sees it."""

    counter: str
    macs: int
    note: str

    def as_dict(self) -> dict[str, Any]:
        """The count for JSON."""
        return asdict(self)


@contextmanager
def eager(model: nn.Module) -> Iterator[str]:
    """Runs the model on the eager kernel within the block; yields what was done, in words."""
    parts = {"": model.config} | {name: getattr(model.config, name) for name in model.config.sub_configs}
    before = {name: part._attn_implementation for name, part in parts.items()}
    if set(before.values()) == {"eager"}:
        yield "eager kernel"
        return
    fused = ", ".join(sorted({kernel for kernel in before.values() if kernel != "eager"}))
    model.set_attn_implementation("eager")
    try:
        yield f"counted on the eager kernel: {fused}, which the model runs on, hides its attention from the counter"
    finally:
        model.set_attn_implementation(before)


def torch_count(model: nn.Module, inputs: Mapping[str, Any]) -> Count:
    """Multiply-adds of one forward by `torch.utils.flop_counter`."""
    with eager(model) as note, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return Count("torch.utils.flop_counter", counter.get_total_flops() // 2, note)


def calflops_count(model: nn.Module, inputs: Mapping[str, Tensor]) -> Count:
    """Multiply-adds of one forward by calflops.

    Raises: UserError when it is not installed, or when inputs are not all tensors (it crashes on others).
    """
    try:
        from calflops import calculate_flops
    except ImportError:
        raise UserError("calflops is not installed; it comes with `pip install 'pruneval[bench]'`") from None
    odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"calflops takes tensors only, not {', '.join(odd)}")
    with eager(model) as note, torch.no_grad(), redirect_stdout(io.StringIO()):
        _, macs, _ = calculate_flops(model, kwargs=dict(inputs), print_results=False, output_as_string=False)
    return Count("calflops", int(macs), note)


def compare(family: str, name: str = "vanilla", params: Mapping[str, Any] | None = None) -> list[Count]:
    """One prompt of a family's tiny random model, counted three ways: by the ledger (first), by torch and by calflops.

    Raises: UserError for a pair that is not supported.
    """
    from pruneval.harness import subjects

    subject, model = subjects.subject(family), subjects.tiny(family)
    sample = {key: part.double() if part.is_floating_point() else part for key, part in subject.samples[-1].items()}
    try:
        method = methods.build(name, params or dict(subjects.PARAMS.get(name, ())))
    except methods.MethodError as error:
        raise UserError(str(error)) from None
    dimensions = dimensions_of(model.config)
    # the session reads kernels when it starts, so the switch comes first
    with eager(model) as note, pruned(model, method) as session:
        with torch.no_grad(), observing(session.adapter, dimensions) as seen:
            model(**sample)
        macs = ledger(dimensions, seen.lengths(session.trace)).total(*EAGER)
        counts = [torch_count(model, sample), calflops_count(model, sample)]
    return [
        Count("ledger", macs, "from the lengths that were observed"),
        *(Count(c.counter, c.macs, note) for c in counts),
    ]


def to_text(family: str, name: str, counts: list[Count]) -> str:
    """The same for a reader."""
    lines = [f"one prompt of a tiny random {family} model, {name}"]
    for count in counts:
        difference = f"{100 * (count.macs / counts[0].macs - 1):+.3f} %" if count is not counts[0] else ""
        lines.append(f"  {count.counter:26}{count.macs / 1e6:12.4f} M multiply-adds  {difference:>10}  {count.note}")
    return "\n".join(lines)
