"""NumPy arrays as JAX's and back, in all types: float64 needs to be asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cases

# As many as a batch in parts is tested on; JAX has to know before it starts.
jax.config.update("jax_num_cpu_devices", 8)


def types_of(dtype: np.dtype[Any]) -> AbstractContextManager[Any]:
    """Return a context in which JAX has arrays of dtype; for most that is where it starts."""
    return jax.enable_x64(dtype == cases.FLOAT64)


def given(*values: Any) -> tuple[Any, ...]:
    """Return arrays as JAX's; None stays None."""
    return tuple(None if value is None else jnp.asarray(value) for value in values)


def arrays(results: Any) -> tuple[Any, ...]:
    """Return JAX's arrays as NumPy's; None stays None."""
    return tuple(None if result is None else np.asarray(result) for result in results)


def assert_near(actual: Any, expected: Any, ulps: float) -> None:
    """Assert that trees of arrays agree in their types, and to units of each array's greatest.

    The unit is that of the array's own type, but half precision's only where it was rounded to.
    """
    flat, other = jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected)
    assert [path for path, _ in flat] == [path for path, _ in other]
    for (path, mine), (_, theirs) in zip(flat, other, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), path
        greatest = float(jnp.abs(theirs).max(initial=0))
        half = mine.dtype.itemsize == 2
        tolerance = float(jnp.finfo(mine.dtype).eps) * (2 if half else ulps) * max(greatest, 1)
        np.testing.assert_allclose(
            np.asarray(mine, np.float64), np.asarray(theirs, np.float64), 0, tolerance, str(path)
        )
