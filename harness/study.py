"""A study: methods x budgets x models x benchmarks in one strict file, and the cells it expands to.

A file looks like this::

    models: [pocket-llava]
    methods: [random, {fastv: {layer: 2}}, {pact: {keep: 0.12}}]
    budgets: [{keep: 0.5}, {avg_in: 48}]
    suites: [pocket]      # or benchmarks: [pocket-mme]; on a pocket model a suite is its pocket editions
    limit: 60             # questions of each benchmark; all if not given
    seed: 0

`keep` sets the parameter of that name; the other currencies are solved for. vanilla is always among the methods. A
method that fixes its own budget (its knob, a recipe, rates) is run once and not per budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruneval import methods, tasks
from pruneval.harness import budgets, dimensions, models, run
from pruneval.harness.errors import UserError, unknown

OWN = ("recipe", "rates")
"""Parameters that fix a method's budget, besides its knob."""

Entry = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """What a study file says; see the module."""

    models: tuple[str, ...]
    methods: tuple[Entry, ...]
    benchmarks: tuple[str, ...]
    suites: tuple[str, ...] = ()
    budgets: tuple[tuple[str, float], ...] = ()
    limit: int | None = None
    seed: int = 0

    def asked(self, pocket: bool) -> list[str]:
        """All benchmarks, named or of suites, each once; `pocket`: a suite stands for its pocket editions."""
        members = tasks.pocket_suite if pocket else tasks.suite
        return list(dict.fromkeys([*self.benchmarks, *(name for suite in self.suites for name in members(suite))]))


@dataclass
class Plan:
    """The cells of one model, how it is loaded, and what of the study can't be run there, with the reason."""

    located: models.Located
    device: str
    dtype: str
    kernel: str
    cells: list[run.Cell] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def read(path: Path) -> Study:
    """A study from its file. Raises: UserError naming the first thing that is wrong."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"can't read the study {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse(data)


def parse(data: Any) -> Study:
    """A study from plain data. Raises: UserError."""
    keys = ("models", "methods", "budgets", "benchmarks", "suites", "limit", "seed")
    if not isinstance(data, Mapping):
        raise UserError(f"a study is a mapping with keys {', '.join(keys)}, not {_said(data)}")
    for key in data:
        if key not in keys:
            raise unknown("key of a study", str(key), keys)
    names, suites = _names(data, "benchmarks", tasks.benchmarks()), _names(data, "suites", tasks.suites())
    if not names and not suites:
        raise UserError("a study needs benchmarks or suites")
    limit, seed = data.get("limit"), data.get("seed", 0)
    for key, value, least in (("limit", limit, 1), ("seed", seed, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"{key} of a study must be a whole number of at least {least}, not {_said(value)}")
    found = Study(
        models=tuple(_names(data, "models", None)),
        methods=tuple(_entry(item) for item in _list(data, "methods")),
        benchmarks=tuple(names),
        suites=tuple(suites),
        budgets=tuple(_budget(item) for item in _list(data, "budgets")),
        limit=limit,
        seed=seed,
    )
    if not found.models or not found.methods:
        raise UserError(f"a study needs {'models' if not found.models else 'methods'}")
    return found


def plans(
    study: Study, *, device: str | None = None, dtype: str | None = None, elsewhere: str | None = None
) -> list[Plan]:
    """The cells of each model; models are found but not loaded.

    Args:
        study: what the file says.
        device, dtype: see `models.resolve`.
        elsewhere: instead of `device`, one that the workers have, and perhaps not this machine.

    Raises:
        UserError: a model that is not there, or a parameter a method does not have.
    """
    made = []
    for name in study.models:
        located = models.locate(name)
        wished = dtype or (located.entry.dtype if elsewhere not in (None, "cpu") else None)
        here, dtype_name, kernel = models.resolve(located.entry, "cpu" if elsewhere else device, wished, None)
        plan = Plan(located, elsewhere or here, dtype_name, kernel)
        built = _methods(study, plan)
        asked = study.asked(pocket=bool(located.entry.packaged))
        plan.cells = run.expand(
            located, built, asked, limit=study.limit, seed=study.seed, dtype=plan.dtype, kernel=plan.kernel
        )
        made.append(plan)
    return made


def _methods(study: Study, plan: Plan) -> list[methods.Method]:
    entry = plan.located.entry
    source = entry.name if entry.name in dimensions.names() else str(plan.located.folder)
    built = {"vanilla": run.build_method("vanilla")}
    for name, params in study.methods:
        fixed = any(key in params for key in (methods.method_class(name).knob, *OWN))
        for budget in [None] if fixed or not study.budgets or name == "vanilla" else study.budgets:
            try:
                method = run.build_method(name, _at(name, params, budget, source))
            except UserError as error:
                at = "" if budget is None else f" at {budget[0]}={budget[1]:g}"
                plan.refused.append((f"{name}{at}", str(error)))
                continue
            built.setdefault(method.signature, method)
    return list(built.values())


def _at(name: str, params: dict[str, Any], budget: tuple[str, float] | None, source: str) -> dict[str, Any]:
    if budget is None:
        return params
    currency, target = budget
    if currency == "keep":
        return {**params, "keep": target}
    return budgets.choose(name, None, params, f"{currency}={target!r}", source)


# The parts of a file


def _list(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{key} of a study must be a list, not {_said(value)}")
    return value


def _names(data: Mapping[str, Any], key: str, known: Mapping[str, Any] | None) -> list[str]:
    found = []
    for item in _list(data, key):
        if not isinstance(item, str):
            raise UserError(f"{key} of a study are names, not {_said(item)}")
        if known is not None and item not in known:
            raise unknown(key.removesuffix("s"), item, known)
        found.append(item)
    return list(dict.fromkeys(found))


def _entry(item: Any) -> Entry:
    name, params = next(iter(item.items())) if isinstance(item, Mapping) and len(item) == 1 else (item, {})
    if not isinstance(name, str):
        raise UserError(f"a method of a study is a name or {{name: {{parameter: value}}}}, not {_said(item)}")
    if name not in methods.names():
        raise unknown("method", name, methods.names())
    if not isinstance(params, Mapping) or not all(isinstance(value, str | int | float) for value in params.values()):
        raise UserError(f"{name}: parameters in a study are names with one value each, not {_said(params)}")
    found = {str(key): value for key, value in params.items()}
    run.build_method(name, found)
    return name, found


def _budget(item: Any) -> tuple[str, float]:
    known = ("keep", *budgets.CURRENCIES)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise UserError(f"a budget of a study is one of {', '.join(known)} with its number, not {_said(item)}")
    currency, target = next(iter(item.items()))
    if currency not in known:
        raise unknown("currency", str(currency), known)
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < float("inf"):
        raise UserError(f"{currency} of a budget must be a number above 0, not {_said(target)}")
    if currency == "keep" and target > 1:
        raise UserError(f"keep of a budget must be at most 1, not {target:g}")
    return currency, float(target)


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
