"""What fake quantization and transforms need of TensorFlow, such that no compiler moves a bit.

Grappler and XLA turn a quotient by a constant into a product; XLA makes one rounding of a product
and a sum, and its least and greatest value pass over NaN.
"""

import math
from typing import Any

import tensorflow as tf

from fusebn._quantization import Ops
from fusebn.tensorflow import _ops

Tensor = Any


def _scalar(value: float, like: Tensor) -> Tensor:
    constant = tf.constant(value, like.dtype)
    if tf.executing_eagerly():
        return constant
    # To Grappler, what may be fed is no constant.
    return tf.raw_ops.PlaceholderWithDefault(input=constant, shape=[])


def _divide(x: Tensor, divisor: Tensor) -> Tensor:
    if _ops.in_xla():  # to which this is not one number for all
        divisor = tf.where(tf.math.is_nan(x), x, divisor)
    return x / divisor


def _rounded(product: Tensor) -> Tensor:
    # What comes of a choice is not fused with a sum.
    return tf.where(tf.math.is_nan(product), tf.zeros_like(product), product)


def _least(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return _unless_nan(x, axes, tf.reduce_min(x, list(axes)))


def _greatest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return _unless_nan(x, axes, tf.reduce_max(x, list(axes)))


def _unless_nan(x: Tensor, axes: tuple[int, ...], found: Tensor) -> Tensor:
    if not _ops.in_xla():
        return found
    has_nan = tf.reduce_any(tf.math.is_nan(x), list(axes))
    return tf.where(has_nan, tf.constant(math.nan, x.dtype), found)


def _reshape(x: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    return tf.reshape(x, [-1 if n is None else n for n in shape])


def _refuse_nan(new: Tensor, old: Tensor, message: str) -> Tensor:
    # XLA drops an assertion.
    wrong = tf.reduce_any(tf.math.is_nan(new) & ~tf.math.is_nan(old))
    if not tf.executing_eagerly():
        with tf.control_dependencies([tf.debugging.Assert(~wrong, [message])]):
            return tf.identity(new)
    if wrong:
        raise ValueError(message)
    return new


array_ops = Ops(
    where=tf.where,
    round=tf.round,
    minimum=tf.minimum,
    maximum=tf.maximum,
    amin=_least,
    amax=_greatest,
    isfinite=tf.math.is_finite,
    reshape=_reshape,
    stop_gradient=tf.stop_gradient,
    cast=lambda x, dtype: tf.cast(x, dtype),
    scalar=_scalar,
    dtype=lambda x: x.dtype.name,
    rounded=_rounded,
    refuse_nan=_refuse_nan,
    divide=_divide,
)
