"""Finds the adapter for an array by its type; imports no framework to do so.

An array's type names the package it comes from, and that package was imported by whoever made the
array. So a framework that is missing, heavy or broken costs nothing until somebody uses it.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from fusebn import _spec

# Package of the array's type -> module that serves it.
_ADAPTERS = {
    "jax": "fusebn.jax._functions",
    "jaxlib": "fusebn.jax._functions",
    "numpy": "fusebn._numpy",
    "tensorflow": "fusebn.tensorflow._functions",
    "torch": "fusebn.torch._functions",
}

# The same for variables that hold an array of some framework -> how they are asked for it.
_HOLDERS: dict[str, Callable[[Any], Any]] = {
    "flax": lambda variable: variable.get_value(),
    "keras": lambda variable: variable.value,
}


# What has been found; a plain dict, which compilers can look into.
_found: dict[type[Any], ModuleType] = {}


def _adapter_of_type(kind: type[Any]) -> ModuleType | None:
    for base in kind.__mro__:
        name = _ADAPTERS.get(base.__module__.partition(".")[0])
        if name is not None:
            # A compiler can follow a look into the dict, but no import.
            return sys.modules.get(name) or import_module(name)
    return None


def adapter_of(operation: str, x: Any, argument: str = "x") -> ModuleType:
    """Return the module whose functions take x."""
    kind = type(x)
    adapter = _found.get(kind)
    if adapter is None:
        adapter = _adapter_of_type(kind)
        if adapter is None:
            _spec.unsupported(operation, argument, x)
        _found[kind] = adapter
    return adapter


def held_by(value: Any) -> Any:
    """Return the array that a variable of Keras or Flax holds; anything else as it is."""
    for base in type(value).__mro__:
        held = _HOLDERS.get(base.__module__.partition(".")[0])
        if held is not None:
            return held(value)
    return value
