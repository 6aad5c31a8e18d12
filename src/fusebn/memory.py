"""Recycled memory for large arrays.

A fresh page costs more than the arithmetic on it, so outputs of 1 MiB and more come from a bounded
cache of buffers, in huge pages where the system has them, and go back to it when the last view of
them dies, on any thread. Smaller ones use NumPy's own allocation.

The cache keeps at most ``FUSEBN_POOL_BYTES``, by default an eighth of the machine's memory; 0
switches it off.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusebn import _core, _spec

__all__ = ["empty", "empty_cache", "set_limit", "stats"]

# Below this the C library recycles by itself, and a huge page would be mostly waste.
LEAST = 1 << 20


def empty(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return an uninitialized array, from the cache if it is large.

    Parameters
    ----------
    shape : tuple of ints
    dtype : dtype

    Examples
    --------
    >>> import fusebn.memory
    >>> out = fusebn.memory.empty((32, 56, 56, 64))
    >>> out.shape, out.dtype
    ((32, 56, 56, 64), dtype('float32'))
    """
    dtype = np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    if size < LEAST or not _core.pool_limit():
        return np.empty(shape, dtype)
    return _core.empty(size).view(dtype).reshape(shape)


def stats() -> dict[str, int]:
    """Return what the cache holds.

    Returns
    -------
    dict
        ``in_use``, bytes handed out; ``cached``, bytes that wait to be handed out again; ``limit``,
        the most that may wait; ``recycled`` and ``fresh``, how many arrays came from the cache and
        how many from the system.

    Examples
    --------
    >>> import fusebn.memory
    >>> sorted(fusebn.memory.stats())
    ['cached', 'fresh', 'in_use', 'limit', 'recycled']
    """
    return _core.pool_statistics()


def empty_cache() -> None:
    """Return to the system all memory that waits.

    Examples
    --------
    >>> import fusebn.memory
    >>> fusebn.memory.empty_cache()
    >>> fusebn.memory.stats()["cached"]
    0
    """
    _core.empty_pool()


def set_limit(bytes: int) -> None:
    """Set how many bytes may wait; 0 switches the cache off.

    Parameters
    ----------
    bytes : int
        Not negative. What waits beyond it is returned to the system at once.

    Raises
    ------
    TypeError, ValueError
        It is no integer, or negative.

    Examples
    --------
    >>> import fusebn.memory
    >>> before = fusebn.memory.stats()["limit"]
    >>> fusebn.memory.set_limit(1 << 30)
    >>> fusebn.memory.stats()["limit"]
    1073741824
    >>> fusebn.memory.set_limit(before)
    """
    number = _spec.integer("set_limit", "bytes", bytes)
    if number < 0:
        _spec.fail(ValueError, "set_limit", "bytes", "not be negative", repr(number))
    _core.set_pool_limit(number)
