"""Batch normalization and its verbs on JAX's arrays, and their derivatives.

`batch_norm` takes canonical arguments (see `_functions`) and is differentiable as often as one
likes, forwards and backwards. Its tangent is a call of its own, linear, whose transpose is the
fused gradient: reverse mode runs that and nothing else. What comes after the first derivative is
JAX's of the composite of `_portable`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from fusebn.jax import _portable
from fusebn.jax._calls import (
    Call,
    asked_portable,
    block_of,
    portable,
    positions_of,
    support,
    unblocked,
)
from fusebn.jax._meshes import along, automatic
from fusebn.jax._portable import OUTPUTS, PREFIX, Array, Arrays, Options

__all__ = [
    "BatchNorm",
    "Moments",
    "Options",
    "asked_portable",
    "backward",
    "backward_sums",
    "batch_norm",
    "batch_norm_gradient",
    "moments",
    "moments_over",
    "normalize",
    "portable",
    "statistics",
    "support",
]

_forward = Call("forward", _portable.forward)
_gradient = Call("gradient", _portable.gradient)
_tangent = Call("tangent", _portable.tangent)
_moments = Call("moments", _portable.moments)
_normalize = Call("normalize", _portable.normalize)
_backward_sums = Call("backward_sums", _portable.backward_sums)
_backward = Call("backward", _portable.backward)


# ---- derivatives ----


def _composite_jvp(call: Call) -> Any:
    """Return the rule of a call whose tangents are the composite's."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> tuple[Any, Any]:
        found = call.primitive.bind(*primals, **parameters)
        moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

        def composite(*values: Array) -> list[Array]:
            arguments = list(primals)
            for i, value in zip(moving, values, strict=True):
                arguments[i] = value
            return call.composite(*arguments, **parameters)

        _, moved = jax.jvp(
            composite, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
        )
        return found, moved

    return rule


for _call in (_gradient, _tangent, _normalize, _backward_sums, _backward):
    ad.primitive_jvps[_call.primitive] = _composite_jvp(_call)


def _moments_jvp(
    primals: Any, tangents: Any, *, names: Any, results: Any, options: Options
) -> tuple[Any, Any]:
    """Differentiate the textbook's formulas, with the mean that is known."""
    found = _moments.primitive.bind(*primals, names=names, results=results, options=options)
    outputs = dict(zip(results, found, strict=True))
    moved = _portable.moments_tangent(
        dict(zip(names, primals, strict=True)),
        outputs,
        {
            name: tangent
            for name, tangent in zip(names, tangents, strict=True)
            if type(tangent) is not ad.Zero
        },
    )
    return found, [moved[name] for name in results]


ad.primitive_jvps[_moments.primitive] = _moments_jvp


def _forward_jvp(
    primals: Any, tangents: Any, *, names: Any, results: Any, options: Options
) -> tuple[Any, Any]:
    found = _forward.primitive.bind(*primals, names=names, results=results, options=options)
    outputs = dict(zip(results, found, strict=True))
    operands = {**dict(zip(names, primals, strict=True)), "batch": outputs["batch"]}
    moving = {
        name: tangent
        for name, tangent in zip(names, tangents, strict=True)
        if type(tangent) is not ad.Zero
    }
    residual = None
    if options.activation == "identity":  # then a residual is just added, and its value forgotten
        operands.pop("residual", None)
        residual = moving.pop("residual", None)
    moved: Arrays = {}
    if moving:
        named = {PREFIX + name: tangent for name, tangent in moving.items()}
        moved = _tangent({**operands, **named}, OUTPUTS, options)
    if residual is not None:
        moved["y"] = moved["y"] + residual if moving else residual
    still = {name: ad.Zero(jax.typeof(value).to_tangent_aval()) for name, value in outputs.items()}
    return found, [moved.get(name, still[name]) for name in results]


ad.primitive_jvps[_forward.primitive] = _forward_jvp


def _tangent_transpose(
    cotangents: Any, *values: Any, names: Any, results: Any, options: Options
) -> list[Any]:
    """Return the gradients with respect to the tangents: what reverse mode comes to."""
    by_name = dict(zip(names, values, strict=True))
    wanted = [
        name.removeprefix(PREFIX)
        for name in names
        if PREFIX in name and ad.is_undefined_primal(by_name[name])
    ]
    operands = {name: value for name, value in by_name.items() if PREFIX not in name}
    into = {
        name: cotangent
        for name, cotangent in zip(results, cotangents, strict=True)
        if type(cotangent) is not ad.Zero
    }
    if not into:
        return [None] * len(names)
    found = gradients_of(operands, into, wanted, options)

    def summed(name: str) -> Array | None:
        """Return a gradient; of what the problems share, the sum of theirs."""
        gradient = found.get(name.removeprefix(PREFIX)) if PREFIX in name else None
        if gradient is not None and by_name[name].aval.shape[0] < gradient.shape[0]:
            gradient = gradient.sum(0, keepdims=True)
        return gradient

    return [summed(name) for name in names]


ad.primitive_transposes[_tangent.primitive] = _tangent_transpose


def gradients_of(operands: Arrays, into: Arrays, wanted: list[str], options: Options) -> Arrays:
    """Return the gradients with respect to the wanted operands, by their names.

    `operands` are those of forward, and `batch`; `into` holds what flows into its outputs.
    """
    x = operands["x"]
    dy = into.get("y")
    arguments = {**operands, "dy": jnp.zeros_like(x) if dy is None else dy}
    arguments |= {f"d{name}": into[name] for name in ("mean", "variance") if name in into}
    results = [
        result
        for result, name in _portable.GRADIENTS.items()
        if name in wanted and name != "weights"
    ]
    if "dresidual" in results and "dx" not in results:
        results.append("dx")
    found = _gradient(arguments, results, options) if results else {}
    gradients = {_portable.GRADIENTS[result]: value for result, value in found.items()}
    if "weights" in wanted:
        gradients["weights"] = _weights_gradient(arguments, options)
    return gradients


def _weights_gradient(arguments: Arrays, options: Options) -> Array:
    """Return what the kernels do not compute; the composite does."""
    names = tuple(arguments)
    (found,) = _gradient.composite(
        *arguments.values(), names=names, results=("dweights",), options=options
    )
    return found


# ---- batch norm ----


class BatchNorm(NamedTuple):
    """What `batch_norm` returns."""

    y: Array
    mean: Array
    variance: Array
    count: Array  # sum of the weights; 0 outside training


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
) -> BatchNorm:
    """Return y, the mean and variance returned, and the count.

    Vectors are [channels], of the statistics' type (float32, or float64 if x is); weights too, and
    broadcast to x with length 1 for channels. `options.axis` is counted from the front.
    `is_training` is a bool or a boolean scalar. The given statistics are there where they are read:
    without training, where that is not known, and where `options.factor` is not 1.
    """
    static = is_training if isinstance(is_training, bool) else None
    options = options._replace(training=static)
    vector = partial(along, x, options.axis)
    compute = automatic(
        _batch_norm, x, lambda: BatchNorm(along(x, *range(x.ndim)), vector(), vector(), along(x))
    )
    found: BatchNorm = compute(
        x, scale, offset, mean, variance, residual, weights,
        None if static is not None else is_training,
        options=options,
    )  # fmt: skip
    return found


@partial(jax.jit, static_argnames="options", inline=True)
def _batch_norm(
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array | None,
    variance: Array | None,
    residual: Array | None,
    weights: Array | None,
    is_training: Array | None,
    *,
    options: Options,
) -> BatchNorm:
    operands = _operands(x, options.axis, residual, weights)
    operands |= _vectors(scale=scale, offset=offset, mean=mean, variance=variance)
    operands["training"] = _flag(is_training, options)
    found = _forward(operands, ("y", "mean", "variance", "batch", "count"), options)
    return BatchNorm(
        unblocked(found["y"], x), *(found[name][0] for name in ("mean", "variance", "count"))
    )


def batch_norm_gradient(
    dy: Array,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    residual: Array | None,
    weights: Array | None,
    dmean: Array | None,
    dvariance: Array | None,
    is_training: Any,
    options: Options,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Return dx, dscale, doffset and dresidual, None for what is absent.

    The mean and biased variance are those that normalized x; dmean and dvariance flow into them.
    """
    static = is_training if isinstance(is_training, bool) else None
    options = options._replace(training=static)

    def shardings() -> Any:
        of_x, vector = along(x, *range(x.ndim)), along(x, options.axis)
        wanted = (x, of_x), (scale, vector), (offset, vector), (residual, of_x)
        return tuple(None if value is None else sharding for value, sharding in wanted)

    compute = automatic(_batch_norm_gradient, x, shardings)
    gradients: tuple[Array, Array | None, Array | None, Array | None] = compute(
        dy, x, scale, offset, mean, variance, residual, weights, dmean, dvariance,
        None if static is not None else is_training,
        options=options,
    )  # fmt: skip
    return gradients


@partial(jax.jit, static_argnames="options", inline=True)
def _batch_norm_gradient(
    dy: Array,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    residual: Array | None,
    weights: Array | None,
    dmean: Array | None,
    dvariance: Array | None,
    is_training: Array | None,
    *,
    options: Options,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    operands = _operands(x, options.axis, residual, weights)
    operands["training"] = _flag(is_training, options)
    operands |= _vectors(scale=scale, offset=offset, mean=mean, variance=variance)
    low = jnp.zeros_like(mean)
    operands["batch"] = jnp.stack([jnp.stack([mean, low]), jnp.stack([variance, low])])[None]
    into = {"y": block_of(dy, options.axis)}
    into |= _vectors(mean=dmean, variance=dvariance)
    wanted = [name for name in operands if name in ("x", "residual", "scale", "offset")]
    found = gradients_of(operands, into, wanted, options)

    dscale, doffset = (found[name][0] if name in found else None for name in ("scale", "offset"))
    dresidual = None if residual is None else unblocked(found["residual"], x)
    return unblocked(found["x"], x), dscale, doffset, dresidual


def _flag(is_training: Array | None, options: Options) -> Array:
    return jnp.asarray(np.bool_(options.training) if is_training is None else is_training)[None]


def _vectors(**values: Array | None) -> Arrays:
    """Return those that are not None, each as that of one problem."""
    return {name: value[None] for name, value in values.items() if value is not None}


def _operands(x: Array, axis: int, residual: Array | None, weights: Array | None) -> Arrays:
    operands = {"x": block_of(x, axis)}
    if residual is not None:
        operands["residual"] = block_of(residual, axis)
    if weights is not None:
        operands["weights"] = positions_of(weights, x, axis)
    return operands


# ---- the verbs one by one, for those who bring devices together between them ----


class Moments(NamedTuple):
    """Statistics of a batch."""

    count: Array  # sum of the weights
    batch: Array  # mean and biased variance, each as high + low: [2, 2, channels]


def moments(x: Array, weights: Array | None, axis: int) -> Moments:
    """Return the statistics over all axes but one; 0 where the count is."""
    found = _moments(_operands(x, axis, None, weights), ("batch", "count"), Options())
    return Moments(found["count"][0], found["batch"][0])


def statistics(
    x: Array, weights: Array | None, mean: Array, variance: Array, options: Options
) -> tuple[Moments, tuple[Array, Array]]:
    """Return the moments, and mean and variance as `batch_norm` returns them in training.

    To the last bit, for it is the same call, whose y is dropped.
    """
    operands = _operands(x, options.axis, None, weights)
    operands |= _vectors(mean=mean, variance=variance)
    options = options._replace(training=True, activation="identity")
    operands["training"] = _flag(None, options)
    found = _forward(operands, ("y", "mean", "variance", "batch", "count"), options)
    count, batch = found["count"][0], found["batch"][0]
    moments = Moments(count, jnp.where(count > 0, batch, 0))
    return moments, (found["mean"][0], found["variance"][0])


def moments_over(
    x: Array, weights: Array | None, reduced: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """Return the count, the mean as high and low, and the biased variance over any set of axes.

    High is the mean rounded, so low is of use to those only who go on computing. `reduced` is
    sorted; weights have the rank of x, and length 1 for the kept axes.
    """
    kept = [axis for axis in range(x.ndim) if axis not in reduced]
    compute = automatic(_moments_over, x, lambda: (along(x), *[along(x, *kept)] * 3))
    found: tuple[Array, Array, Array, Array] = compute(x, weights, kept=kept, reduced=reduced)
    return found


def _moments_over(
    x: Array, weights: Array | None, *, kept: list[int], reduced: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    shape = tuple(x.shape[axis] for axis in kept)
    if weights is not None:
        full = tuple(1 if axis in kept else n for axis, n in enumerate(x.shape))
        weights = jnp.broadcast_to(weights, full)
    first = kept[0] if kept else 0
    if kept != list(range(first, first + len(kept))):  # the core keeps neighbours
        order = [*kept, *reduced]
        x = x.transpose(order)
        weights = None if weights is None else weights.transpose(order)
        first = 0
    last = first + len(kept)

    def block(array: Array) -> Array:
        parts = array.shape[:first], array.shape[first:last], array.shape[last:]
        return array.reshape([math.prod(part) for part in parts])

    found = moments(block(x), None if weights is None else block(weights), 1)
    (high, low), (variance, _) = found.batch.reshape(2, 2, *shape)
    return found.count, high, low, variance


def _normalization(
    x: Array, batch: Array, scale: Any, offset: Any, residual: Any, axis: int
) -> Arrays:
    operands = {**_operands(x, axis, residual, None), "batch": batch[None]}
    return operands | _vectors(scale=scale, offset=offset)


def normalize(
    x: Array, batch: Array, scale: Any, offset: Any, residual: Any, options: Options
) -> Array:
    """Return y, normalized by the mean and variance in `batch` (see `Moments`)."""
    operands = _normalization(x, batch, scale, offset, residual, options.axis)
    return unblocked(_normalize(operands, ("y",), options)["y"], x)


def backward_sums(
    dy: Array, x: Array, batch: Array, scale: Any, offset: Any, residual: Any, options: Options
) -> tuple[Array, Array]:
    """Return the sums of g and of g * (x - mean); several devices may add theirs.

    Then doffset is the first, and dscale the second times 1 / sqrt(variance + epsilon).
    """
    operands = _normalization(x, batch, scale, offset, residual, options.axis)
    operands["dy"] = block_of(dy, options.axis)
    found = _backward_sums(operands, ("sum_g", "sum_g_x"), options)
    return found["sum_g"][0], found["sum_g_x"][0]


def backward(
    dy: Array,
    x: Array,
    batch: Array,
    scale: Any,
    offset: Any,
    residual: Any,
    weights: Any,
    count: Array,
    sum_g: Array,
    sum_g_x: Array,
    dmean: Array | None,
    dvariance: Array | None,
    options: Options,
) -> tuple[Array, Array | None]:
    """Return dx, and dresidual where there is a residual.

    dmean and dvariance flow into the batch's own mean and biased variance; count is that of all
    devices, and so are the sums. A count of 0 says that mean and variance were given.
    """
    operands = _normalization(x, batch, scale, offset, residual, options.axis)
    operands["dy"] = block_of(dy, options.axis)
    operands |= {"count": count.reshape(1), "sum_g": sum_g[None], "sum_g_x": sum_g_x[None]}
    operands |= _vectors(dmean=dmean, dvariance=dvariance)
    if weights is not None:
        operands["weights"] = positions_of(weights, x, options.axis)
    results = ("dx",) if residual is None else ("dx", "dresidual")
    found = {
        name: unblocked(value, x) for name, value in _backward(operands, results, options).items()
    }
    return found["dx"], found.get("dresidual")
