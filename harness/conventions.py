"""What papers print as "TFLOPs": named sums over the ledger, each with the list of what it leaves out.

A convention is one small object. It never sees a method; it sees a model's dimensions, the lengths of one sample and
their ledger. All of them are about the prefill; decoding is a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pruneval.harness.dimensions import Dimensions
from pruneval.harness.errors import unknown
from pruneval.harness.flops import Ledger, Lengths

ELEMENTWISE = "element-wise work: norms, softmax, activations, rotary embedding, look-ups"
NAMES = {
    "patch_embedding": "patch embedding",
    "vision_linear": "vision tower, matrices",
    "vision_attention": "vision tower, attention",
    "projector": "projector",
    "helpers": "helper models",
    "scoring": "the method's own scores",
    "llm_linear": "LLM, matrices",
    "llm_attention_square": "LLM, attention",
    "llm_attention_causal": "LLM, attention (causal half)",
    "head_all": "output layer on every remaining token",
    "head_last": "output layer on the last token",
}
EITHER = (("llm_attention_square", "llm_attention_causal"), ("head_all", "head_last"))
"""Two ways to count one part: a convention that counts one has not left the other out."""


@dataclass(frozen=True)
class Convention:
    """One way to turn a ledger into a printed number."""

    name: str
    title: str
    factor: int
    """Operations printed per multiply-add."""
    parts: tuple[str, ...] = ()
    """Parts of the ledger that are added up."""
    formula: Callable[[Dimensions, Lengths], int] | None = None
    """Or: a closed formula in multiply-adds that needs no ledger."""
    notes: tuple[str, ...] = ()
    """What it leaves out or gets wrong beyond whole parts."""
    whole_params: bool = False
    """Counts every parameter of the checkpoint, whatever the paper's table covers."""

    def macs(self, dimensions: Dimensions, lengths: Lengths, ledger: Ledger) -> int:
        """Multiply-adds of the prefill under this convention."""
        return self.formula(dimensions, lengths) if self.formula else ledger.total(*self.parts)

    def decode_macs(self, ledger: Ledger) -> int:
        """Multiply-adds of the tokens after the first; never part of the prefill's number."""
        return 0 if self.formula else ledger.total("decode_linear", "decode_attention", "decode_head")

    def not_counted(self, ledger: Ledger) -> list[str]:
        """What the prefill's number leaves out, with its size in TFLOP (two per multiply-add)."""
        left = list(self.notes)
        counted = set(self.parts)
        for usual, other in EITHER:
            counted |= {usual, other} if counted & {usual, other} else {other}
        for part, text in NAMES.items():
            if not self.formula and part not in counted and getattr(ledger, part):
                left.append(f"{text} ({tera(2 * getattr(ledger, part))} TFLOP)")
        return [*left, ELEMENTWISE]


def tera(count: float) -> str:
    """A count in units of 10^12, to four significant digits."""
    return f"{count / 1e12:.4g}"


def _fastv(dimensions: Dimensions, lengths: Lengths) -> int:
    d, m = dimensions.decoder.hidden, dimensions.decoder.mlp
    return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in lengths.visual)


def _gated(dimensions: Dimensions, tokens: tuple[int, ...]) -> int:
    d, m = dimensions.decoder.hidden, dimensions.decoder.mlp
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in tokens)


_GSEARCH = ("patch_embedding", "vision_linear", "projector", "llm_linear", "llm_attention_square", "head_all")
_ALL = ("patch_embedding", "vision_linear", "vision_attention", "projector", "helpers", "scoring", "llm_linear")
_GQA = "grouped-query attention (keys and values count in full)"
_FORMULA = ("vision tower", "projector", "output layer", "the method's own scores", "helper models", "decode")

CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "gsearch",
            "2 x MAC as in G-Search's tables (calflops, eager kernel), prefill",
            2,
            _GSEARCH,
            notes=("decode (in decode_tflops)",),
        ),
        Convention(
            "macs", "MAC over the same parts as gsearch, prefill", 1, _GSEARCH, notes=("decode (in decode_tflops)",)
        ),
        Convention(
            "fastv",
            "FastV: sum over layers of 4nd^2 + 2n^2d + 2ndm, n visual tokens",
            1,
            formula=_fastv,
            notes=("text tokens", "the third matrix of a gated feed-forward network", _GQA, *_FORMULA),
        ),
        Convention(
            "pdrop",
            "PyramidDrop: sum over layers of 4nd^2 + 2n^2d + 3ndm, n visual tokens",
            1,
            formula=lambda d, n: _gated(d, n.visual),
            notes=("text tokens", _GQA, *_FORMULA),
        ),
        Convention(
            "sparsevlm",
            "SparseVLM: sum over layers of 4nd^2 + 2n^2d + 3ndm, n all tokens",
            1,
            formula=lambda d, n: _gated(d, n.llm),
            notes=(_GQA, *_FORMULA),
        ),
        Convention(
            "true",
            "2 x MAC of all that runs, fused kernel: causal half of the attention, head on the last token",
            2,
            (*_ALL, "llm_attention_causal", "head_last"),
            whole_params=True,
            notes=("decode (in decode_tflops)",),
        ),
        Convention(
            "true-eager",
            "2 x MAC of all that runs, eager kernel: attention in full, head on the last token",
            2,
            (*_ALL, "llm_attention_square", "head_last"),
            whole_params=True,
            notes=("decode (in decode_tflops)",),
        ),
        Convention(
            "calflops-flash",
            "gsearch with a flash kernel, which calflops does not see: no attention of the LLM",
            2,
            tuple(part for part in _GSEARCH if part != "llm_attention_square"),
            notes=("decode (in decode_tflops)",),
        ),
    )
}


def convention(name: str) -> Convention:
    """The convention of that name; `UserError` for any other."""
    if name not in CONVENTIONS:
        raise unknown("convention", name, CONVENTIONS)
    return CONVENTIONS[name]
