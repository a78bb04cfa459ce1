"""Attributes that stand for others for a while: wrappers of a model's functions, which may be nested in any number."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


def override(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Sets an attribute of a module, an object or a class; `stack` puts back exactly what stood there.

    What the owner had from its class it has from there again, and a wrapper that was there before stays.
    """
    stood, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    if stood:
        stack.callback(setattr, owner, name, before)
    else:
        stack.callback(delattr, owner, name)
