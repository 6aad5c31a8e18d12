"""Batch normalization for JAX: functions and layers on fused kernels.

The functions of :mod:`fusebn` take JAX's arrays as they take NumPy's, under ``jit``, ``grad``,
``vmap`` and all the rest. On a CPU they are calls of fusebn's kernels; on other devices, and inside
:func:`portable`, they are made of JAX's own operations.

The layers are Flax's, in :mod:`fusebn.jax.linen` and :mod:`fusebn.jax.nnx`, and Equinox's, in
:mod:`fusebn.jax.equinox`, which are imported when they are asked for.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from fusebn import _spec

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("jax", "jaxlib"):
        raise
    _spec.missing("fusebn.jax", "jax")

from fusebn.jax._ops import portable
from fusebn.jax.functional import batch_norm

__all__ = ["batch_norm", "portable"]

_LAYERS = ("equinox", "linen", "nnx")


def __getattr__(name: str) -> _Any:
    if name in _LAYERS:
        return _import_module(f"fusebn.jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAYERS])
