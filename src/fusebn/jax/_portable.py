"""The calls again, made of JAX's own operations: for GPUs, TPUs, export and derivatives.

Each function takes what a handler of csrc/bindings/xla.cpp takes for one problem, by name: x as a
block ``[outer, channels, inner]``, weights ``[outer, inner]``, vectors ``[channels]``. By the
textbook in two passes, differentiable as often as one likes. What keeps it safe:

- moments: distances from the mean are summed, never ``E[x^2] - E[x]^2``. The mean is a sum of two
  numbers, ``high + low``, found as a rough mean and the mean distance from it: float32 data of
  1e6 +- 1 is centred as exactly as it can carry, and the variance cannot be negative.
- normalize: the mean is taken from x before anything else.
- every division and square root is guarded before it is taken, so that no derivative of a branch
  that is not chosen becomes NaN.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Array = Any
Arrays = dict[str, Array]  # by the names of `_calls.OPERANDS` and `_calls.RESULTS`


class Options(NamedTuple):
    """The arguments of a batch norm that are no arrays."""

    axis: int = -1  # of channels; counted from the front where it matters
    epsilon: float = 1e-3
    correction: float = 1.0
    factor: float = 1.0
    activation: str = "identity"
    training: bool | None = None  # None: the operand `training` tells when the program runs


# A NaN stays one; at a kink the derivative is that of the side nearer to 0, as in the core.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "relu": lambda z: jnp.where(z <= 0, 0, z),
    "relu6": lambda z: jnp.where(z <= 0, 0, jnp.where(z >= 6, 6, z)),
    "leaky_relu": lambda z: jnp.where(z > 0, z, 0.01 * z),
    "silu": lambda z: z * jax.nn.sigmoid(z),
    "gelu": lambda z: 0.5 * z * jax.lax.erfc(-math.sqrt(0.5) * z),
}


def stat_type(x: Array) -> Any:
    """Return the dtype of the statistics of x."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _wide(x: Array) -> Array:
    return x.astype(stat_type(x))


def _spread(vector: Array) -> Array:
    """Lay a vector along the channels of a block."""
    return vector[:, None]


def _sum(block: Array) -> Array:
    return jnp.sum(block, axis=(0, 2))


# ---- the verbs ----


def _centred(x: Array, mean: Array) -> Array:
    """Return x - mean, wide; the mean is a pair, high and low."""
    return _wide(x) - _spread(mean[0]) - _spread(mean[1])


Moments = tuple[Array, Array, Array]  # the count, the mean as a pair, and the biased variance


@jax.custom_jvp
def _moments(x: Array, weights: Array | None) -> Moments:
    """Return the moments of a block; 0, 0, 0 of nothing."""
    x = _wide(x)
    if weights is None:
        w: Any = jnp.ones((), x.dtype)
        count = jnp.asarray(x.shape[0] * x.shape[2]).astype(x.dtype)
    else:
        w = weights[:, None, :]
        count = jnp.sum(weights)
        x = jnp.where(w > 0, x, 0)
    n = jnp.where(count > 0, count, 1)
    near = _sum(w * x) / n
    rest = _sum(w * (x - _spread(near))) / n
    high = near + rest  # the mean, rounded; low is what that lost
    mean = jnp.stack([high, rest - (high - near)])
    mean = jnp.where(jnp.isfinite(mean), mean, math.nan)
    distance = _centred(x, mean)
    if weights is not None:
        distance = jnp.where(w > 0, distance, 0)
    return count, mean, _sum(w * jnp.square(distance)) / n


def _moments_jvp(primals: Any, tangents: Any) -> tuple[Moments, Moments]:
    found = count, mean, variance = _moments(*primals)
    names = "x", "weights"
    moved = moments_tangent(
        {name: of[None] for name, of in zip(names, primals, strict=True) if of is not None},
        {"count": count[None], "batch": _batch(mean, variance)[None]},
        {
            name: tangent[None]
            for name, tangent in zip(names, tangents, strict=True)
            if tangent is not None and type(tangent) is not SymbolicZero
        },
    )
    dmean, (dvariance, _) = moved["batch"][0]
    return found, (moved["count"][0], dmean, dvariance)


_moments.defjvp(_moments_jvp, symbolic_zeros=True)


def moments(operands: Arrays, options: Options) -> Arrays:
    """Return `count` and `batch`: the mean and biased variance, each as a pair, high and low."""
    count, mean, variance = _moments(operands["x"], operands.get("weights"))
    return {"count": count, "batch": _batch(mean, variance)}


def moments_tangent(operands: Arrays, found: Arrays, tangents: Arrays) -> Arrays:
    """Return the tangents of what `moments` found; unlike all else here, of all problems at once.

    dmean     = sum(weight * dx + (x - mean) * dweight) / count
    dvariance = sum(2 * weight * (x - mean) * dx + ((x - mean)^2 - variance) * dweight) / count
    """
    x, count, batch = _wide(operands["x"]), found["count"], found["batch"]
    spread = (slice(None), None, slice(None), None)
    n = jnp.where(count > 0, count, 1)[spread[0], None]
    weights = operands["weights"][:, :, None] if "weights" in operands else None
    high, low, variance = (batch[:, i, j][spread] for i, j in ((0, 0), (0, 1), (1, 0)))
    told, centred, excess = distances(x, high, low, variance, weights)
    dmean: Array = 0
    dvariance: Array = 0
    dcount = jnp.zeros_like(count)
    if "x" in tangents:
        dx = _wide(tangents["x"])
        if weights is not None:
            dx = weights * jnp.where(told, dx, 0)
        dmean = jnp.sum(dx, (1, 3)) / n
        dvariance = jnp.sum(2 * centred * dx, (1, 3)) / n
    if "weights" in tangents:
        dweights = tangents["weights"][:, :, None]
        dcount = jnp.broadcast_to(jnp.sum(dweights, (1, 2, 3)), count.shape)
        dmean = dmean + jnp.sum(centred * dweights, (1, 3)) / n
        dvariance = dvariance + jnp.sum(excess * dweights, (1, 3)) / n
    zero = jnp.zeros_like(batch[:, 0, 0])
    pairs = [jnp.stack([zero + moved, zero], 1) for moved in (dmean, dvariance)]
    return {"count": dcount, "batch": jnp.stack(pairs, 1)}


def distances(
    x: Array, high: Array, low: Array, variance: Array, weights: Array | None
) -> tuple[Array, Array, Array]:
    """Return what can be told, x - mean, and (x - mean)^2 - variance.

    By the last two, over the count, a weight moves mean and variance. A weight of 0 does so like
    any other: it is where a position begins to count. Only where x holds a NaN or an infinity that
    does not count there is nothing to tell: there they are 0.
    """
    centred = x - high - low
    told = jnp.isfinite(jnp.square(centred))
    told = jnp.ones_like(told) if weights is None else told | (weights > 0)
    centred = jnp.where(told, centred, 0)
    return told, centred, jnp.where(told, jnp.square(centred) - variance, 0)


def _batch(mean: Array, variance: Array) -> Array:
    return jnp.stack([mean, jnp.stack([variance, jnp.zeros_like(variance)])])


def rstd_of(variance: Array, epsilon: float) -> Array:
    """Return 1 / sqrt(variance + epsilon), 0 where that is infinite or the root of nothing."""
    shifted = variance + epsilon
    none = (shifted == 0) | jnp.isinf(shifted)
    return jnp.where(none, 0, jax.lax.rsqrt(jnp.where(none, 1, shifted)))


def _preactivation(
    operands: Arrays, mean: Array, variance: Array, epsilon: float
) -> tuple[Array, Array]:
    """Return x - mean and what the activation sees, wide."""
    rstd = rstd_of(variance, epsilon)
    # Where the batch is forgotten, so is an infinite x.
    x = jnp.where(_spread(rstd == 0), 0, _centred(operands["x"], mean))
    scale = operands.get("scale")
    z = x * _spread(rstd if scale is None else rstd * scale)
    if "offset" in operands:
        z = z + _spread(operands["offset"])
    if "residual" in operands:
        z = z + _wide(operands["residual"])
    return x, z


def _given(batch: Array) -> tuple[Array, Array]:
    """Return the mean as a pair and the variance."""
    return batch[0], batch[1, 0]


def normalize(operands: Arrays, options: Options) -> Arrays:
    """Return `y`, normalized by the statistics in `batch`."""
    _, z = _preactivation(operands, *_given(operands["batch"]), options.epsilon)
    return {"y": ACTIVATIONS[options.activation](z).astype(operands["x"].dtype)}


def _into_preactivation(operands: Arrays, options: Options) -> tuple[Array, Array]:
    """Return x - mean and the gradient of what the activation saw."""
    x, z = _preactivation(operands, *_given(operands["batch"]), options.epsilon)
    _, back = jax.vjp(ACTIVATIONS[options.activation], z)
    (g,) = back(operands["dy"].astype(z.dtype))
    return x, g


def backward_sums(operands: Arrays, options: Options) -> Arrays:
    """Return `sum_g` and `sum_g_x`: the sums of g and of g * (x - mean)."""
    x, g = _into_preactivation(operands, options)
    return {"sum_g": _sum(g), "sum_g_x": _sum(g * x)}


def backward(operands: Arrays, options: Options) -> Arrays:
    """Return `dx` and `dresidual`, given the sums and the count of all devices."""
    x, g = _into_preactivation(operands, options)
    count, scale, weights = operands["count"], operands.get("scale"), operands.get("weights")
    rstd = rstd_of(_given(operands["batch"])[1], options.epsilon)
    slope = rstd if scale is None else rstd * scale
    share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
    into_mean = -slope * operands["sum_g"] + operands.get("dmean", 0)
    into_x = -slope * jnp.square(rstd) * operands["sum_g_x"] + 2 * operands.get("dvariance", 0)
    through = share * (_spread(into_mean) + x * _spread(into_x))
    if weights is not None:
        through = weights[:, None, :] * through
    dtype = operands["x"].dtype
    return {"dx": (_spread(slope) * g + through).astype(dtype), "dresidual": g.astype(dtype)}


# ---- the compositions ----


def forward(operands: Arrays, options: Options) -> Arrays:
    """Return `y`, the returned `mean` and `variance`, `batch`, and `count`."""
    x, training = operands["x"], options.training
    flag = operands["training"] if training is None else training
    stat = stat_type(x)
    given = None
    if "mean" in operands:
        given = jnp.stack([operands["mean"], operands["variance"]])
    count = jnp.zeros((), stat)
    if training is not False:
        count, pair, biased = _moments(x, operands.get("weights"))
        counted = count > 0
        n = jnp.where(counted, count, 1)
        unbiased = jnp.where(count > options.correction, count - options.correction, n)
        found = jnp.stack([pair[0], biased * (n / unbiased)])
        returned = jnp.where(counted, found, math.nan)
        if given is not None and options.factor != 1:
            mixed = (1 - options.factor) * given + options.factor * found
            returned = jnp.where(counted, mixed, given)
        batch = jnp.where(counted, _batch(pair, biased), math.nan)
    if training is not True:
        assert given is not None
        still = _batch(jnp.stack([given[0], jnp.zeros_like(given[0])]), given[1])
        if training is None:
            batch = jnp.where(flag, batch, still)
            returned = jnp.where(flag, returned, given)
            count = jnp.where(flag, count, 0)
        else:
            batch, returned = still, given
    mean, variance = _given(batch)
    # A batch of count 0 is normalized as if its variance were infinite: x is forgotten.
    lost = jnp.logical_and(flag, count == 0)
    mean, variance = jnp.where(lost, 0, mean), jnp.where(lost, math.inf, variance)
    _, z = _preactivation(operands, mean, variance, options.epsilon)
    y = ACTIVATIONS[options.activation](z).astype(x.dtype)
    return {"y": y, "mean": returned[0], "variance": returned[1], "batch": batch, "count": count}


OUTPUTS = ("y", "mean", "variance")  # of forward, into which gradients flow


def outputs_of(
    operands: Arrays, options: Options, names: Iterable[str]
) -> tuple[Callable[..., tuple[Array, ...]], list[Array]]:
    """Return the differentiable outputs of `forward` as a function of the named operands."""
    names = list(names)

    def outputs(*values: Array) -> tuple[Array, ...]:
        found = forward({**operands, **dict(zip(names, values, strict=True))}, options)
        return tuple(found[name] for name in OUTPUTS)

    return outputs, [operands[name] for name in names]


# Result of the gradient -> the operand it is of.
GRADIENTS = {
    "dx": "x",
    "dresidual": "residual",
    "dscale": "scale",
    "doffset": "offset",
    "mean": "mean",
    "variance": "variance",
    "dweights": "weights",
}


def gradient(operands: Arrays, options: Options) -> Arrays:
    """Return the gradients of `forward`; those of the given statistics have their names."""
    operands = dict(operands)
    into = (operands.pop("dy"), operands.pop("dmean", None), operands.pop("dvariance", None))
    operands.pop("batch")  # a function of x
    sources = {result: name for result, name in GRADIENTS.items() if name in operands}
    outputs, values = outputs_of(operands, options, sources.values())
    found, back = jax.vjp(outputs, *values)
    cotangents = tuple(
        jnp.zeros_like(value) if given is None else given
        for value, given in zip(found, into, strict=True)
    )
    return dict(zip(sources, back(cotangents), strict=True))


PREFIX = "tangent_"


def tangent(operands: Arrays, options: Options) -> Arrays:
    """Return the tangents of `forward`'s outputs; those of operands are named after them."""
    tangents = {name.removeprefix(PREFIX): operands[name] for name in operands if PREFIX in name}
    primals = {name: value for name, value in operands.items() if PREFIX not in name}
    outputs, values = outputs_of(primals, options, tangents)
    _, found = jax.jvp(outputs, tuple(values), tuple(tangents.values()))
    return dict(zip(OUTPUTS, found, strict=True))
