"""What `pruneval search` does for each method: its objective on the calibration samples, and the recipe's content."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pruneval import methods
from pruneval.harness import budgets, measure
from pruneval.harness.errors import UserError
from pruneval.harness.flops import lengths_of
from pruneval.harness.search import fitprune, gsearch, psigmoid, vflowopt, vtw
from pruneval.harness.search.bayes import Study, Trial
from pruneval.harness.search.objective import Objective
from pruneval.harness.search.prefix import Shared
from pruneval.harness.search.view import View
from pruneval.methods.base import Shape
from pruneval.methods.budget import solve


@dataclass
class Search:
    """What the searches share: the arguments, the model with its samples, and what is shown meanwhile."""

    args: argparse.Namespace
    objective: Objective
    shape: Shape
    tokens: int
    source: str
    study: Study
    show: View

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.shape.layers


def _gsearch(search: Search, kept: Shared) -> dict[str, Any]:
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


def _psigmoid(search: Search, kept: Shared) -> dict[str, Any]:
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
    kept.deeper(gsearch.FIRST - 1)  # layers that read every token whatever the slope
    best: list[float] = []

    def shown(trial: Trial) -> None:
        best.append(trial.value)
        search.show.trial(trial.value, f"slope {trial.params['slope']:.3f}, keep {trial.notes['keep']:.4f}")

    found = psigmoid.search(accuracy, keep_for, study=search.study, trials=trials, on_trial=shown)
    return {
        "objective": "accuracy, as a fraction",
        "budget": {"currency": currency, "target": target},
        **found,
        "accuracy": {"found": max(best), "vanilla": full},
    }


def _budget(search: Search) -> tuple[str, float, Callable[[list[int]], float] | None]:
    """Currency, target and price of a schedule."""
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


def _vflowopt(search: Search, kept: Shared) -> dict[str, Any]:
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


def _fitprune(search: Search, kept: Shared) -> dict[str, Any]:
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


def _vtw(search: Search, kept: Shared) -> dict[str, Any]:
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


SEARCHES: dict[str, Callable[[Search, Shared], dict[str, Any]]] = {
    "gsearch": _gsearch,
    "psigmoid": _psigmoid,
    "vflowopt": _vflowopt,
    "fitprune": _fitprune,
    "vtw": _vtw,
}
