"""`pruneval analyze`: how a model's layers rank visual tokens, and how much attention these get, layer by layer."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import UserError
from pruneval.harness.records import write_atomically
from pruneval.tasks import benchmark

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True)
class Analysis:
    """What was seen over some questions. Layers are decoder layers, 0-based."""

    tau: np.ndarray
    """(L, L) Kendall's tau between the rankings of a question's visual tokens by two layers, mean over questions."""
    tokens: pd.DataFrame
    """kind, layer, low, median, high: quartiles of what one visual token gets, over tokens and questions."""
    share: pd.DataFrame
    """The same for all visual tokens of a question together, over questions."""
    questions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        tables = {name: getattr(self, name).to_dict("records") for name in ("tokens", "share")}
        return {"questions": self.questions, "tau": self.tau.tolist(), **tables}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--model", default="pocket-llava", help="a name of `pruneval list models`, or a folder (default: %(default)s)")
    add("--benchmark", default="pocket-gqa", metavar="B", help="whose questions are asked (default: %(default)s)")
    add("--samples", type=int, default=16, metavar="N", help="the first N questions (default: 16)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", help="float32, float16, bfloat16 (default: float32 on a CPU, else the model's own)")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="results folder (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Look, print the table, write the numbers and the figures."""
    from pruneval.harness import models
    from pruneval.reports import figures

    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, not {args.samples}")
    row = benchmark(args.benchmark)
    models.check_options(args.device, args.dtype, None)
    located = models.locate(args.model)
    device, dtype, kernel = models.resolve(located.entry, args.device, args.dtype, None)
    loaded = models.load(located, device, dtype, kernel)
    found = analysis(received(loaded, row, args.samples))
    folder = args.out / "analysis" / f"{located.entry.name}_{row.name}"
    drawn = {
        "rank-correlation": figures.rank_correlation(found.tau),
        "attention": figures.attention(found.share),
        "attention-per-token": figures.attention(found.tokens),
    }
    write_atomically(folder / "analysis.json", (json.dumps(found.to_dict(), indent=1) + "\n").encode())
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.svg", figures.svg(figure).encode())
    print(to_text(found, f"{located.entry.name} on {row.title}"))
    print(f"written to {folder}", file=sys.stderr)
    return 0


def received(loaded: Any, row: Any, samples: int) -> list[np.ndarray]:
    """(L, N) per question: the attention that each visual token gets from the text behind it, mean over heads."""
    import numpy as np

    from pruneval.harness.looking import Received
    from pruneval.harness.progress import progress
    from pruneval.harness.show import Asked

    probe = Received()
    reason = loaded.adapter.supports(probe)
    if reason:
        raise UserError(reason)
    found = []
    count = min(samples, row.n)
    with progress().cell(f"attention of {count} questions") as tell:
        asked = Asked(loaded, row.name, count - 1)
        for at, instance in enumerate(asked.all[:count]):
            asked.instance = instance
            probe.seen.clear()
            asked.answer(probe)
            layers = probe.seen[0]
            if layers:
                found.append(np.stack([layers[layer].mean(dim=0).numpy() for layer in sorted(layers)]))
            tell(at + 1, count)
    if not found:
        raise UserError(f"no question of {row.name!r} has an image with text behind it")
    return found


def analysis(seen: list[np.ndarray]) -> Analysis:
    """Rank correlations and medians.

    Args:
        seen: (L, N) per question, as `received` gives them; N may differ.
    """
    import numpy as np
    import pandas as pd
    from scipy.stats import kendalltau

    layers = len(seen[0])
    tau = np.zeros((layers, layers))
    for scores in seen:
        for one in range(layers):
            tau[one, one] += 1
            for other in range(one):
                value = kendalltau(scores[one], scores[other]).statistic
                tau[one, other] += value
                tau[other, one] += value
    tokens = np.concatenate(seen, axis=1)
    together = np.stack([scores.sum(axis=1) for scores in seen], axis=1)

    def quartiles(values: np.ndarray, kind: str) -> pd.DataFrame:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
        return pd.DataFrame({"kind": kind, "layer": range(layers), "low": low, "median": median, "high": high})

    return Analysis(
        tau / len(seen),
        quartiles(tokens, "one visual token"),
        quartiles(together, "all visual tokens together"),
        len(seen),
    )


def to_text(found: Analysis, title: str) -> str:
    """A line per layer."""
    import numpy as np

    following = [*np.diagonal(found.tau, 1), float("nan")]
    lines = [
        f"# {title}: attention of the text to the image, {found.questions} questions",
        "",
        "| layer | all visual tokens, median | one visual token, median | Kendall's tau to the next layer |",
        "|------:|--------------------------:|-------------------------:|--------------------------------:|",
    ]
    for layer, tau in enumerate(following):
        share, token = found.share["median"][layer], found.tokens["median"][layer]
        end = "-" if np.isnan(tau) else f"{tau:.3f}"
        lines.append(f"| {layer:5} | {share:25.4f} | {token:24.6f} | {end:>31} |")
    return "\n".join(lines) + "\n"
