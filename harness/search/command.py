"""`pruneval search`: finds a method's strategy on a few samples and writes it as a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneval import methods
from pruneval.harness import budgets
from pruneval.harness.errors import UserError
from pruneval.harness.search import recipe

DESCRIPTION = """\
Finds what a method leaves to a search: G-Search's shares per layer, P-Sigmoid's slope, VFlowOpt's six knobs, FitPrune's
deletions, VTW's layer. The result is a small JSON file, used as --set recipe=FILE. Beside it lie the trials
(FILE.trials), from which a search that was interrupted goes on, and a plot (FILE.png).
"""
EXAMPLES = """\
examples:
  pruneval search --method gsearch --out recipes/gsearch.json
  pruneval search --method psigmoid --budget avg_in=48 --out recipes/psigmoid.json
  pruneval search --method psigmoid --match "fastv(layer=2,keep=0.125)" --out recipes/psigmoid.json
  pruneval search --method fitprune --keep 0.4 --samples 50 --out recipes/fitprune.json
  pruneval search --method vtw --data pocket-scienceqa --samples 20 --first 1 --out recipes/vtw.json
  pruneval eval --method gsearch --set recipe=recipes/gsearch.json
"""
SAMPLES = {"gsearch": 300, "psigmoid": 300, "vflowopt": 30, "fitprune": 50, "vtw": 20}


def add_arguments(options: argparse.ArgumentParser) -> None:
    """The options of the command."""
    options.description, options.epilog = DESCRIPTION, EXAMPLES
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--method", required=True, choices=sorted(SAMPLES), help="whose strategy to find")
    add("--model", default="pocket-llava", help="a name of `pruneval list models`, or a folder (default: %(default)s)")
    add(
        "--data",
        default="pocket",
        help="pocket (training questions of all pocket editions), pocket-gqa ..., or a folder, file or hub id with "
        "columns image, question, answer; :split behind it (default: %(default)s)",
    )
    add("--samples", type=int, metavar="N", help=f"calibration samples (default: {SAMPLES})")
    add("--budget", metavar="CURRENCY=VALUE", help="psigmoid, vflowopt: avg_in=48; psigmoid also tflops=...")
    add("--match", metavar="METHOD(...)", help="psigmoid: the budget is this method's TFLOPs, as fastv(keep=0.125)")
    add("--keep", type=float, help="fitprune: share of the visual tokens' FLOPs to keep (default: 0.4)")
    add(
        "--trials",
        type=int,
        metavar="T",
        help="gsearch: suggestions per boundary behind 10 initial ones (15); others: in all",
    )
    add("--stride", type=int, default=3, help="gsearch: boundaries from one search to the next (default: %(default)s)")
    add("--eta", type=float, default=0.003, help="vtw: threshold of the divergence (default: %(default)s)")
    add("--first", type=int, default=5, help="vtw: first layer tried (default: %(default)s)")
    add("--target", default="last", choices=("last", "mean", "first", "top3"), help="vflowopt: tokens compared")
    add("--batch-size", type=int, default=16, metavar="B", help="changes no result (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of samples and suggestions (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1")
    add("--dtype", help="float32, float16, bfloat16")
    add("--out", type=Path, required=True, metavar="FILE", help="the recipe to write")


@dataclass
class Search:
    """What the searches share: the arguments, the model with its samples, and what is shown meanwhile."""

    args: argparse.Namespace
    objective: Any
    shape: Any
    tokens: int
    source: str
    study: Any
    show: Any

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.shape.layers


def main(args: argparse.Namespace) -> int:
    """Run the search; returns the exit code."""
    if args.out.suffix != ".json":
        raise UserError(f"--out must end in .json, not {args.out.name}")
    for name in ("samples", "trials", "stride", "first", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    _fits(args)

    from pruneval.harness import dimensions, models
    from pruneval.harness.search import data
    from pruneval.harness.search.bayes import Study
    from pruneval.harness.search.objective import Objective
    from pruneval.harness.search.view import View

    located = models.locate(args.model)
    calibration = data.load(args.data, args.samples or SAMPLES[args.method], args.seed)
    loaded = models.load(located, args.device, args.dtype, None)
    objective = Objective(loaded, calibration, args.batch_size, args.seed)
    tokens = objective.tokens()
    content = {
        "method": args.method,
        "model": located.entry.name,
        "revision": loaded.revision,
        "layers": loaded.adapter.shape.layers,
        "tokens": tokens,
        "data": {"name": calibration.name, "hash": calibration.digest, "samples": len(calibration.samples)},
        "seed": args.seed,
        "trials": _trials(args.out).name,
    }
    journal = _continue(args, content)
    named = located.entry.name in dimensions.names()
    source = located.entry.name if named else str(located.folder)
    with View(f"{args.method} on {located.entry.name}") as show, objective.sharing() as kept:
        search = Search(args, objective, loaded.adapter.shape, tokens, source, Study(journal, args.seed), show)
        found = SEARCHES[args.method](search, kept)
    recipe.write(args.out, content | found)
    show.plot(args.out.with_suffix(".png"))
    print(f"{args.out}: {show.summary()}")
    print(f"use it: pruneval eval --model {args.model} --method {args.method} --set recipe={args.out}")
    return 0


def _fits(args: argparse.Namespace) -> None:
    """Refuses options that mean nothing for the method."""
    takes = {"budget": ("psigmoid", "vflowopt"), "match": ("psigmoid",), "keep": ("fitprune",)}
    for name, of in takes.items():
        if getattr(args, name) is not None and args.method not in of:
            raise UserError(f"--{name} is for {' and '.join(of)}, not for {args.method}")
    if args.method in takes["budget"] and (args.budget is None) == (args.match is None):
        raise UserError(
            f"{args.method} needs --budget" + (" or --match, not both" if args.method == "psigmoid" else "")
        )
    if args.keep is not None and not 0 < args.keep < 1:
        raise UserError(f"--keep must lie between 0 and 1, not {args.keep:g}")


def _trials(out: Path) -> Path:
    return out.with_name(f"{out.stem}.trials")


def _continue(args: argparse.Namespace, content: dict[str, Any]) -> Path:
    """The journal of trials; one of another search is refused."""
    import json

    journal, settings = _trials(args.out), args.out.with_name(f"{args.out.stem}.settings")
    asked = content | {
        name: getattr(args, name) for name in ("budget", "match", "keep", "stride", "eta", "first", "target")
    }
    text = json.dumps(asked, sort_keys=True)
    if journal.exists() and settings.exists() and settings.read_text() != text:
        raise UserError(f"{journal} holds the trials of another search; give another --out, or delete it")
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(text)
    return journal


# The searches


def _gsearch(search: Search, kept: Any) -> dict[str, Any]:
    from pruneval.harness.search import gsearch

    args, full = search.args, search.objective.accuracy(methods.build("vanilla"))
    search.show.note(f"accuracy without pruning: {full:.3f}")
    trials = 15 if args.trials is None else args.trials
    boundaries = range(gsearch.FIRST, search.layers, args.stride)
    if not boundaries:
        raise UserError(f"gsearch needs more than {gsearch.FIRST} decoder layers")
    search.show.expect(len(boundaries) * (10 + trials))

    def accuracy(rates: dict[int, float]) -> float:
        held = [rates[max(known for known in rates if known <= b)] for b in boundaries]
        text = ",".join(repr(rate) for rate in held)
        return search.objective.accuracy(methods.build("gsearch", {"rates": text, "stride": args.stride}))

    rates = gsearch.search(
        accuracy,
        layers=search.layers,
        tokens=search.tokens,
        study=search.study,
        stride=args.stride,
        trials=trials,
        before=lambda boundary: kept.deeper(boundary - 1),
        on_trial=lambda boundary, trial: search.show.trial(
            trial.value, f"layer {boundary}: {trial.notes['count']} tokens, accuracy {trial.notes['accuracy']:.3f}"
        ),
    )
    kept.deeper(0)
    found = accuracy(rates)
    return {
        "objective": "accuracy - 0.01 * rate, accuracy as a fraction",
        "lambda": 0.01,
        "stride": args.stride,
        "rates": {str(boundary): rate for boundary, rate in rates.items()},
        "accuracy": {"found": found, "vanilla": full},
    }


def _psigmoid(search: Search, kept: Any) -> dict[str, Any]:
    from pruneval.harness.search import psigmoid
    from pruneval.methods.budget import solve

    currency, target, price = _budget(search)

    def keep_for(slope: float) -> float:
        try:
            solved = solve("psigmoid", {"slope": slope}, search.shape, search.tokens, currency, target, price)
        except methods.MethodError as error:
            raise UserError(str(error)) from error
        return solved["keep"]

    def accuracy(keep: float, slope: float) -> float:
        return search.objective.accuracy(methods.build("psigmoid", {"keep": keep, "slope": slope}))

    full = search.objective.accuracy(methods.build("vanilla"))
    search.show.note(f"accuracy without pruning: {full:.3f}; budget: {currency} = {target:.6g}")
    trials = search.args.trials or psigmoid.INITIAL + 12
    search.show.expect(trials)
    kept.deeper(psigmoid_depth())
    best: list[float] = []

    def shown(trial: Any) -> None:
        best.append(trial.value)
        search.show.trial(trial.value, f"slope {trial.params['slope']:.3f}, keep {trial.notes['keep']:.4f}")

    found = psigmoid.search(accuracy, keep_for, study=search.study, trials=trials, on_trial=shown)
    return {
        "objective": "accuracy, as a fraction",
        "budget": {"currency": currency, "target": target},
        **found,
        "accuracy": {"found": max(best), "vanilla": full},
    }


def psigmoid_depth() -> int:
    """Layers that read every token whatever the slope."""
    from pruneval.methods.gsearch import FIRST

    return FIRST - 1


def _budget(search: Search) -> tuple[str, float, Callable[[list[int]], float] | None]:
    """Currency, target and price of a schedule."""
    from dataclasses import replace

    from pruneval.harness import measure
    from pruneval.harness.flops import lengths_of

    args = search.args
    dimensions = measure.dimensions_for(search.source)
    whole = lengths_of(dimensions, visual=search.tokens)

    def price(plan: list[int]) -> float:
        return measure.cost(dimensions, replace(whole, visual=tuple(plan)))["tflops"]

    if args.match is None:
        currency, target = budgets.asked(args.budget)
        if currency not in ("avg_in", "kept_after", "final", "tflops"):
            raise UserError(f"a search takes avg_in, kept_after, final or tflops, not {currency}")
        return currency, target, price if currency == "tflops" else None
    name, _, inner = args.match.rstrip(")").partition("(")
    reference = methods.build(name, budgets.parameters([pair for pair in inner.split(",") if pair]))
    try:
        return "tflops", price(reference.schedule(search.shape, search.tokens)), price
    except methods.MethodError as error:
        raise UserError(str(error)) from error


def _vflowopt(search: Search, kept: Any) -> dict[str, Any]:
    from pruneval.harness.search import vflowopt

    currency, target, _ = _budget(search)
    if currency != "avg_in":
        raise UserError(f"vflowopt's budget is avg_in, not {currency}")
    keep = target / search.tokens
    if not 0 < keep < 1:
        raise UserError(f"avg_in={target:g} is not below the {search.tokens} visual tokens of a sample")
    choose = vflowopt.TARGETS[search.args.target]
    full = search.objective.states(methods.build("vanilla"), choose)
    trials = search.args.trials or vflowopt.TRIALS
    search.show.expect(trials)

    def objective(params: dict[str, float]) -> float:
        try:
            method = methods.build("vflowopt", _knobs(keep, params))
            method.needs(search.shape)
        except methods.MethodError:  # R1 and R2 alone leave more than the budget
            return 0.0
        return vflowopt.similarity(search.objective.states(method, choose), full)

    side = round(search.tokens**0.5)
    found, _ = vflowopt.search(
        objective,
        vflowopt.space(keep, side),
        study=search.study,
        trials=trials,
        on_trial=lambda trial: search.show.trial(
            trial.value, ", ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
        ),
    )
    return {
        "objective": f"sum over samples of the cosine at the {search.args.target} token",
        "budget": {"currency": currency, "target": target},
        **_knobs(keep, found),
    }


def _knobs(keep: float, params: dict[str, float]) -> dict[str, Any]:
    rest = {name: params[name] for name in ("trust", "alpha", "side")}
    return {"keep": keep, "rates": f"{params['first']!r},{params['second']!r}", **rest}


def _fitprune(search: Search, kept: Any) -> dict[str, Any]:
    from pruneval.harness.search import fitprune

    keep = 0.4 if search.args.keep is None else search.args.keep
    text = search.objective.loaded.model.config.get_text_config()
    cost = fitprune.Cost(text.hidden_size, text.intermediate_size)
    search.show.expect(9)

    def run(fit: fitprune.Fit) -> None:
        search.objective.states(fit)

    alpha, deleted = fitprune.search(
        run,
        layers=search.layers,
        tokens=search.tokens,
        cost=cost,
        keep=keep,
        on_trial=lambda alpha, share: search.show.trial(
            -abs(share - keep), f"alpha {alpha:.4f}: {share:.3f} of the FLOPs"
        ),
    )
    return {
        "objective": f"attention mass kept within alpha, {keep:g} of the visual tokens' FLOPs",
        "alpha": alpha,
        "deleted": {f"{100 * (1 - keep):g}": deleted},
        "flops_share": cost.share(search.tokens, deleted),
    }


def _vtw(search: Search, kept: Any) -> dict[str, Any]:
    from pruneval.harness.search import vtw

    args = search.args
    full = search.objective.distributions(methods.build("vanilla"))
    search.show.expect(max(0, search.layers - args.first))

    def divergence(layer: int) -> float:
        return vtw.divergence(search.objective.distributions(methods.build("vtw", {"layer": str(layer)})), full)

    layer, curve = vtw.search(
        divergence,
        layers=search.layers,
        eta=args.eta,
        first=args.first,
        on_layer=lambda layer, value: search.show.trial(-value, f"layer {layer}: {value:.5f} nats"),
    )
    return {
        "objective": f"first layer with KL(withdrawn || full) <= {args.eta:g} nats",
        "layer": layer,
        "divergence": {str(number): value for number, value in curve.items()},
    }


SEARCHES: dict[str, Callable[[Search, Any], dict[str, Any]]] = {
    "gsearch": _gsearch,
    "psigmoid": _psigmoid,
    "vflowopt": _vflowopt,
    "fitprune": _fitprune,
    "vtw": _vtw,
}
