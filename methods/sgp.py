"""SGP, the pruning of "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs" (CVPR
2025, arXiv 2412.03324; NUS-HPC-AI-Lab/SGL at 7e76fd2).

A small model of the same family reads the image and the question first and answers. What each visual token has received
meanwhile, over all layers and heads, from the rows behind the last visual token and from every token of the answer,

    A_j = sum_{layers, heads} ( sum_{rows r of the prompt} A[r, j] + sum_{answer tokens t} A[t, j] )

ranks the tokens of the large model, which goes on with the highest from layer int(layers x depth) on. Sums, as they
are; the last answer token is not read again and adds nothing. Survivors keep order and position ids.

The released code's rows start at the last visual token itself (`rows=code`), the paper's behind it (`rows=paper`).
`answer` limits the small model's answer, on which the ranking depends. Published: 40 % from layer 19 of 48, 20 % from
9, 5 % from 2. The count is the float32 product, rounded down.

SEE, the other half of the paper: with `exit` below 1 the small model's answer x_1..x_n is taken for the large one's
when

    S = (S_conf + S_cons) / 2 > exit,    S_conf = (prod_i p_i)^(1/n),    S_cons = prod_i p'_i

where p_i are the probabilities with which it chose its tokens and p'_i those it gives them when it sees only the
highest 5 % of the visual tokens. As in the released code the large model answers in any case; `Session.early` says
where it need not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruneval.methods.base import Card, MethodError, Needs, Ranking, Shape, Step, strongest, torch
from pruneval.methods.helper import Helper, Reading

SHOWN = 0.05
"""The share of visual tokens with which the small model's answer is checked."""


@dataclass(frozen=True)
class SGP(Ranking):
    """Keeps a fraction `keep` from the layer at `depth` (a fraction of the layers) on, as a helper model ranks.

    `helper` names it: a model of the registry or a folder.
    """

    card: ClassVar[Card] = Card(
        "sgp",
        "SGP",
        seam=("layer",),
        summary="Keeps the visual tokens that a small model of the same family attends to most while it answers.",
        paper="A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs",
        year=2025,
        arxiv="2412.03324",
        repository="NUS-HPC-AI-Lab/SGL",
        commit="7e76fd2",
        prompt_aware=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        "internvl2-26b@64%": {"depth": 0.4, "keep": 0.4},
        "internvl2-26b@35%": {"depth": 0.2, "keep": 0.2},
        "internvl2-26b@9%": {"depth": 0.05, "keep": 0.05},
    }

    helper: str = ""
    depth: float = 0.4
    keep: float = 0.4
    rows: str = "code"
    answer: int = 32
    exit: float = 1.0

    def check(self) -> None:
        if not 0 <= self.depth < 1:
            raise MethodError(f"sgp: depth must be in [0, 1), not {self.depth:g}")
        if self.rows not in ("code", "paper"):
            raise MethodError(f"sgp: rows must be code or paper, not {self.rows!r}")
        if self.answer < 1:
            raise MethodError(f"sgp: answer must be at least 1, not {self.answer}")
        if not 0 <= self.exit <= 1:
            raise MethodError(f"sgp: exit must be in [0, 1], not {self.exit:g}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        again = SHOWN if self.exit < 1 else 0.0
        reading = Reading(answer=self.answer, attention=True, again=again)
        return {int(shape.layers * self.depth): Needs(helper=reading)}

    def counts(self, shape: Shape, n: int) -> dict[int, int]:
        count = int(torch.tensor(n) * self.keep)
        return {int(shape.layers * self.depth): max(1, count)}

    def score(self, step: Step) -> torch.Tensor:
        return received(step.helper, self.rows)

    def settles(self, step: Step) -> bool:
        return self.exit < 1 and certainty(step.helper, received(step.helper, self.rows)) > self.exit


def received(helper: Helper, rows: str) -> torch.Tensor:
    """(N,) what each visual token receives of the helper, from its prompt and from its answer."""
    first = int(helper.visual[-1]) + (rows == "paper")
    total = helper.answered.sum(0)
    for layer in range(helper.layers):
        for block in helper.attention(layer).blocks(range(first, helper.length)):
            total = total + block.sum((0, 1))[helper.visual]
    return total


def certainty(helper: Helper, score: torch.Tensor) -> float:
    """S: how sure the helper is of its answer, and whether the tokens that it ranks highest are enough for it."""
    confident = helper.confidence.log().mean().exp()
    chosen = strongest(score, max(1, int(torch.tensor(len(score)) * SHOWN)))
    consistent = helper.agreement(chosen).prod()
    return float(confident + consistent) / 2
