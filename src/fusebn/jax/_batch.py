"""The statistics of a batch by themselves, for a layer that transforms them before they normalize.

They are differentiable as often as one likes, and the averages that take them up are those of a
layer that transforms nothing, to the last bit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fusebn.jax import _masked, _ops, _portable
from fusebn.jax._calls import block_of, positions_of
from fusebn.jax._functions import canonical
from fusebn.jax._ops import Moments, Options
from fusebn.jax._synchronized import group_of, merged, returned, vary
from fusebn.jax._transformed import Batch, Pair

Array = Any
Found = tuple[Moments, Pair]  # of a batch, and the averages after it


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
    x, _, _, *flat, _, positions, _, options = canonical(
        "batch_norm", x, None, None, given[0].reshape(-1), given[1].reshape(-1), None,
        None if own_weights else weights, True, axis, 0.0, correction, exponential_avg_factor, None,
    )  # fmt: skip
    group = None if axis_name is None else group_of(axis_name, axis_index_groups)

    def batch() -> Found:
        if not own_weights and group is None:
            return _statistics(options, x, positions, *flat)
        moments = (
            _masked.moments(x, weights, axis) if own_weights else _ops.moments(x, positions, axis)
        )
        moments = moments if group is None else merged(moments, group)
        return moments, _averages(options, moments, *flat)

    # Devices cannot meet in a branch that not all of them may take.
    if wanted is True or group is not None:
        moments, averages = batch()
    else:
        moments, averages = lax.cond(wanted, batch, partial(_nothing, batch, x, weights, flat))
    # A channel of which a mask leaves nothing, though of others something, has no better ones.
    statistics = jnp.where(moments.count > 0, moments.batch.sum(1), jnp.stack(flat))
    mean, variance, *new = (v.reshape(given[0].shape) for v in (*statistics, *averages))
    known = weights is None and group is None
    count = x.size if known else moments.count.max(initial=0)
    return Batch(count, (mean, variance), (new[0], new[1]))


def _nothing(batch: Callable[[], Found], x: Array, weights: Array | None, given: Any) -> Found:
    """Return what `batch` would, of no batch: count 0, and the averages as they were."""
    moments = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(batch)[0])
    found: Found = vary((moments, tuple(given)), (x, weights, given))
    return found


def _averages(options: Options, moments: Moments, mean: Array, variance: Array) -> Pair:
    """Return the averages after a batch."""
    moments = moments._replace(count=jnp.broadcast_to(moments.count, mean.shape))
    rest = True, options.factor, options.correction
    return returned(moments, mean, variance, *rest)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics(
    options: Options, x: Array, weights: Array | None, mean: Array, variance: Array
) -> Found:
    """Return the moments of a batch that is here, and the averages after it."""
    return _ops.statistics(x, weights, mean, variance, options)


def _tangents(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Differentiate the textbook's formulas, by x and the given averages: weights are a mask."""
    x, weights, *given = primals
    found = _statistics(options, *primals)
    moments = found[0]
    operands = {"x": block_of(x, options.axis)}
    if weights is not None:
        operands["weights"] = positions_of(weights, x, options.axis)
    dx, _, *dgiven = (
        jnp.zeros_like(of) if type(tangent) is SymbolicZero and of is not x else tangent
        for of, tangent in zip(primals, tangents, strict=True)
    )
    moving = {} if type(dx) is SymbolicZero else {"x": block_of(dx, options.axis)}
    one_problem = jax.tree.map(lambda value: value[None], moments._asdict())
    moved = _portable.moments_tangent(operands, one_problem, moving)
    dmoments = Moments(
        jnp.zeros_like(moments.count), jnp.broadcast_to(moved["batch"][0], moments.batch.shape)
    )
    averages = partial(_averages, options)
    _, daverages = jax.jvp(averages, (moments, *given), (dmoments, *dgiven))
    return found, (dmoments, daverages)


_statistics.defjvp(_tangents, symbolic_zeros=True)
