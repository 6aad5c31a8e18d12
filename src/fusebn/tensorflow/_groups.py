"""Shapes for the op, which knows one channel axis: several axes as one, and virtual batches."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Undo = Callable[[Any], Any]


def merge_axes(x: Any, axes: tuple[int, ...]) -> tuple[Any, int, Undo]:
    """Lay `axes` (sorted) out as one; return the tensor, that axis, and the way back.

    Neighbours merge without moving a byte; others are transposed together first.
    """
    if len(axes) == 1:
        return x, axes[0], lambda y: y
    first, count, rank = axes[0], len(axes), x.shape.rank
    order = list(range(rank))
    if axes[-1] - first + 1 != count:
        order = [axis for axis in order if axis not in axes] + list(axes)
        first = rank - count
        x = tf.transpose(x, order)
    shape = tf.shape(x, tf.int64)
    parts = shape[:first], shape[first : first + count], shape[first + count :]
    merged = tf.reshape(x, tf.stack([tf.reduce_prod(part) for part in parts]))
    merged.set_shape([None, x.shape[first : first + count].num_elements(), None])

    def undo(y: Any) -> Any:
        y = tf.reshape(y, shape)
        inverse = [order.index(axis) for axis in range(rank)]
        return y if order == inverse == list(range(rank)) else tf.transpose(y, inverse)

    return merged, 1, undo


def virtual_batches(x: Any, axes: tuple[int, ...], size: int, training: Any) -> Any:
    """Cut the batch into groups of `size` that are normalized each by itself.

    Group j of G takes the examples j, j + G, j + 2G, ...: TensorFlow's reshape to
    ``[size, G, ...]``. Without training there is one group, of whatever size the batch is.
    Returns the tensor, its axes with that of the groups in front, and G.
    """
    shape = tf.shape(x)
    batch = shape[0]
    groups = tf.where(training, batch // size, 1)
    rows = tf.where(training, size, batch)
    # Named after what goes wrong when `size` does not divide a batch known only in a session.
    name = "virtual_batch_size_must_divide_the_batch"
    cut = tf.reshape(x, tf.concat([tf.stack([rows, groups]), shape[1:]], 0), name=name)
    cut.set_shape([None, None, *x.shape[1:]])
    return cut, (1, *(axis + 1 for axis in axes)), groups
