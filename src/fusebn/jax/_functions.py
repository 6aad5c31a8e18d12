"""The public functions on JAX's arrays: fusebn's own names, order and results.

Each checks its arguments (`_arguments`, `_spec`) and calls one compiled function, which is inlined
where a program is being traced. All are differentiable, as often as one likes. The docstrings are
in ``fusebn/__init__.py``.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from fusebn import _spec
from fusebn._results import FusedBatchNorm, FusedBatchNormGrad
from fusebn.jax import _ops, _portable
from fusebn.jax._arguments import (
    array_of,
    like_x,
    parameter,
    position_weights,
    training_flag,
    vector,
)
from fusebn.jax._array_ops import array_ops  # noqa: F401  # for fusebn.quantize
from fusebn.jax._portable import Options, stat_type

__all__ = [
    "assign_moving_average",
    "batch_norm_with_global_normalization",
    "batch_normalization",
    "fused_batch_norm",
    "fused_batch_norm_grad",
    "moments",
    "normalize_moments",
    "sufficient_statistics",
    "weighted_moments",
]

Array = Any

# ---- the fused functions ----


def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: Any = 0.001,
    data_format: Any = "NHWC",
    is_training: Any = True,
    exponential_avg_factor: Any = 1.0,
    *,
    axis: Any = None,
    activation: Any = None,
    residual: Any = None,
    weights: Any = None,
    correction: Any = 1,
    out: Any = None,
) -> FusedBatchNorm:
    """See :func:`fusebn.fused_batch_norm`."""
    operation = "fused_batch_norm"
    x = array_of(operation, "x", x)
    axis = _spec.channel_axis(operation, x.shape, data_format, axis)
    if out is not None:
        expected = "be None: JAX's arrays cannot be written to"
        _spec.fail(TypeError, operation, "out", expected, type(out).__name__)
    arguments = canonical(
        operation, x, scale, offset, mean, variance, residual, weights, is_training, axis,
        epsilon, correction, exponential_avg_factor, activation,
    )  # fmt: skip
    found = _ops.batch_norm(*arguments)
    return FusedBatchNorm(found.y, found.mean, found.variance)


def canonical(
    operation: str,
    x: Array,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    residual: Any,
    weights: Any,
    is_training: Any,
    axis: int,
    epsilon: Any,
    correction: Any,
    factor: Any,
    activation: Any,
) -> tuple[Any, ...]:
    """Return the arguments of `_ops.batch_norm`, all checked."""
    training = training_flag(operation, "is_training", is_training)
    factor = _spec.fraction(operation, "exponential_avg_factor", factor)
    known = training if isinstance(training, bool) else None
    given = mean is not None, variance is not None
    if not _spec.statistics_given(operation, known, factor, *given):
        mean = variance = None
    _spec.activation(operation, activation)
    options = Options(
        axis,
        _spec.non_negative(operation, "epsilon", epsilon),
        _spec.non_negative(operation, "correction", correction),
        factor,
        activation or "identity",
    )
    vectors = {"scale": scale, "offset": offset, "mean": mean, "variance": variance}
    found = [vector(operation, name, of, x, axis) for name, of in vectors.items()]
    if residual is not None:
        residual = like_x(operation, "residual", residual, x)
    if weights is not None:
        weights = position_weights(operation, "weights", weights, x, {axis})
    return (x, *found, residual, weights, training, options)


def fused_batch_norm_grad(
    dy: Any,
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    epsilon: Any = 0.001,
    data_format: Any = "NHWC",
    is_training: Any = True,
    *,
    axis: Any = None,
    activation: Any = None,
    residual: Any = None,
    weights: Any = None,
    dmean: Any = None,
    dvariance: Any = None,
) -> FusedBatchNormGrad:
    """See :func:`fusebn.fused_batch_norm_grad`."""
    operation = "fused_batch_norm_grad"
    x = array_of(operation, "x", x)
    axis = _spec.channel_axis(operation, x.shape, data_format, axis)
    training = training_flag(operation, "is_training", is_training)
    dy = like_x(operation, "dy", dy, x)
    for name, value in (("mean", mean), ("variance", variance)):
        if value is None:
            expected = "be given: the one that normalized x"
            _spec.fail(ValueError, operation, name, expected, "None")
    if training is False and (dmean is not None or dvariance is not None):
        name = "dmean" if dmean is not None else "dvariance"
        expected = "be None with is_training=False, where the statistics do not depend on x"
        _spec.fail(ValueError, operation, name, expected, "an array")
    vectors = {
        "scale": scale,
        "offset": offset,
        "mean": mean,
        "variance": variance,
        "dmean": dmean,
        "dvariance": dvariance,
    }
    scale, offset, mean, variance, dmean, dvariance = (
        vector(operation, name, of, x, axis) for name, of in vectors.items()
    )
    _spec.activation(operation, activation)
    epsilon = _spec.non_negative(operation, "epsilon", epsilon)
    options = Options(axis, epsilon, 0.0, 1.0, activation or "identity")
    if weights is not None:
        weights = position_weights(operation, "weights", weights, x, {axis})
    if residual is not None:
        residual = like_x(operation, "residual", residual, x)
    gradients = _ops.batch_norm_gradient(
        dy, x, scale, offset, mean, variance, residual, weights, dmean, dvariance, training, options
    )
    return FusedBatchNormGrad(*gradients)


# ---- statistics ----


def _statistics_arguments(
    operation: str, x: Any, axes: Any, weights: Any, keepdims: Any
) -> tuple[Array, tuple[int, ...], Array | None, bool]:
    x = array_of(operation, "x", x)
    reduced = _spec.axes_of(operation, axes, x.shape)
    if weights is not None:
        weights = position_weights(operation, "weights", weights, x, {*range(x.ndim)} - {*reduced})
    return x, reduced, weights, _spec.flag(operation, "keepdims", keepdims)


def _returned(reduced: tuple[int, ...], keepdims: bool, *statistics: Array) -> list[Array]:
    """Put the reduced axes back, if they are kept."""
    return [jnp.expand_dims(value, reduced) if keepdims else value for value in statistics]


def moments(
    x: Any, axes: Any, *, weights: Any = None, keepdims: Any = False
) -> tuple[Array, Array]:
    """See :func:`fusebn.moments`."""
    x, reduced, weights, keepdims = _statistics_arguments("moments", x, axes, weights, keepdims)
    mean, variance = _moments(x, weights, reduced=reduced, keepdims=keepdims)
    return mean, variance


@partial(jax.jit, static_argnames=("reduced", "keepdims"), inline=True)
def _moments(
    x: Array, weights: Array | None, *, reduced: tuple[int, ...], keepdims: bool
) -> list[Array]:
    count, mean, _, variance = _ops.moments_over(x, weights, reduced)
    mean, variance = (jnp.where(count > 0, value, math.nan) for value in (mean, variance))
    return _returned(reduced, keepdims, mean, variance)


def weighted_moments(
    x: Any, axes: Any, frequency_weights: Any, keepdims: Any = False
) -> tuple[Array, Array]:
    """See :func:`fusebn.weighted_moments`."""
    operation, name = "weighted_moments", "frequency_weights"
    x, reduced, _, keepdims = _statistics_arguments(operation, x, axes, None, keepdims)
    weights = parameter(operation, name, frequency_weights, x)
    full = (1,) * (x.ndim - weights.ndim) + weights.shape
    if not _broadcasts(full, x.shape):
        expected = f"broadcast to {x.shape}, the shape of x"
        _spec.fail(ValueError, operation, name, expected, f"shape {weights.shape}")
    shared = all(full[axis] == 1 for axis in range(x.ndim) if axis not in reduced)
    compute = _moments if shared else _moments_of_own_weights
    mean, variance = compute(x, weights.reshape(full), reduced=reduced, keepdims=keepdims)
    return mean, variance


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(
        a in (1, b) for a, b in zip(shape, target, strict=True)
    )


@partial(jax.jit, static_argnames=("reduced", "keepdims"), inline=True)
def _moments_of_own_weights(
    x: Array, weights: Array, *, reduced: tuple[int, ...], keepdims: bool
) -> list[Array]:
    """Weights that differ between channels, which the core has no verb for: two passes."""
    x, w = x.astype(weights.dtype), jnp.broadcast_to(weights, x.shape)
    # Of what has weight 0 a NaN or an infinity tells nothing, not even how more weight would do.
    told = (w > 0) | jnp.isfinite(x)
    x, w = jnp.where(told, x, 0), jnp.where(told, w, 0)
    count = jnp.sum(w, reduced, keepdims=True)
    n = jnp.where(count > 0, count, math.nan)
    high = jnp.sum(w * x, reduced, keepdims=True) / n
    low = jnp.sum(w * (x - high), reduced, keepdims=True) / n
    squared = jnp.square(x - high - low)
    squared = jnp.where((w > 0) | jnp.isfinite(squared), squared, 0)
    variance = jnp.sum(w * squared, reduced, keepdims=True) / n
    mean, variance = (jnp.squeeze(value, reduced) for value in (high + low, variance))
    return _returned(reduced, keepdims, mean, variance)


def sufficient_statistics(
    x: Any, axes: Any, shift: Any = None, keepdims: Any = False
) -> tuple[Array, Array, Array, Array | None]:
    """See :func:`fusebn.sufficient_statistics`."""
    operation = "sufficient_statistics"
    x, reduced, _, keepdims = _statistics_arguments(operation, x, axes, None, keepdims)
    full = None
    if shift is not None:
        shift = array_of(operation, "shift", shift)
        kept = tuple(1 if axis in reduced else n for axis, n in enumerate(x.shape))
        full = (1,) * (x.ndim - shift.ndim) + shift.shape
        if not _broadcasts(full, kept):
            expected = f"broadcast to {kept}, one value for each mean"
            _spec.fail(ValueError, operation, "shift", expected, f"shape {shift.shape}")
    count, mean_ss, variance_ss = _sufficient_statistics(
        x,
        None if full is None else shift.reshape(full),
        reduced=reduced,
        keepdims=keepdims,
    )
    return count, mean_ss, variance_ss, shift


@partial(jax.jit, static_argnames=("reduced", "keepdims"), inline=True)
def _sufficient_statistics(
    x: Array, shift: Array | None, *, reduced: tuple[int, ...], keepdims: bool
) -> list[Array]:
    count, high, low, variance = _ops.moments_over(x, None, reduced)
    if shift is not None:
        high = high - jnp.squeeze(shift.astype(high.dtype), reduced)
    mean = high + low
    sums = count * mean, count * (variance + jnp.square(mean))
    return [count, *_returned(reduced, keepdims, *sums)]


def normalize_moments(
    counts: Any, mean_ss: Any, variance_ss: Any, shift: Any
) -> tuple[Array, Array]:
    """See :func:`fusebn.normalize_moments`."""
    operation = "normalize_moments"
    mean_ss = array_of(operation, "mean_ss", mean_ss)
    variance_ss = array_of(operation, "variance_ss", variance_ss)
    _spec.same_shape(operation, "variance_ss", variance_ss.shape, mean_ss.shape, of="mean_ss")
    counts = jnp.asarray(counts)
    if shift is not None:
        shift = parameter(operation, "shift", shift, mean_ss)
    mean, variance = _normalize_moments(counts, mean_ss, variance_ss, shift)
    return mean, variance


@partial(jax.jit, inline=True)
def _normalize_moments(
    counts: Array, mean_ss: Array, variance_ss: Array, shift: Array | None
) -> tuple[Array, Array]:
    stat = stat_type(mean_ss)
    counts = counts.astype(stat)
    counts = jnp.where(counts > 0, counts, math.nan)
    mean = mean_ss.astype(stat) / counts
    variance = variance_ss.astype(stat) / counts - jnp.square(mean)
    # Not maximum, which has another derivative at 0; a NaN stays.
    variance = jnp.where(variance < 0, 0, variance)
    return mean if shift is None else mean + shift, variance


# ---- normalization by given statistics ----


def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: Any
) -> Array:
    """See :func:`fusebn.batch_normalization`."""
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    return _normalize("batch_normalization", "x", x, given, variance_epsilon)


def batch_norm_with_global_normalization(
    input: Any,
    mean: Any,
    variance: Any,
    beta: Any,
    gamma: Any,
    variance_epsilon: Any,
    scale_after_normalization: Any,
) -> Array:
    """See :func:`fusebn.batch_norm_with_global_normalization`."""
    operation = "batch_norm_with_global_normalization"
    scaled = _spec.flag(operation, "scale_after_normalization", scale_after_normalization)
    given = {"mean": mean, "variance": variance, "beta": beta, "gamma": gamma if scaled else None}
    return _normalize(operation, "input", input, given, variance_epsilon)


def _normalize(
    operation: str, argument: str, x: Any, given: dict[str, Any], variance_epsilon: Any
) -> Array:
    """Normalize by mean, variance, offset and scale: `given` in that order, by public name."""
    x = array_of(operation, argument, x)
    epsilon = _spec.non_negative(operation, "variance_epsilon", variance_epsilon)
    parameters: dict[str, Any] = {}
    shape = x.shape
    for name, value in given.items():
        if value is None and name in ("mean", "variance"):
            _spec.fail(TypeError, operation, name, "be an array", "None")
        if value is not None:
            value = parameter(operation, name, value, x)
            shape = _broadcast(operation, argument, name, value, x, shape)
        parameters[name] = value
    mean, variance, offset, scale = parameters.values()
    axis = _only_axis(x, shape, [v for v in parameters.values() if v is not None])
    if axis is None:
        return _normalize_any(x, mean, variance, offset, scale, epsilon=epsilon)
    scale, offset, mean, variance = (
        None if v is None else jnp.broadcast_to(v.reshape(-1), x.shape[axis : axis + 1])
        for v in (scale, offset, mean, variance)
    )
    options = Options(axis, epsilon, 0.0)
    return _ops.batch_norm(x, scale, offset, mean, variance, None, None, False, options).y


@partial(jax.jit, static_argnames="epsilon", inline=True)
def _normalize_any(
    x: Array, mean: Array, variance: Array, offset: Any, scale: Any, *, epsilon: float
) -> Array:
    """Normalize by parameters of any shapes that broadcast."""
    rstd = _portable.rstd_of(variance, epsilon)
    y = (x.astype(mean.dtype) - mean) * (rstd if scale is None else rstd * scale)
    return (y if offset is None else y + offset).astype(x.dtype)


def _broadcast(
    operation: str, argument: str, name: str, value: Array, x: Array, shape: tuple[int, ...]
) -> tuple[int, ...]:
    try:
        return jnp.broadcast_shapes(shape, value.shape)
    except ValueError:
        expected = f"broadcast against {argument} of shape {x.shape}"
        _spec.fail(ValueError, operation, name, expected, f"shape {value.shape}")


def _only_axis(x: Array, shape: tuple[int, ...], parameters: list[Array]) -> int | None:
    """Return the one axis of x along which the parameters vary, if there is one.

    Where all have length 1 there are as many as one likes, and it is the last.
    """
    rank = x.ndim
    if shape != x.shape or rank == 0:
        return None
    varies = {
        axis + rank - value.ndim
        for value in parameters
        for axis, length in enumerate(value.shape)
        if length != 1
    }
    return None if len(varies) > 1 else (varies or {rank - 1}).pop()


# ---- moving averages ----


def assign_moving_average(variable: Any, value: Any, decay: Any, zero_debias: Any = False) -> Array:
    """See :func:`fusebn.assign_moving_average`; here the new value is returned.

    JAX's arrays are values. Nothing counts the updates of one, so `zero_debias` is refused.
    """
    operation = "assign_moving_average"
    variable = array_of(operation, "variable", variable)
    new = value if isinstance(value, jax.Array) else jnp.asarray(value)
    if new.dtype.kind not in "iu":
        _spec.element_type(operation, "value", new.dtype.name)
    _spec.same_shape(operation, "value", new.shape, variable.shape, of="variable")
    if not isinstance(decay, jax.core.Tracer):
        decay = _spec.fraction(operation, "decay", decay, "It is the weight of the old value.")
    if _spec.flag(operation, "zero_debias", zero_debias):
        expected = "be False for JAX's arrays, which are values: nothing counts their updates"
        fix = "Divide the average after update t by 1 - decay**t."
        _spec.fail(ValueError, operation, "zero_debias", expected, "True", fix)
    return _mix(variable, new, decay)


@partial(jax.jit, inline=True)
def _mix(variable: Array, value: Array, decay: Any) -> Array:
    stat = stat_type(variable)
    mixed = decay * variable.astype(stat) + (1 - decay) * value.astype(stat)
    return mixed.astype(variable.dtype)


# ---- to NumPy and back ----


def to_numpy(operation: str, argument: str, value: Any) -> NDArray[Any]:
    """Return an array as one of NumPy's."""
    return np.asarray(array_of(operation, argument, value))


def from_numpy(array: NDArray[Any], like: Array) -> Array:
    """Return NumPy's array as one of JAX's: where `like` is, or of another shape, among them."""
    shards_fit = len(like.devices()) == 1 or array.shape == like.shape
    with jax.enable_x64(array.dtype == np.float64):
        return jax.device_put(array, like.sharding if shards_fit and like.committed else None)
