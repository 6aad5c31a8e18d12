"""The rules for arrays, which functions and layers share: what the calls take is made here.

Errors are `_spec`'s, raised when a program is traced. What only an array's values can tell, the
calls check when they run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusebn import _spec
from fusebn.jax._portable import stat_type

Array = Any


def array_of(operation: str, argument: str, value: Any) -> Array:
    """Return an array of an element type."""
    array = _converted(operation, argument, value)
    _spec.element_type(operation, argument, array.dtype.name)
    return array


def _converted(operation: str, argument: str, value: Any, dtype: Any = None) -> Array:
    if isinstance(value, jax.Array):
        return value
    # Python's numbers have the type they are used in; by way of float32 they would lose digits.
    numbers = isinstance(value, float | int | list | tuple)
    try:
        return jnp.asarray(value, dtype if numbers else None)
    except (TypeError, ValueError):
        _spec.fail(TypeError, operation, argument, "be an array", type(value).__name__)


def like_x(operation: str, argument: str, value: Any, x: Array) -> Array:
    """Return an array of the shape and dtype of x."""
    array = array_of(operation, argument, value)
    if array.dtype != x.dtype:
        _spec.same_type(operation, argument, array.dtype.name, x.dtype.name)
    _spec.same_shape(operation, argument, array.shape, x.shape)
    return array


def parameter(operation: str, argument: str, value: Any, x: Array) -> Array:
    """Return a floating parameter of any shape, in the type of the statistics of x."""
    dtype = stat_type(x)
    array = array_of(operation, argument, _converted(operation, argument, value, dtype))
    return array if array.dtype == dtype else array.astype(dtype)


def vector(operation: str, argument: str, value: Any, x: Array, axis: int) -> Array | None:
    """Return a parameter of one value a channel."""
    if value is None:
        return None
    array = parameter(operation, argument, value, x)
    if array.shape != x.shape[axis : axis + 1]:
        _spec.channel_vector(operation, argument, array.shape, x.shape[axis], x.shape)
    return array


def position_weights(operation: str, argument: str, value: Any, x: Array, kept: set[int]) -> Array:
    """Return weights that broadcast to the reduced positions, in the rank of x, 1 where kept.

    They may come in the shape of x with 1 for the kept axes, or in that of the others alone.
    """
    weights = _converted(operation, argument, value)
    if weights.dtype.kind not in "iub":
        _spec.element_type(operation, argument, weights.dtype.name)
    rank, shape = x.ndim, weights.shape
    if len(shape) != rank or any(shape[i] != 1 for i in kept):
        target = [n for i, n in enumerate(x.shape) if i not in kept]
        mine = [1] * (len(target) - len(shape)) + list(shape)
    else:
        target = [1 if i in kept else n for i, n in enumerate(x.shape)]
        mine = list(shape)
    fits = len(mine) == len(target)
    if not fits or any(a not in (1, b) for a, b in zip(mine, target, strict=True)):
        expected = f"broadcast to {tuple(target)}, one weight for each position that is reduced"
        _spec.fail(ValueError, operation, argument, expected, f"shape {shape}")
    if len(mine) != rank or len(kept) == rank:
        following = iter(mine)
        mine = [1 if i in kept else next(following) for i in range(rank)]
    return weights.astype(stat_type(x)).reshape(mine)


def training_flag(operation: str, argument: str, value: Any) -> Any:
    """Return a bool, or a boolean scalar that tells when the program runs."""
    if value is True or value is False:
        return value
    if not isinstance(value, jax.Array):
        return _spec.flag(operation, argument, value)
    if value.dtype != np.bool_ or value.shape != ():
        got = f"an array of {value.dtype.name} and shape {value.shape}"
        _spec.fail(TypeError, operation, argument, "be a bool, or a boolean scalar", got)
    return value
