"""A batch norm over a batch whose parts lie on several devices, or along an axis of ``vmap``.

Each part takes its moments; all gather all moments and merge them alike, in one order, so that
everyone goes on with the same bits:

    count = sum of n_r,   mean = sum of n_r * mean_r / count,
    variance = sum of n_r * (variance_r + (mean_r - mean)^2) / count

This is exact for parts of any size, of none, and of any weights: Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", 1983. Backward adds up the two sums of the verb `backward_sums`
before `backward` uses them. So there is one collective forward, and one backward.

What is merged are variances, for sums of squares would overflow float32 sooner; and a mean is a
pair, high and low, whose distances from another are as exact as x itself.

The gradient of first order is the verbs'. All others are JAX's, of what the verbs compute. Before
that every input is made one that varies from part to part, so that JAX itself adds up the gradients
of what all parts share (`scale`, `offset`), just as it does for any sum over the axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fusebn.jax import _ops
from fusebn.jax._calls import asked_portable
from fusebn.jax._meshes import varying
from fusebn.jax._ops import Moments, Options
from fusebn.jax._portable import distances

Array = Any


class Group(NamedTuple):
    """Who has the batch, in the words of ``jax.lax.psum``."""

    names: tuple[Any, ...]
    groups: tuple[tuple[int, ...], ...] | None


def group_of(axis_name: Any, axis_index_groups: Any) -> Group:
    """Return a group that can be compared with others."""
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    return Group(names, axis_index_groups and tuple(map(tuple, axis_index_groups)))


class Inputs(NamedTuple):
    """What y depends on; None for what is absent.

    `mean` and `variance` are the given ones, for what is not training.
    """

    x: Array
    scale: Array
    offset: Array
    mean: Array
    variance: Array
    residual: Array
    weights: Array


def batch_norm(
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array | None,
    variance: Array | None,
    residual: Array | None,
    weights: Array | None,
    is_training: Any,
    options: Options,
    axis_name: Any,
    axis_index_groups: Any,
) -> _ops.BatchNorm:
    """Do what `_ops.batch_norm` does in training, with the statistics of all parts.

    Where `is_training`, a traced boolean, turns out to be false, the given ones are used.
    """
    group = group_of(axis_name, axis_index_groups)
    batch = merged(_ops.moments(x, weights, options.axis), group)
    inputs = Inputs(x, scale, offset, mean, variance, residual, weights)
    inputs, used = vary((inputs, batch), inputs)
    flag = None if is_training is True else is_training  # None: training for sure
    if asked_portable():
        y = _normalize(options, flag, inputs, used)
    else:
        y = _normalized(options, group, inputs, lax.stop_gradient(used), flag)
    statistics = returned(batch, mean, variance, is_training, options.factor, options.correction)
    return _ops.BatchNorm(y, *statistics, jnp.where(is_training, batch.count.max(initial=0), 0))


# ---- the collectives ----


def _sum(values: Array, group: Group) -> Array:
    return lax.psum(values, group.names, axis_index_groups=group.groups)


def _gather(values: Array, group: Group) -> Array:
    """Return the values of all parts, one after another."""
    # What is merged is the same everywhere: where shard_map asks for that, let it know.
    to = "invarying" if group.groups is None and varying(values) else "varying"
    return lax.all_gather(values, group.names, axis_index_groups=group.groups, to=to)


def vary(values: Any, like: Any) -> Any:
    """Make arrays vary along all axes along which some array in `like` does."""
    axes = frozenset[Any]().union(*map(varying, jax.tree.leaves(like)))

    def one(value: Array) -> Array:
        missing = tuple(axes - varying(value))
        return lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(one, values)


# ---- statistics ----


def merged(part: Moments, group: Group) -> Moments:
    """Return the moments of all parts together, with a count for each channel."""
    channels = part.batch.shape[-1]
    # A part of nothing has no mean that a first weight could move: no gradient goes that way.
    weight = jnp.where(part.count > 0, part.count, 0)
    rows = [jnp.broadcast_to(weight, (1, channels)), part.batch.reshape(4, channels)]
    counts, highs, lows, *variances = jnp.moveaxis(_gather(jnp.concatenate(rows), group), 1, 0)
    count = counts.sum(0)
    share = counts / jnp.where(count > 0, count, 1)
    high = (share * highs).sum(0)
    apart = highs - high + lows
    low = (share * apart).sum(0)
    variance = (share * (sum(variances) + jnp.square(apart - low))).sum(0)
    return Moments(count, pairs(high, low, variance))


def pairs(high: Array, low: Array, variance: Array) -> Array:
    """Return statistics in the form that the verbs take."""
    return jnp.stack([high, low, variance, jnp.zeros_like(variance)]).reshape(2, 2, -1)


def returned(
    batch: Moments,
    mean: Array,
    variance: Array,
    is_training: Any,
    factor: float,
    correction: float,
) -> tuple[Array, Array]:
    """Return the statistics of a batch as `fused_batch_norm` does, mixed into the given ones."""
    counted, above = batch.count > 0, batch.count > correction
    unbiased = batch.count / jnp.where(above, batch.count - correction, 1)
    found = batch.batch.sum(1) * jnp.stack([jnp.ones_like(unbiased), jnp.where(above, unbiased, 1)])

    def one(new: Array, given: Array) -> Array:
        if factor == 1:
            new = jnp.where(counted, new, jnp.nan)
        else:
            new = jnp.where(counted, (1 - factor) * given + factor * new, given)
        return new if is_training is True else jnp.where(is_training, new, given)

    return one(found[0], mean), one(found[1], variance)


# ---- y ----


def _used(inputs: Inputs, batch: Moments, is_training: Any) -> tuple[Moments, Array]:
    """Return what normalizes, with count 0 if that is given; and whether x is to be forgotten."""
    count, used = batch.count.max(initial=0), batch.batch
    lost = count == 0
    # As if the variance were infinite.
    used = jnp.where(lost, jnp.zeros_like(used).at[1, 0].set(jnp.inf), used)
    if is_training is not None:
        given = pairs(inputs.mean, jnp.zeros_like(inputs.mean), inputs.variance)
        used, count = jnp.where(is_training, used, given), jnp.where(is_training, count, 0)
        lost &= is_training
    return Moments(count, used), lost


def _forgetting(lost: Array, of: Callable[[Array], Any], x: Array) -> Any:
    """Return ``of(x)``, of zeros if x is to be forgotten, NaN and all."""
    return lax.cond(lost, lambda: of(jnp.zeros_like(x)), lambda: of(x))


def _normalize(options: Options, is_training: Any, inputs: Inputs, batch: Moments) -> Array:
    used, lost = _used(inputs, batch, is_training)
    rest = used.batch, inputs.scale, inputs.offset, inputs.residual, options
    return _forgetting(lost, lambda x: _ops.normalize(x, *rest), inputs.x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalized(
    options: Options, group: Group, inputs: Inputs, batch: Moments, is_training: Any
) -> Array:
    """Return y. `batch` is held constant: the gradient knows what it was made of."""
    return _normalize(options, is_training, inputs, batch)


def _forward(
    options: Options, group: Group, inputs: Inputs, batch: Moments, is_training: Any
) -> tuple[Array, Any]:
    # Who differentiates a gradient differentiates this too, where `batch` is as constant.
    y = _normalized(options, group, inputs, batch, is_training)
    return y, (inputs, batch, is_training)


def _backward(options: Options, group: Group, kept: Any, dy: Array) -> Any:
    return _gradients(options, group, *kept, dy), None, None


_normalized.defvjp(_forward, _backward)


# ---- its gradients ----


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(
    options: Options, group: Group, inputs: Inputs, batch: Moments, is_training: Any, dy: Array
) -> Inputs:
    """Return the gradients of all inputs, None for what is None."""
    sums = _sums(options, is_training, inputs, batch, dy)
    return _given_sums(options, is_training, inputs, batch, dy, sums, _sum(sums, group))


def _sums(options: Options, is_training: Any, inputs: Inputs, batch: Moments, dy: Array) -> Array:
    """Return what the parts have to add up: the sums of g and of g * (x - mean)."""
    used, lost = _used(inputs, batch, is_training)
    rest = used.batch, inputs.scale, inputs.offset, inputs.residual, options
    return _forgetting(lost, lambda x: jnp.stack(_ops.backward_sums(dy, x, *rest)), inputs.x)


def _given_sums(
    options: Options,
    is_training: Any,
    inputs: Inputs,
    batch: Moments,
    dy: Array,
    sums: Array,
    totals: Array,
) -> Inputs:
    """Return the gradients, given the sums of this part and of all."""
    used, lost = _used(inputs, batch, is_training)
    scale, offset, residual, weights = inputs.scale, inputs.offset, inputs.residual, inputs.weights
    rest = used.batch, scale, offset, residual, weights, used.count, *totals, None, None, options
    dx, dresidual = _forgetting(lost, lambda x: _ops.backward(dy, x, *rest), inputs.x)
    rstd = _rstd(used, options.epsilon)
    slope = rstd if scale is None else scale * rstd
    # What flows into the mean and the variance that normalized x.
    into = -slope * jnp.stack([jnp.ones_like(rstd), jnp.square(rstd) / 2])
    given = jnp.where(True if is_training is None else is_training, 0, into * sums)
    return Inputs(
        dx,
        None if scale is None else rstd * sums[1],
        None if offset is None else sums[0],
        None if inputs.mean is None else given[0],
        None if inputs.variance is None else given[1],
        dresidual,
        None if weights is None else _into_weights(options, inputs, used, into * totals),
    )


def _rstd(used: Moments, epsilon: float) -> Array:
    shifted = used.batch[1].sum(0) + epsilon
    return jnp.where(shifted == 0, 0, lax.rsqrt(shifted))


# ---- what flows through the statistics ----


def _into_x(options: Options, inputs: Inputs, batch: Moments, into: Array) -> Array:
    """Return the gradient of x, given those of the mean and biased variance of the batch."""
    x, nothing = inputs.x, jnp.zeros_like(into[0])
    plain = None, None, None, inputs.weights, batch.count.max(initial=0), nothing, nothing
    identity = options._replace(activation="identity")
    return _ops.backward(jnp.zeros_like(x), x, batch.batch, *plain, into[0], into[1], identity)[0]


def _into_weights(options: Options, inputs: Inputs, batch: Moments, into: Array) -> Array:
    """Return the same of the weights; a weight moves the statistics of all channels."""
    x, weights = inputs.x, inputs.weights

    def along(vector: Array) -> Array:
        return jnp.expand_dims(vector, [i for i in range(x.ndim) if i != options.axis])

    (high, low), variance = batch.batch[0], batch.batch[1].sum(0)
    share = jnp.where(batch.count > 0, 1 / jnp.where(batch.count > 0, batch.count, 1), 0)
    _, centred, excess = distances(
        x.astype(high.dtype), along(high), along(low), along(variance), weights
    )
    moved = along(share * into[0]) * centred + along(share * into[1]) * excess
    broadcast = [i for i, length in enumerate(weights.shape) if length == 1]
    return moved.sum(broadcast, keepdims=True)


# ---- the gradients of the gradients ----
#
# By hand where devices meet, for inside of a custom derivative `vmap` names no axis for which JAX
# could differentiate a collective.


def _gradients_forward(
    options: Options, group: Group, inputs: Inputs, batch: Moments, is_training: Any, dy: Array
) -> tuple[Inputs, Any]:
    gradients = _gradients(options, group, inputs, batch, is_training, dy)
    return gradients, (inputs, batch, is_training, dy)


def _gradients_backward(options: Options, group: Group, kept: Any, into: Inputs) -> Any:
    inputs, batch, is_training, dy = kept
    sums, of_sums = jax.vjp(partial(_sums, options, is_training), inputs, batch, dy)
    totals = vary(_sum(sums, group), sums)
    _, of_rest = jax.vjp(
        partial(_given_sums, options, is_training), inputs, batch, dy, sums, totals
    )
    *direct, dsums, dtotals = of_rest(into)
    through_sums = of_sums(dsums + _sum(dtotals, group))
    dinputs, dbatch, ddy = jax.tree.map(jnp.add, tuple(direct), through_sums)
    dcount, dstatistics = jax.tree.map(partial(_sum, group=group), dbatch)
    into_statistics = dstatistics[:, 0]  # of each pair, high + low, the high one tells
    dx = dinputs.x + _into_x(options, inputs, batch, into_statistics)
    dweights = dinputs.weights
    if dweights is not None:
        dweights += _into_weights(options, inputs, batch, into_statistics) + dcount.sum()
    return dinputs._replace(x=dx, weights=dweights), None, None, ddy


_gradients.defvjp(_gradients_forward, _gradients_backward)
