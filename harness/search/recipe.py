"""Recipes: what a search found, in one small file, with everything needed to judge it.

A recipe holds rates, so it also serves prompts with other token counts. It is checked when it is used: another count of
layers is an error, another model a warning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.harness.records import write_atomically
from pruneval.methods.recipe import file_of

PACKAGES = ("pruneval", "torch", "transformers", "optuna", "numpy")
SCHEMA = 1
DROP = "G-Search's authors saw .3 to 1.7 points lost with the rates of another model (their Table 4)"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a recipe, whole or not at all."""
    found = {"schema": SCHEMA, **content, "versions": _versions()}
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def check(path: str, method: str, model: str) -> None:
    """Looks at a recipe before a run; that it fits the model's count of layers is the method's business.

    Args:
        path: of the file, or the name of one that comes with the package.
        method, model: what it is to be used with.

    Raises:
        UserError: it can't be read, or is for another method.
    """
    file = file_of(method, path)
    if not path.endswith(".json") and not file.exists():
        return  # the method says what is wrong
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the recipe {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"the recipe {path} is not a JSON object")
    if data.get("method", method) != method:
        raise UserError(f"the recipe {path} is for {data['method']}, not for {method}")
    if data.get("model", model) != model:
        print(f"warning: the recipe {path} was searched on {data['model']}, not on {model}: {DROP}", file=sys.stderr)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
