"""A batch norm whose mask differs between the channels of a position, as Flax allows.

The kernels take one weight for each position. Here the statistics are JAX's own, in two passes
over x, and the kernel normalizes by them as by given ones.
"""

from typing import Any

import jax.numpy as jnp

from fusebn._results import FusedBatchNorm
from fusebn.jax import _synchronized, functional
from fusebn.jax._ops import Moments
from fusebn.jax._synchronized import group_of

Array = Any


def batch_norm(
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    *,
    is_training: Any,
    axis: int,
    epsilon: float,
    exponential_avg_factor: float,
    activation: str | None,
    residual: Array | None,
    weights: Array,
    correction: float,
    axis_name: Any,
    axis_index_groups: Any,
) -> FusedBatchNorm:
    """Do what `functional.batch_norm` does, with weights of the shape of x that are 0 or 1."""
    batch = moments(x, weights, axis)
    if axis_name is not None:
        batch = _synchronized.merged(batch, group_of(axis_name, axis_index_groups))
    counted = batch.count > 0
    used = batch.batch.at[1, 0].set(jnp.where(counted, batch.batch[1, 0], jnp.inf))
    if is_training is not True:
        given = _synchronized.pairs(mean, jnp.zeros_like(mean), variance)
        used = jnp.where(is_training, used, given)
    (high, low), biased = used[0], used[1].sum(0)
    # What a given mean has no digits for, the offset takes.
    slope = 1 / jnp.sqrt(biased + epsilon)
    low = low * (slope if scale is None else scale * slope)
    y = functional.batch_norm(
        jnp.where(_along(counted, x, axis), x, 0),
        scale,
        -low if offset is None else offset - low,
        high,
        biased,
        is_training=False,
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        residual=residual,
    ).y
    return FusedBatchNorm(
        y,
        *_synchronized.returned(
            batch, mean, variance, is_training, exponential_avg_factor, correction
        ),
    )


def _along(vector: Array, x: Array, axis: int) -> Array:
    return jnp.expand_dims(vector, [i for i in range(x.ndim) if i != axis])


def moments(x: Array, mask: Array, axis: int) -> Moments:
    """Return the moments of each channel over its own positions."""
    across = tuple(i for i in range(x.ndim) if i != axis)
    stat = jnp.promote_types(x.dtype, jnp.float32)
    mask = jnp.broadcast_to(mask, x.shape)
    x = jnp.where(mask, x.astype(stat), 0)
    count = mask.sum(across, dtype=stat)

    def mean_of(values: Array) -> Array:
        return jnp.where(mask, values, 0).sum(across) / jnp.where(count > 0, count, 1)

    mean = mean_of(x)
    centred = x - _along(mean, x, axis)
    low = mean_of(centred)
    variance = mean_of(jnp.square(centred - _along(low, x, axis)))
    return Moments(count, _synchronized.pairs(mean, low, variance))
