"""A batch norm over a batch whose parts lie on several devices, or along an axis of ``vmap``.

Each part takes its moments; all gather all moments and merge them alike, in one order, so that
everyone goes on with the same bits:

    count = sum of n_r,   mean = sum of n_r * mean_r / count,
    variance = sum of n_r * (variance_r + (mean_r - mean)^2) / count

This is exact for parts of any size, of none, and of any weights: Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", 1983. Backward adds up the two sums of the verb `backward_sums`
before `backward` uses them. So there is one collective forward, and one backward.

JAX has no float64 by default, so a mean travels as a sum of two floats, ``mean + low``: distances
from it are as exact as x itself. Variances are merged, for they do not overflow where sums of
squares do.

The derivative of first order is the verbs'; every other is JAX's of the composite. Before all that
every input is made one that varies from part to part, so that JAX itself adds up the gradients of
what all parts share (`scale`, `offset`), as it does for any sum over the axis.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fusebn.jax import _ops, _portable

Array = Any


class Moments(NamedTuple):
    """The moments of a part, or of all: vectors of one value a channel. The mean is mean + low."""

    count: Array
    mean: Array
    low: Array
    variance: Array


class Group(NamedTuple):
    """Who has the batch, in the words of ``jax.lax.psum``."""

    names: tuple[Any, ...]
    groups: tuple[tuple[int, ...], ...] | None


def group_of(axis_name: Any, axis_index_groups: Any) -> Group:
    """Return a group that can be a key."""
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    return Group(names, axis_index_groups and tuple(map(tuple, axis_index_groups)))


# ---- the collectives ----


def _sum(values: Array, group: Group) -> Array:
    return lax.psum(values, group.names, axis_index_groups=group.groups)


def _gather(part: Moments, group: Group) -> Moments:
    """Return the moments of all parts, a row for each."""
    rows = jnp.stack(jnp.broadcast_arrays(*part))
    # What is merged is the same everywhere: where shard_map asks for that, let it know.
    to = "invarying" if group.groups is None and _varying(_index(group)) else "varying"
    gathered = lax.all_gather(rows, group.names, axis_index_groups=group.groups, to=to)
    return Moments(*jnp.moveaxis(gathered, 1, 0))


def _index(group: Group) -> Array:
    return lax.axis_index(group.names)


def _varying(value: Array) -> frozenset[Any]:
    """Return the axes along which a value may vary; none where ``shard_map`` does not track it."""
    varying: frozenset[Any] = jax.typeof(value).manual_axis_type.varying
    return varying


# ---- the merge ----


def merged(part: Moments, group: Group) -> Moments:
    """Return the moments of all parts together."""
    parts = _gather(part, group)
    count = parts.count.sum(0)
    share = parts.count / jnp.where(count > 0, count, 1)
    mean = (share * parts.mean).sum(0)
    apart = parts.mean - mean + parts.low
    low = (share * apart).sum(0)
    variance = (share * (parts.variance + jnp.square(apart - low))).sum(0)
    return Moments(count, mean, low, variance)


def returned(
    batch: Moments,
    mean: Array | None,
    variance: Array | None,
    is_training: Any,
    factor: float,
    correction: float,
) -> tuple[Array, Array]:
    """Return the statistics of a batch as `fused_batch_norm` does, mixed into the given ones."""
    above = batch.count > correction
    unbiased = batch.count / jnp.where(above, batch.count - correction, 1)
    new = batch.mean + batch.low, batch.variance * jnp.where(above, unbiased, 1)

    def one(found: Array, given: Array | None) -> Array:
        if factor == 1:
            found = jnp.where(batch.count > 0, found, jnp.nan)
        else:
            mixed = (1 - factor) * given + factor * found
            found = jnp.where(batch.count > 0, mixed, given)
        return found if is_training is True else jnp.where(is_training, found, given)

    return one(new[0], mean), one(new[1], variance)


# ---- what normalizes ----


class Inputs(NamedTuple):
    """What y depends on. `mean` and `variance` are the given ones, for what is not training."""

    x: Array
    scale: Array | None
    offset: Array | None
    mean: Array | None
    variance: Array | None
    residual: Array | None
    weights: Array | None


class _Constants(NamedTuple):
    """What a channel is normalized by. If nothing was counted all is `lost`: x is forgotten."""

    mean: Array
    low: Array
    rstd: Array
    lost: Array


def _constants(inputs: Inputs, batch: Moments, is_training: Any, epsilon: float) -> _Constants:
    lost = batch.count.max(initial=0) == 0
    mean, low, variance = batch.mean, batch.low, batch.variance
    if is_training is not True:
        lost &= is_training
        mean = jnp.where(is_training, mean, inputs.mean)
        low = jnp.where(is_training, low, 0)
        variance = jnp.where(is_training, variance, inputs.variance)
    shifted = variance + epsilon
    none = lost | (shifted == 0)
    rstd = jnp.where(none, 0, 1 / jnp.sqrt(jnp.where(none, 1, shifted)))
    return _Constants(mean, low, rstd, lost)


def _slope(inputs: Inputs, rstd: Array) -> Array:
    return rstd if inputs.scale is None else rstd * inputs.scale


def _offset(inputs: Inputs, constants: _Constants) -> Array:
    """Return the offset, less what the mean's low part comes to."""
    low = constants.low * _slope(inputs, constants.rstd)
    return -low if inputs.offset is None else inputs.offset - low


def _vary(inputs: Inputs, group: Group) -> Inputs:
    """Make all inputs vary along the same axes."""
    values = [value for value in inputs if value is not None]
    axes = frozenset[Any]().union(*map(_varying, [_index(group), *values]))

    def one(value: Array | None) -> Array | None:
        missing = () if value is None else tuple(axes - _varying(value))
        return lax.pcast(value, missing, to="varying") if missing else value

    return Inputs(*map(one, inputs))


# ---- the composite ----


def _composite(options: Any, group: Group, inputs: Inputs, is_training: Any) -> Array:
    """Return y by JAX's own ops, differentiable as often as one likes."""
    x, axis = inputs.x, options.axis
    part = Moments(*_portable.moments(x, inputs.weights, axis))
    constants = _constants(inputs, merged(part, group), is_training, options.epsilon)
    return _portable.normalize(
        jnp.where(constants.lost, 0, x),
        inputs.scale,
        _offset(inputs, constants),
        constants.mean,
        constants.rstd,
        inputs.residual,
        axis,
        options.activation,
    )


# ---- on the core ----


def batch_norm(
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array | None,
    variance: Array | None,
    residual: Array | None,
    weights: Array | None,
    is_training: Any,
    options: Any,
    axis_name: Any,
    axis_index_groups: Any,
) -> tuple[Array, Array, Array, Array]:
    """Do what `_ops.batch_norm` does, in training with the statistics of all parts."""
    group = group_of(axis_name, axis_index_groups)
    part = Moments(*_ops.moments(x, weights, options.axis))
    batch = merged(part, group)
    inputs = _vary(Inputs(x, scale, offset, mean, variance, residual, weights), group)
    y = _normalized(options, group, inputs, lax.stop_gradient(batch), is_training)
    statistics = returned(batch, mean, variance, is_training, options.factor, options.correction)
    count = batch.count.max(initial=0)
    return y, *statistics, jnp.where(is_training, count, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalized(
    options: Any, group: Group, inputs: Inputs, batch: Moments, is_training: Any
) -> Array:
    """Return y. `batch` is held constant, for the gradient knows what it was made of."""
    constants = _constants(inputs, batch, is_training, options.epsilon)

    def of(x: Array) -> Array:
        return _ops.normalize(
            x,
            inputs.scale,
            _offset(inputs, constants),
            constants.mean,
            constants.rstd,
            inputs.residual,
            options.axis,
            options.activation,
        )

    return _forgetting(constants, of, inputs.x)


def _forgetting(constants: _Constants, of: Any, *arrays: Array) -> Any:
    """Return ``of(x, ...)``, of zeros if x is to be forgotten, NaN and all."""
    x, *others = arrays
    return lax.cond(constants.lost, lambda: of(jnp.zeros_like(x), *others), lambda: of(*arrays))


def _forward(
    options: Any, group: Group, inputs: Inputs, batch: Moments, is_training: Any
) -> tuple[Array, Any]:
    return _normalized(options, group, inputs, batch, is_training), (inputs, batch, is_training)


def _backward(options: Any, group: Group, kept: Any, dy: Array) -> Any:
    return _gradients(options, group, *kept, dy), None, None


_normalized.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    options: Any, group: Group, inputs: Inputs, batch: Moments, is_training: Any, dy: Array
) -> Inputs:
    """Return the gradients of all inputs, None for what is None."""
    constants = _constants(inputs, batch, is_training, options.epsilon)
    rstd, slope = constants.rstd, _slope(inputs, constants.rstd)
    rest = (
        inputs.scale,
        _offset(inputs, constants),
        constants.mean,
        rstd,
        inputs.residual,
    )
    last = options.axis, options.activation

    def sums_of(x: Array) -> tuple[Array, Array]:
        return _ops.backward_sums(dy, x, *rest, *last)

    sum_g, sum_g_x = _forgetting(constants, sums_of, inputs.x)
    sum_g_x -= constants.low * sum_g
    total_g, total_g_x = _sum(jnp.stack([sum_g, sum_g_x]), group)
