"""The ops again, made of TensorFlow's own: for XLA, export, GPUs and derivatives.

The arguments and results of `_ops`, by the textbook in two passes. What keeps it safe:

- moments: distances from the mean are summed, never ``E[x^2] - E[x]^2``. The mean is a sum of two
  floats, ``high + low``, where low is the mean of ``x - high``: float32 data of 1e6 +- 1 is centred
  as exactly as it can carry, and the variance cannot be negative.
- normalize: the mean is taken from x before anything else.
- every division and square root is guarded before it is taken, so that no derivative of a branch
  that is not chosen becomes NaN.
"""

import math
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any

# Not tf.nn's leaky_relu and gelu, which round their constants to float32 whatever z is.
ACTIVATIONS = {
    "identity": tf.identity,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": lambda z: tf.where(z > 0, z, 0.01 * z),
    "silu": tf.nn.silu,
    "gelu": lambda z: 0.5 * z * tf.math.erfc(-math.sqrt(0.5) * z),
}


class BatchNorm(NamedTuple):
    """What `batch_norm` returns, here and in `_ops`."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    batch: Tensor  # the mean and biased variance that normalized x, in float64: [2, channels]
    count: Tensor  # sum of the weights, in float64; 0 outside training


class Moments(NamedTuple):
    """What `moments` returns, here and in `_ops`: float64, of the shape of the kept axes."""

    count: Tensor
    mean: Tensor
    m2: Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (tf.float32, tf.float64) else tf.cast(x, tf.float32)


def moments(x: Tensor, axes: Any, weights: Tensor | None) -> Moments:
    """Return count, mean and m2 over `axes`; weights have the rank of x, and 1 for kept axes."""
    x = _wide(x)
    if weights is None:
        w: Any = tf.ones((), x.dtype)
        count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x, tf.int64), axes)), tf.float64)
    else:
        w = tf.cast(weights, x.dtype)
        count = tf.reduce_sum(tf.cast(weights, tf.float64))
        x = tf.where(w > 0, x, tf.zeros_like(x))
    n = tf.cast(tf.where(count > 0, count, tf.ones_like(count)), x.dtype)

    def mean_of(values: Tensor) -> Tensor:
        return tf.reduce_sum(w * values, axes, keepdims=True) / n

    high = mean_of(x)
    low = mean_of(x - high)
    m2 = tf.reduce_sum(w * tf.square(x - high - low), axes)
    mean = tf.squeeze(tf.cast(high, tf.float64) + tf.cast(low, tf.float64), axes)
    mean = tf.where(tf.math.is_finite(mean), mean, tf.constant(math.nan, tf.float64))
    return Moments(count, mean, tf.cast(m2, tf.float64))


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Return (x - mean) * scale * rstd + offset, wide; all but x are float64 and broadcast."""
    x = _wide(x)
    shifted = variance + tf.constant(epsilon, tf.float64)
    none = tf.equal(shifted, 0) | tf.math.is_inf(shifted)
    rstd = tf.math.rsqrt(tf.where(none, tf.ones_like(shifted), shifted))
    slope = tf.where(none, tf.zeros_like(rstd), rstd)
    high = tf.cast(mean, x.dtype)
    low = tf.cast(mean - tf.cast(high, tf.float64), x.dtype)
    centred = x - high - low
    z = tf.where(none, tf.zeros_like(centred), centred)
    z = z * tf.cast(slope if scale is None else slope * tf.cast(scale, tf.float64), x.dtype)
    return z if offset is None else z + tf.cast(offset, x.dtype)


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *,
    is_training: Any,
    axis: int,
    epsilon: float,
    correction: float,
    factor: float,
    activation: str,
    residual: Tensor | None,
    weights: Tensor | None,
) -> BatchNorm:
    """Do what `_ops.batch_norm` does."""
    stat = tf.float64 if x.dtype == tf.float64 else tf.float32
    reduced = [i for i in range(x.shape.rank) if i != axis % x.shape.rank]
    if mean is None:
        given, is_training = None, True  # what the op's is_training must hold, tensor or not
    else:
        given = tf.stack([tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)])
    batch: Any
    if is_training is False:
        batch, returned, count = given, given, tf.zeros((), tf.float64)
    else:
        count, batch_mean, m2 = moments(x, reduced, weights)
        counted = count > 0
        n = tf.where(counted, count, tf.ones_like(count))
        unbiased = tf.where(count > correction, count - correction, n)
        undefined = tf.constant(math.nan, tf.float64)
        batch = tf.where(counted, tf.stack([batch_mean, m2 / n]), undefined)
        returned = tf.where(counted, tf.stack([batch_mean, m2 / unbiased]), undefined)
        if given is not None and factor != 1:
            mixed = (1 - factor) * given + factor * returned
            returned = tf.where(counted, mixed, given)
        if is_training is not True:
            batch = tf.where(is_training, batch, given)
            returned = tf.where(is_training, returned, given)
            count = tf.where(is_training, count, tf.zeros_like(count))
    # A batch of count 0 is normalized as if its variance were infinite: x is forgotten.
    forgotten = tf.constant([[0.0], [math.inf]], tf.float64)
    lost = tf.equal(count, 0) & tf.convert_to_tensor(is_training)
    used = tf.where(lost, forgotten, batch)

    def spread(vector: Tensor | None) -> Tensor | None:
        shape = [1] * x.shape.rank
        shape[axis] = -1
        return None if vector is None else tf.reshape(vector, shape)

    z = normalize(x, spread(used[0]), spread(used[1]), spread(scale), spread(offset), epsilon)
    if residual is not None:
        z = z + _wide(residual)
    y = tf.cast(ACTIVATIONS[activation](z), x.dtype)
    returned = tf.cast(returned, stat)
    return BatchNorm(y, returned[0], returned[1], batch, count)
