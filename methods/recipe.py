"""Reading what a search wrote: a small JSON file whose path is a method's `recipe` parameter.

Some recipes, and weights that a method was trained with, come with the package and are asked for by a short name, in
`data/<method>_<name>`: those of pocket-llava were found by `pruneval search` and `pruneval train` on its training
scenes, FitPrune's for LLaVA-1.5-7B are the authors'.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from pruneval.methods.step import MethodError, Shape

SHIPPED = Path(__file__).parent / "data"


def file_of(name: str, given: str) -> Path:
    """The file of a method's recipe or checkpoint: one that comes with the package, by its short name, or a path."""
    for suffix in (".json", ".safetensors"):
        if (shipped := SHIPPED / f"{name}_{given}{suffix}").exists():
            return shipped
    return Path(given)


def read_recipe(name: str, path: str) -> dict[str, Any]:
    """What a search wrote; a name without ".json" is that of a recipe that comes with the package.

    Raises: MethodError when the file can't be read.
    """
    try:
        data = json.loads(file_of(name, path).read_text())
    except (OSError, ValueError) as error:
        raise MethodError(f"{name}: can't read the recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise MethodError(f"{name}: the recipe {path} is not a JSON object")
    return data


@functools.lru_cache(maxsize=64)
def numbers(name: str, path: str, *keys: str) -> dict[str, float]:
    """The numbers a recipe holds under these keys. Raises: MethodError when one is missing."""
    data = read_recipe(name, path)
    missing = [key for key in keys if not isinstance(data.get(key), int | float)]
    if missing:
        raise MethodError(f"{name}: the recipe {path} must hold {', '.join(missing)}, a number each")
    return {key: data[key] for key in keys}


def searched_for(name: str, path: str, shape: Shape) -> None:
    """Refuses a recipe for another count of decoder layers. Raises: MethodError."""
    layers = int(numbers(name, path, "layers")["layers"])
    if layers != shape.layers:
        raise MethodError(f"{name}: the recipe is for {layers} layers, this model has {shape.layers}")
