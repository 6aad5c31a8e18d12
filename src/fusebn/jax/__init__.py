"""Batch normalization for JAX: functions and layers on fused kernels.

The functions of :mod:`fusebn` take JAX's arrays as they take NumPy's, under ``jit``, ``grad``,
``vmap`` and all the rest. On a CPU they are calls of fusebn's kernels; on other devices, and inside
:func:`portable`, they are made of JAX's own operations.
"""

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
