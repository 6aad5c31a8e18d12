"""The statistics of a batch by themselves, for a layer that transforms them before they normalize.

They are differentiable as often as one likes, and the averages that take them up are those of a
layer that transforms nothing, to the last bit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fusebn.jax import _masked, _ops, _portable, _synchronized
from fusebn.jax._calls import block_of, positions_of
from fusebn.jax._functions import canonical
from fusebn.jax._ops import Moments, Options
from fusebn.jax._transformed import Batch, Pair

Array = Any


def measured(
    x: Array,
    given: Pair,
    wanted: Any,
    *,
    weights: Array | None,
    own_weights: bool,
    axis: int,
    exponential_avg_factor: float,
    correction: float,
    axis_name: Any,
    axis_index_groups: Any,
) -> Batch:
    """Return the statistics of a batch where they are `wanted`; elsewhere the given ones, of 0.

    `own_weights` says that weights have the shape of x and are 0 or 1. See `functional.batch_norm`
    for what else there is.
    """
    flat = [value.reshape(-1) for value in given]
    x, _, _, *flat, _, positions, _, options = canonical(
        "batch_norm", x, None, None, *flat, None, None if own_weights else weights, True, axis,
        0.0, correction, exponential_avg_factor, None,
    )  # fmt: skip

    def batch() -> tuple[Moments, Pair]:
        if own_weights:
            moments = _masked.moments(x, weights, axis)
        elif axis_name is None:
            return _statistics(options, x, positions, *flat)
        else:
            moments = _ops.moments(x, positions, axis)
        if axis_name is not None:
            group = _synchronized.group_of(axis_name, axis_index_groups)
            moments = _synchronized.merged(moments, group)
        return moments, _averages(options, moments, *flat)

    def nothing() -> tuple[Moments, Pair]:
        shapes = jax.eval_shape(batch)[0]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return _synchronized.vary((zeros, tuple(flat)), (x, weights, flat))

    # Devices cannot meet in a branch that not all of them may take.
    everywhere = wanted is True or axis_name is not None
    moments, averages = batch() if everywhere else lax.cond(wanted, batch, nothing)
    counted = weights is not None or axis_name is not None
    # A channel of which a mask leaves nothing, though of others something, has no better ones.
    statistics = jnp.where(moments.count > 0, moments.batch.sum(1), jnp.stack(flat))
    shaped = [value.reshape(given[0].shape) for value in (*statistics, *averages)]
    count = moments.count.max(initial=0) if counted else x.size
    return Batch(count, tuple(shaped[:2]), tuple(shaped[2:]))


def _averages(options: Options, moments: Moments, mean: Array, variance: Array) -> Pair:
    """Return the averages after a batch."""
    moments = moments._replace(count=jnp.broadcast_to(moments.count, mean.shape))
    rest = True, options.factor, options.correction
    return _synchronized.returned(moments, mean, variance, *rest)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics(
    options: Options, x: Array, weights: Array | None, mean: Array, variance: Array
) -> tuple[Moments, Pair]:
    """Return the moments of a batch that is here, and the averages after it."""
    return _ops.statistics(x, weights, mean, variance, options)


def _tangents(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    x, weights, mean, variance = primals
    dx, dweights, *dgiven = tangents
    found = _statistics(options, *primals)
    operands, moving = {"x": block_of(x, options.axis)}, {}
    if weights is not None:
        operands["weights"] = positions_of(weights, x, options.axis)
    if type(dx) is not SymbolicZero:
        moving["x"] = block_of(dx, options.axis)
    if weights is not None and type(dweights) is not SymbolicZero:
        moving["weights"] = positions_of(dweights, x, options.axis)
    moments = found[0]
    each = jax.tree.map(lambda value: value[None], moments._asdict())
    moved = _portable.moments_tangent(operands, each, moving)
    dmoments = jax.tree.map(
        lambda value, like: jnp.broadcast_to(value, (1, *like.shape))[0], Moments(**moved), moments
    )
    dgiven = [
        jnp.zeros_like(value) if type(tangent) is SymbolicZero else tangent
        for value, tangent in zip((mean, variance), dgiven, strict=True)
    ]
    _, daverages = jax.jvp(
        partial(_averages, options), (moments, mean, variance), (dmoments, *dgiven)
    )
    return found, (dmoments, daverages)


_statistics.defjvp(_tangents, symbolic_zeros=True)
