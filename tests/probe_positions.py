"""What dropping tokens costs pocket-onevision, skill by skill, at compact and at original position ids.

    python tests/probe_positions.py [--kind image|clip] [--items 24] [--keep 0.5 0.11] [--methods random cls_topk ...]

Every question about drawn pictures or clips of the model's own test is asked by itself. Beside the share of right
answers stands how many of the tokens that hold what is asked about are among those that stay.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from test_pocket_onevision import inputs

from pruneval import methods
from pruneval.harness import models
from pruneval.harness.session import pruned
from pruneval.tasks.pocket.onevision import evaluate

METHODS = ("random", "cls_topk", "visionzip", "tome", "prumerge", "prumerge_plus")
WHOLE = ("count", "order")
"""Skills whose evidence is everything."""


@contextmanager
def positioned(name: str, keep: float, positions: str) -> Iterator[methods.Method]:
    """A method whose position ids are these, also where its card fixes them (then tokens stay in order)."""
    kind = methods.method_class(name)
    if "position_mode" in kind.__dataclass_fields__:
        yield methods.build(name, {"keep": keep, "position_mode": positions})
        return
    before, kind.positions = kind.positions, positions
    try:
        yield methods.build(name, {"keep": keep, "order": "raster"})
    finally:
        kind.positions = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("image", "clip"), default="image")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.11])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    loaded = models.load("pocket-onevision", device="cpu")
    items = evaluate.items(args.kind, args.items)
    print(row("un-pruned", *asked(loaded, methods.build("vanilla"), args.kind, items)), flush=True)
    for keep in args.keep:
        for name in args.methods:
            for positions in ("compact", "original"):
                with positioned(name, keep, positions) as method:
                    found = asked(loaded, method, args.kind, items)
                print(row(f"{name} {keep:.0%} {positions}", *found), flush=True)


def asked(loaded: models.LoadedModel, method: methods.Method, kind: str, items: list) -> tuple[dict, list[float]]:
    """Right or wrong by skill, and the share of evidence that stays of each question that has any."""
    right: dict[str, list[bool]] = defaultdict(list)
    shares: list[float] = []
    model, processor = loaded.model, loaded.processor
    for number, item in enumerate(items):
        for skill, (question, prompt) in item.asked.items():
            given = inputs(processor, kind, item, prompt)
            with torch.no_grad(), pruned(model, method, adapter=loaded.adapter) as session:
                session.sample_keys = [f"{number}{skill}"]
                out = model.generate(**given, max_new_tokens=8, do_sample=False)
            answer = processor.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
            right[skill].append(answer.strip() == question.answer)
            if question.evidence and not any(word in skill for word in WHOLE):
                tokens = session.trace.entering(0).samples[0]
                first = int(loaded.adapter.visual_mask(given["input_ids"][0]).nonzero()[0, 0])
                kept = (tokens.origin[tokens.visual] - first).numpy()
                evidence = np.unique(np.concatenate([item.held[i] for i in question.evidence]))
                shares.append(float(np.isin(evidence, kept).mean()))
    return right, shares


def row(title: str, right: dict[str, list[bool]], shares: list[float]) -> str:
    """One line."""
    every = [one for found in right.values() for one in found]
    skills = ", ".join(f"{skill} {sum(found)}/{len(found)}" for skill, found in right.items())
    return f"{title:28} right {np.mean(every):.3f} of {len(every)}  evidence {np.mean(shares):.3f}  {skills}"


if __name__ == "__main__":
    main()
