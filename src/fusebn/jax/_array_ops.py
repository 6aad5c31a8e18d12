"""What fake quantization and the transforms of layers need of JAX's arrays.

The same bits as NumPy's, compiled or not, are not to be had from XLA for the asking: where one
number divides many it multiplies by the reciprocal, which is rounded once more, and on a CPU a
product that is added to something is not rounded at all. A value that is looked at in between is
neither.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fusebn._quantization import Ops

Array = Any


def _rounded(product: Array) -> Array:
    return jnp.where(jnp.isnan(product), jnp.nan, product)


def _divide(x: Array, divisor: Array) -> Array:
    # Not one number for all, as far as XLA can tell.
    return x / jnp.where(jnp.isnan(x), x, divisor)


def _refuse_nan(new: Array, old: Array, message: str) -> Array:
    if isinstance(new, jax.core.Tracer) or isinstance(old, jax.core.Tracer):
        return new  # no compiled program can raise
    if (np.isnan(new) & ~np.isnan(old)).any():
        raise ValueError(message)
    return new


array_ops = Ops(
    where=jnp.where,
    round=jnp.round,
    minimum=jnp.minimum,
    maximum=jnp.maximum,
    amin=lambda x, axes: jnp.min(x, axes),
    amax=lambda x, axes: jnp.max(x, axes),
    isfinite=jnp.isfinite,
    reshape=jnp.reshape,
    stop_gradient=lax.stop_gradient,
    cast=lambda x, dtype: x.astype(dtype),
    scalar=lambda value, like: jnp.asarray(value, like.dtype),
    dtype=lambda x: x.dtype.name,
    rounded=_rounded,
    refuse_nan=_refuse_nan,
    divide=_divide,
)
