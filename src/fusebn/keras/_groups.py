"""Shapes for the kernels, which know one channel axis: several axes as one, and virtual batches."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

Tensor = Any


class Arranged(NamedTuple):
    """A tensor with one channel axis."""

    x: Tensor
    axis: int
    groups: Any  # how many stand side by side on that axis: an int or a scalar tensor
    restore: Callable[[Tensor], Tensor]  # gives a tensor like x the first layout again
    size: int | None  # of a virtual batch


def arrange(x: Tensor, axes: tuple[int, ...], size: int | None = None) -> Arranged:
    """Lay the channel axes (sorted) out as one, and beside them the groups of `size` examples."""
    shape, groups = ops.shape(x), 1
    if size is not None:
        # Group j of G takes the examples j, j + G, j + 2G, ..., as TensorFlow's layers did.
        groups = shape[0] // size
        x = ops.reshape(x, (size, groups, *shape[1:]))
        axes = (1, *(axis + 1 for axis in axes))
    merged, axis, undo = merge_axes(x, axes)
    if size is None:
        return Arranged(merged, axis, groups, undo, size)
    return Arranged(merged, axis, groups, lambda y: ops.reshape(undo(y), shape), size)


def merge_axes(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
    """Lay `axes` (sorted) out as one; return the tensor, that axis, and the way back.

    Neighbours merge without moving a byte; others are transposed together first.
    """
    if len(axes) == 1:
        return x, axes[0], lambda y: y
    first, count, rank = axes[0], len(axes), len(x.shape)
    order = list(range(rank))
    if axes[-1] - first + 1 != count:
        order = [axis for axis in order if axis not in axes] + list(axes)
        first = rank - count
        x = ops.transpose(x, order)
    shape = ops.shape(x)
    parts = shape[:first], shape[first : first + count], shape[first + count :]
    merged = ops.reshape(x, [math.prod(part) for part in parts])

    def undo(y: Tensor) -> Tensor:
        y = ops.reshape(y, shape)
        inverse = [order.index(axis) for axis in range(rank)]
        return y if inverse == list(range(rank)) else ops.transpose(y, inverse)

    return merged, 1, undo
