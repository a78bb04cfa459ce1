"""Measured times and bytes in a paper's table: documents of `pruneval bench`, joined by model, prompt and method.

A time is only quoted with its machine, and a change is one of two contestants of the same contest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.reports.bench import busy, where
from pruneval.reports.fitting import Found, close, fits, model_of, wanted
from pruneval.reports.layout import Layout

Contest = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A document and one of its settings."""
SCHEMA = 1
VANILLA = "vanilla"
METRICS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "prefill_s": ("prefill", lambda row: row["prefill"]["median"]),
    "latency_ms": ("prefill", lambda row: 1e3 * row["prefill"]["median"]),
    "decode_s_per_token": ("decode", lambda row: row["decode"]["median"]),
    "kv_cache_mb": ("", lambda row: 1e-6 * row["kv_cache"]["prefill"]["full_heads"]),
    "kv_ratio": ("", lambda row: row["implied"]["kv_ratio"]),
}
"""metric -> the timed phase ("" where bytes or tokens were counted), and the number in the printed unit."""
WIDTHS = {"kv_cache_mb": ("float16", "bfloat16")}
"""Types in which bytes mean what the papers mean by them."""


def read(path: Path) -> dict[str, Any]:
    """A document of `pruneval bench`. Raises: UserError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--bench {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--bench {path} is no JSON; it takes what `pruneval bench --out` wrote") from None
    if not isinstance(document, dict) or not {"model", "machine", "protocol", "settings"} <= set(document):
        raise UserError(f"--bench {path} is no document of `pruneval bench`")
    if document.get("schema") != SCHEMA:
        raise UserError(f"--bench {path} has schema {document.get('schema')!r}; this version reads {SCHEMA}")
    return document


class Benched:
    """A layout and the documents that may fill it."""

    def __init__(self, layout: Layout, documents: Iterable[Mapping[str, Any]]) -> None:
        self.layout = layout
        self.documents = list(documents)

    def found(self, address: Mapping[str, Any], metric: str) -> Found:
        """Our number for one cell, with the machine as its footnote."""
        contests, reason = self._contests(address, metric)
        for document, setting in contests:
            row = _row(setting, address)
            if row is not None:
                value = METRICS[metric][1](row)
                return Found(value, notes=(_note(document, setting, row),), signatures=(_signature(document, row),))
        return Found(reason=reason or _left_out(contests, address))

    def change(self, address: Mapping[str, Any], metric: str) -> Found:
        """By how many per cent it differs from vanilla in the same contest."""
        contests, reason = self._contests(address, metric)
        phase = METRICS[metric][0]
        for document, setting in contests:
            row = _row(setting, address)
            if row is None or VANILLA not in row["against"]:
                continue
            against = row["against"][VANILLA]
            value = 100 * (1 / against[phase]["ratio"] - 1) if phase else 100 * (against["kv_ratio"] - 1)
            signature = _signature(document, row)
            if phase:
                signature += "|{ratio:.2f}x faster [{low:.2f}, {high:.2f}]".format(**against[phase])
            note = f"against vanilla in the same run; {_note(document, setting, row)}"
            return Found(value, notes=(note,), digits=1, signatures=(signature,))
        return Found(reason=reason or _left_out(contests, address))

    def _contests(self, address: Mapping[str, Any], metric: str) -> tuple[list[Contest], str]:
        """The contests of the first document that fits, so that a model's numbers are of one machine; or why none."""
        if not self.documents:
            return [], "not measured: no document of `pruneval bench` is given (--bench)"
        model = model_of(address)
        length = self.layout.visual.get(str(address.get("model")))
        if length is None:
            return [], "not measured: how long the table's prompts are is not known"
        of_model = [document for document in self.documents if document["model"] == model]
        if not of_model:
            return [], f"not measured: what is given is of {', '.join(sorted({d['model'] for d in self.documents}))}"
        types = WIDTHS.get(metric, (self.layout.dtype,) if self.layout.dtype else ())
        for document in of_model:
            fitting = [s for s in document["settings"] if s["batch"] == 1 and close(length, s["visual"])]
            if fitting and (not types or document["dtype"] in types):
                return [(document, setting) for setting in fitting], ""
        needed = f"batch 1 and about {length} visual tokens" + (f" in {' or '.join(types)}" if types else "")
        return [], f"not measured: there is no run with {needed}"


def _row(setting: Mapping[str, Any], address: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for row in setting["contestants"]:
        method, params = _parsed(row["name"])
        if fits(wanted(address), method, params, row["implied"], row["kernel"]):
            return row
    return None


def _parsed(signature: str) -> tuple[str, dict[str, str]]:
    """Method and parameters of `fastv(layer=2,keep=0.5)`; values stay texts and may have commas in them."""
    method, _, inner = signature.partition("(")
    if method.strip() == VANILLA:  # what follows names its kernel
        return VANILLA, {}
    pairs = (pair.partition("=") for pair in re.split(r",(?=[a-z_]+=)", inner.removesuffix(")")))
    return method, {key: value for key, _, value in pairs}


def _left_out(contests: Iterable[Contest], address: Mapping[str, Any]) -> str:
    method = wanted(address)["method"]
    for _, setting in contests:
        for left in setting["left_out"]:
            if _parsed(left["method"])[0] in (method, "all"):
                return f"not measured: {left['reason']}"
    return f"not measured: no {method} with the table's parameters in the run"


def _note(document: Mapping[str, Any], setting: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    text = (
        f"measured on {where(document['machine'])}: {document['weights']} weights, {document['dtype']}, "
        f"{row['kernel']}, batch 1, {setting['visual']} visual + {setting['text']} text tokens, median of "
        f"{document['protocol']['rounds']} rounds"
    )
    return f"{text}; {busy(document['machine'])}" if busy(document["machine"]) else text


def _signature(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    parts = ["pruneval bench", row["name"], document["model"], f"kernel:{row['kernel']}", f"dtype:{document['dtype']}"]
    return "|".join([*parts, where(document["machine"]), document["started"]])
