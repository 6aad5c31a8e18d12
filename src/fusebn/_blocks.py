"""How a NumPy array becomes a block ``[outer, channels, inner]``.

Any set of axes may be the channels. In memory order, a dense array whose channel axes are
neighbours is a block as it lies, whatever order its axes are named in: NHWC, NCHW, a transposed
view of either, Fortran order. Everything else (slices, byte-swapped or misaligned elements,
channel axes with others between them) is copied first.
"""

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusebn import memory

Array = NDArray[Any]


# NumPy's flags of an array, as bits: NPY_ARRAY_C_CONTIGUOUS and NPY_ARRAY_ALIGNED.
_DENSE = 0x0001 | 0x0100


def is_dense(array: Array) -> bool:
    """Say whether an array's elements lie one after the other in C order, aligned."""
    return array.flags.num & _DENSE == _DENSE


class Layout(NamedTuple):
    """Where the elements of a block lie: the axes in memory order, and how they fall together."""

    order: tuple[int, ...] | None  # None: the axes already are in memory order
    outer: int
    channels: int
    inner: int
    channel_axes: tuple[int, ...]  # in memory order
    other_axes: tuple[int, ...]

    def memory(self, array: Array) -> Array:
        """Return `array` as it must lie in memory: itself seen in that order, or a copy."""
        if self.order is not None:
            array = array.transpose(self.order)
        return array if is_dense(array) else array.copy(order="C")

    def lies_so(self, array: Array) -> bool:
        """Say whether `memory` would return the array without a copy."""
        return is_dense(array if self.order is None else array.transpose(self.order))

    def empty_like(self, x: Array) -> Array:
        """Return an uninitialized array of the shape and dtype of x that lies so."""
        if self.order is None:
            if x.nbytes < memory.LEAST:  # what `empty` would do, on the shortest way
                return np.empty(x.shape, x.dtype)
            return memory.empty(x.shape, x.dtype)
        in_order = memory.empty(tuple(x.shape[axis] for axis in self.order), x.dtype)
        return in_order.transpose(np.argsort(self.order))

    def channel_vector(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """Flatten an array of the channel axes, in their order in x, to the core's order."""
        rank = np.argsort(np.argsort(self.channel_axes))
        return np.ascontiguousarray(array.transpose(rank), dtype=dtype).reshape(-1)

    def channel_array(self, vector: Array, shape: tuple[int, ...]) -> Array:
        """Undo `channel_vector`, for x of that shape."""
        array = vector.reshape([shape[axis] for axis in self.channel_axes])
        return array.transpose(np.argsort(self.channel_axes))

    def positions(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """Lay out an array of the other axes, in their order in x, as the core's weights."""
        rank = np.argsort(np.argsort(self.other_axes))
        return np.ascontiguousarray(array.transpose(rank), dtype=dtype).reshape(-1)


def layout_of_axis(x: Array, axis: int) -> Layout:
    """Return the layout of x with one channel axis; only the order of its memory is kept."""
    if x.flags.c_contiguous:
        return _layout_in_c_order(x.shape, axis)
    return layout_of_axes(x, (axis,))


@lru_cache(maxsize=256)  # a network calls with the same few shapes again and again
def _layout_in_c_order(shape: tuple[int, ...], axis: int) -> Layout:
    return _layout(shape, tuple(range(len(shape))), (axis,))


def layout_of_axes(x: Array, channel_axes: tuple[int, ...]) -> Layout:
    """Return a layout of x that spares the copy if x can be a block as it lies."""
    axes = list(range(x.ndim))
    order = axes
    if not x.flags.c_contiguous:
        # Axes of length 1 have no place in memory; standing first they part no neighbours.
        order = sorted(axes, key=lambda axis: -x.strides[axis] if x.shape[axis] > 1 else -np.inf)
        if not x.transpose(order).flags.c_contiguous:
            order = axes
    long = [axis for axis in order if x.shape[axis] > 1]
    at = [long.index(axis) for axis in channel_axes if x.shape[axis] > 1]
    if at and max(at) - min(at) + 1 != len(at):
        order = [axis for axis in axes if axis not in channel_axes] + list(channel_axes)
    return _layout(x.shape, tuple(order), channel_axes)


@lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, ...], order: tuple[int, ...], channel_axes: tuple[int, ...]
) -> Layout:
    channels = prod(shape[axis] for axis in channel_axes)
    total = prod(shape)
    inner = 1
    if channels == 1:
        inner = total  # one channel: all of it is one run of neighbours
    else:
        for axis in reversed(order):
            if axis in channel_axes and shape[axis] > 1:
                break
            inner *= shape[axis]
    outer = total // (channels * inner) if total else 0
    return Layout(
        None if order == tuple(range(len(shape))) else order,
        outer,
        channels,
        inner if total else 1,
        tuple(axis for axis in order if axis in channel_axes),
        tuple(axis for axis in order if axis not in channel_axes),
    )
