"""`pruneval train`: trains what a method needs trained. So far IF-Prune's small model."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from pruneval.harness.errors import UserError

DESCRIPTION = """\
Trains IF-Prune's helper: low-rank weights of a small model and the bottleneck behind it, on questions with answers. The
large model has no part in it. An interrupted training goes on where it stopped.
"""
EXAMPLES = """\
examples:
  pruneval train ifprune --samples 3200 --accumulate 1 --rate 1e-3 --out ifprune.safetensors
  pruneval eval --method ifprune --set helper=pocket-llava --set checkpoint=ifprune.safetensors --set keep=0.1
"""
MEANING = {
    "rank": "of the low-rank weights",
    "alpha": "their scale times the rank",
    "batch_size": "samples per forward",
    "accumulate": "forwards per optimiser step",
    "epochs": "passes over the samples",
    "rate": "learning rate at its highest",
    "weight_decay": "of AdamW",
    "warmup": "share of the steps in which the rate rises",
    "beta_first": "weight of the divergence at first",
    "beta_last": "and at last",
    "beta_decline": "share of the steps in which it falls",
    "seed": "of weights, order and noise",
}


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from pruneval.harness.search.settings import Settings

    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("what", choices=("ifprune",))
    add("--model", default="pocket-llava", help="the small model: a name of `pruneval list models`, or a folder")
    add("--data", default="pocket", help="as for `pruneval search` (default: %(default)s)")
    add("--samples", type=int, default=2000, metavar="N", help="questions (default: %(default)s)")
    for item in fields(Settings):
        kind = {"int": int, "float": float}[str(item.type)]
        name = f"--{item.name.replace('_', '-')}"
        add(name, type=kind, default=item.default, help=f"{MEANING[item.name]} (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1")
    add("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write, a .safetensors file")


def main(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from pruneval.harness.search.settings import Settings

    if args.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, not {args.out.name}")
    settings = Settings(**{item.name: getattr(args, item.name) for item in fields(Settings)})
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, not {args.samples}")

    from safetensors.torch import save_file

    from pruneval.harness import models
    from pruneval.harness.search import data
    from pruneval.harness.search.train_ifprune import Trainer
    from pruneval.harness.search.view import View

    located = models.locate(args.model)
    samples = data.load(args.data, args.samples, settings.seed)
    trainer = Trainer(models.load(located, args.device, "float32", None), samples, settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = args.out.with_suffix(".state")
    with View(f"ifprune on {located.entry.name}") as show:
        show.expect(trainer.total)
        trainer.run(
            state,
            lambda step, seen: show.trial(
                -seen["answer"], f"step {step}: answer {seen['answer']:.3f}, divergence {seen['divergence']:.3f}"
            ),
        )
    save_file(trainer.weights(), args.out, metadata=trainer.describe())
    state.unlink(missing_ok=True)
    print(f"{args.out}: {trainer.total} steps on {len(samples.samples)} questions")
    print(f"use it: pruneval eval --method ifprune --set helper={args.model} --set checkpoint={args.out}")
    return 0
