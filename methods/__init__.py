"""The registry of pruning methods: small, strict, lazy. A new method is one file and one line in METHODS."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Mapping
from typing import Any

from pruneval.methods.base import Card, Method, MethodError

__all__ = ["METHODS", "Card", "Method", "MethodError", "build", "card", "method_class", "names"]

METHODS = {  # name: class, in the module of the same name
    "vanilla": "Vanilla",
    "random": "Random",
    "uniform": "Uniform",
    "avgpool": "AvgPool",
    "resize": "Resize",
    "cls_topk": "ClsTopK",
    "fastervlm": "FasterVLM",
    "divprune": "DivPrune",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMergePlus",
    "hiprune": "HiPrune",
    "vispruner": "VisPruner",
    "gprune": "GPrune",
    "holov": "HoloV",
    "fastv": "FastV",
    "pdrop": "PDrop",
    "tome": "ToMe",
    "flowcut": "FlowCut",
    "visionzip": "VisionZip",
    "vflowopt": "VFlowOpt",
    "trim": "Trim",
    "cdpruner": "CDPruner",
    "rcom": "RCom",
    "vtw": "VTW",
    "sgp": "SGP",
    "ifprune": "IFPrune",
    "deco": "DeCo",
    "tokenpacker": "TokenPacker",
    "gsearch": "GSearch",
    "psigmoid": "PSigmoid",
    "fitprune": "FitPrune",
    "dart": "DART",
    "feather": "Feather",
    "sparsevlm": "SparseVLM",
    "pact": "Pact",
    "st3": "ST3",
    "dycoke": "DyCoke",
    "framefusion": "FrameFusion",
    "prunevid": "PruneVid",
}


def names() -> list[str]:
    """Every method's name, baselines first."""
    return list(METHODS)


def method_class(name: str) -> type[Method]:
    """The class behind a name. Raises: MethodError for an unknown name."""
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}; {_hint(name, METHODS)}")
    return getattr(importlib.import_module(f"pruneval.methods.{name}"), METHODS[name])


def card(name: str) -> Card:
    """A method's card, without importing torch. Raises: MethodError for an unknown name."""
    return method_class(name).card


def build(name: str, params: Mapping[str, str | int | float | bool] | None = None) -> Method:
    """A method from its name and parameters; strings are parsed by the type of the parameter.

    Raises: MethodError, in one line.
    """
    cls = method_class(name)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in (params or {}).items():
        if key not in fields:
            raise MethodError(f"{name} has no parameter {key!r}; {_hint(key, fields)}")
        values[key] = _parse(name, key, str(fields[key].type), value)
    method = cls(**values)
    object.__setattr__(method, "_given", values)
    return method


def _hint(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "it has none"


def _parse(method: str, key: str, kind: str, value: Any) -> Any:
    try:
        if kind == "bool":
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            return bool(value)
        if kind == "int":
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        if kind == "float":
            number = float(value)
            if math.isnan(number) or isinstance(value, bool):
                raise ValueError
            return number
    except (ValueError, KeyError, TypeError):
        word = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise MethodError(f"{method}: {key} must be {word}, not {value!r}") from None
    return str(value)
