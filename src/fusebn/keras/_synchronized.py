"""Moments of a batch whose parts lie on several replicas.

Each replica takes the moments of its part; two sums over all of them merge these exactly, whatever
the size of a part or its mask (Chan, Golub, LeVeque, "Algorithms for computing the sample
variance", 1983)::

    count = sum of n_r,   mean = sum of n_r * mean_r / count,
    variance = sum of n_r * (variance_r + (mean_r - mean)^2) / count

The second sum waits for the first, which spares it the cancellation of E[x^2] - E[x]^2. Gradients
flow through both. On JAX there is nothing to do: an array of ``keras.distribution`` is the whole
batch, wherever its parts lie.
"""

import math
from typing import Any, NamedTuple

import keras
from keras import ops

import fusebn

Tensor = Any


class Moments(NamedTuple):
    """Statistics of the whole batch, 0 where its count is 0."""

    count: Tensor
    mean: Tensor
    variance: Tensor  # with divisor count


def moments(x: Tensor, axis: int, weights: Tensor | None) -> Moments:
    """Return the moments of each channel over all replicas."""
    axes = [i for i in range(len(x.shape)) if i != axis]
    mean, variance = fusebn.moments(x, axes, weights=weights)
    dtype = mean.dtype
    if weights is None:
        count = ops.cast(math.prod(ops.shape(x)[i] for i in axes), dtype)
    else:
        spread = ops.broadcast_to(weights, [ops.shape(x)[i] for i in axes])
        count = ops.cast(ops.sum(spread), dtype)
    counted = count > 0
    mean, variance = (ops.where(counted, value, 0.0) for value in (mean, variance))
    total, sums = _sum_over_replicas(count, count * mean)
    divisor = ops.where(total > 0, total, 1.0)
    merged = sums / divisor
    (m2,) = _sum_over_replicas(count * (variance + ops.square(mean - merged)))
    return Moments(total, merged, m2 / divisor)


def _sum_over_replicas(*values: Tensor) -> Any:
    """Return the sums over all replicas, differentiable: what flows back is summed as well."""
    sum_up = _SUMS.get(keras.backend.backend())
    return values if sum_up is None else sum_up(*values)


def _sum_of_tensorflow(*values: Tensor) -> Any:
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(values))


def _sum_of_torch(*values: Tensor) -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    from fusebn.torch._merging import sum_over_processes

    return [sum_over_processes(value) for value in values]


_SUMS = {"tensorflow": _sum_of_tensorflow, "torch": _sum_of_torch}
