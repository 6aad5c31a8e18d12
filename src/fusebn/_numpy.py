"""The public functions on NumPy arrays.

Each does three things in order: check the arguments (`_spec`), lay the arrays out as blocks
(`_blocks`), call the core. The docstrings are in ``fusebn/__init__.py``.

What nearly every call of the fused functions brings takes a shorter way: the core recognizes it, in
one call, and does the same (`forward_of_plain`, `gradient_of_plain`).
"""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 a dtype that NumPy knows
import numpy as np
from numpy.typing import NDArray

from fusebn import _core, _spec, memory
from fusebn._blocks import is_dense, layout_of_axes, layout_of_axis
from fusebn._moving import assign_moving_average
from fusebn._quantization import Ops
from fusebn._results import FusedBatchNorm, FusedBatchNormGrad

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

Array = NDArray[Any]


# ---- arguments ----

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

# Element type, in native byte order -> the core's number, and the dtype of its statistics.
_ELEMENTS = {
    np.dtype(name): (code, np.dtype(_spec.stat_type(name)))
    for name, code in _spec.ELEMENT_TYPES.items()
}


def _refuse_nan(new: Array, old: Array, message: str) -> Array:
    if (np.isnan(new) & ~np.isnan(old)).any():
        raise ValueError(message)
    return new


# What the definition of fake quantization needs.
array_ops = Ops(
    where=np.where,
    round=np.round,
    minimum=np.minimum,
    maximum=np.maximum,
    amin=lambda x, axes: np.min(x, axes),
    amax=lambda x, axes: np.max(x, axes),
    isfinite=np.isfinite,
    reshape=np.reshape,
    stop_gradient=lambda x: x,
    cast=lambda x, dtype: np.asarray(x, dtype),
    scalar=lambda value, like: np.asarray(value, like.dtype),
    dtype=lambda x: x.dtype.name,
    rounded=lambda x: x,
    refuse_nan=_refuse_nan,
)


def stat_dtype(x: Array) -> np.dtype[Any]:
    """Return the dtype of the statistics of x."""
    return _ELEMENTS[x.dtype][1]


def _plain(operation: str, argument: str, value: Any) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        fix = "Pass its .data, and weights= with 0 for each position to leave out."
        _spec.fail(TypeError, operation, argument, "be a plain array", "a masked array", fix)
    return np.asarray(value)


def array_of(operation: str, argument: str, value: Any) -> Array:
    """Return a NumPy array or scalar as a plain array of an element type, in native byte order."""
    if type(value) is np.ndarray and value.dtype in _ELEMENTS:
        return value
    if not isinstance(value, np.ndarray | np.generic):
        _spec.unsupported(operation, argument, value)
    array = _plain(operation, argument, value)
    _spec.element_type(operation, argument, array.dtype.name)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def to_numpy(operation: str, argument: str, value: Any) -> Array:
    """Return an array as one of NumPy's, in its own dtype; every adapter has such a function."""
    return array_of(operation, argument, value)


def from_numpy(array: Array, like: Array) -> Array:
    """Return NumPy's array as one of the framework, where `like` is; every adapter has it."""
    return array


def _like_x(operation: str, argument: str, value: Any, x: Array) -> Array:
    array = array_of(operation, argument, value)
    if array.dtype != x.dtype:
        _spec.same_type(operation, argument, array.dtype.name, x.dtype.name)
    if array.shape != x.shape:
        _spec.same_shape(operation, argument, array.shape, x.shape)
    return array


def _parameter(operation: str, argument: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Return a floating parameter of any shape as an array of `dtype`."""
    array = _plain(operation, argument, value)
    _spec.element_type(operation, argument, array.dtype.name)
    return np.asarray(array, dtype=dtype, order="C")


def _vector(
    operation: str,
    argument: str,
    value: Any,
    dtype: np.dtype[Any],
    channels: int,
    shape: tuple[int, ...],
) -> Array | None:
    if value is None:
        return None
    # What nearly every call brings, on the shortest way.
    plain = type(value) is np.ndarray and value.dtype == dtype and value.shape == (channels,)
    if plain and is_dense(value):
        return value  # type: ignore[no-any-return]
    vector = _parameter(operation, argument, value, dtype)
    if vector.shape != (channels,):
        _spec.channel_vector(operation, argument, vector.shape, channels, shape)
    return vector


def _check_variance(operation: str, variance: Any) -> None:
    if (variance < 0).any():
        _spec.fail(ValueError, operation, "variance", "not be negative", f"{variance.min()}")


def _weights(
    operation: str, argument: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Array:
    """Return weights that broadcast to `shape` as an array of that shape, fit for `dtype`."""
    array = _plain(operation, argument, value)
    if array.dtype.kind not in "biu":
        _spec.element_type(operation, argument, array.dtype.name)
    try:
        full = np.broadcast_to(array, shape)
    except ValueError:
        _spec.fail(
            ValueError,
            operation,
            argument,
            f"broadcast to {shape}, one weight for each position that is reduced",
            f"shape {array.shape}",
        )
    smallest, largest = (array.min(), array.max()) if array.size else (0, 0)
    if not (smallest >= 0 and largest <= np.finfo(dtype).max):
        got = f"{smallest}" if smallest < 0 else f"{largest}"
        _spec.fail(ValueError, operation, argument, "be finite and not negative", got)
    return full


def _position_weights(
    operation: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...], axis: int
) -> Array:
    """Return one weight for each position of x; the channel axis may stand there with length 1."""
    array = _plain(operation, "weights", value)
    if array.ndim == len(shape) and array.shape[axis] == 1:
        array = array.squeeze(axis)
    others = shape[:axis] + shape[axis + 1 :]
    return _weights(operation, "weights", array, dtype, others)


def _output(operation: str, out: Any, x: Array, residual: Array | None) -> None:
    """Check that y can be written to `out`."""
    if not isinstance(out, np.ndarray):
        _spec.fail(TypeError, operation, "out", "be a NumPy array", type(out).__name__)
    if out.dtype != x.dtype:
        got = f"dtype {out.dtype}"
        _spec.fail(TypeError, operation, "out", f"have the dtype of x, {x.dtype.name}", got)
    _spec.same_shape(operation, "out", out.shape, x.shape)
    if not out.flags.writeable:
        _spec.fail(ValueError, operation, "out", "be writeable", "a read-only array")
    if out is not x and _overlap(out, x) and not _same_memory(out, x):
        expected = "be x itself or share no memory with it"
        fix = "Pass out=x to work in place, or a fresh array."
        _spec.fail(ValueError, operation, "out", expected, "a view that overlaps it", fix)
    if residual is not None and _overlap(out, residual):
        expected = "share no memory with residual"
        _spec.fail(ValueError, operation, "out", expected, "a view that overlaps it")


def _same_memory(a: Array, b: Array) -> bool:
    """Say whether two arrays of one shape and dtype are the same elements of the same memory."""
    return a.strides == b.strides and a.ctypes.data == b.ctypes.data


def _overlap(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b):  # compares bounds: quick, and true too often
        return False
    try:
        return np.shares_memory(a, b, max_work=1000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


# ---- the fused functions ----

# The short ways: None, and nothing has been done, for whatever is not plain. Python's checks lie in
# so many places that beside large arrays, with all caches cold, they outlast a small kernel.
forward_of_plain = _core.forward_of_arrays
gradient_of_plain = _core.gradient_of_arrays


def _know_numpy() -> bool:
    """Let the core know what it compares arguments with; say whether arrays are as it believes."""
    probe = np.zeros((2, 3), np.float32)
    return _core.know_numpy(
        np.ndarray,
        tuple(_ELEMENTS),
        _spec.DATA_FORMATS,
        tuple(_spec.ACTIVATIONS),
        FusedBatchNorm,
        FusedBatchNormGrad,
        memory.LEAST,
        probe,
        probe.__array_interface__["data"][0],
    )


_know_numpy()


def forward(
    operation: str,
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    epsilon: Any,
    axis: int,
    training: bool,
    factor: float,
    activation: Any,
    residual: Any,
    weights: Any,
    correction: Any,
    out: Any,
    keep_batch: bool,
) -> tuple[FusedBatchNorm, Array | None, float]:
    """Do what :func:`fusebn.fused_batch_norm` and :class:`fusebn.BatchNorm` share.

    Returns the result; where `keep_batch`, the mean and biased variance that normalized x, in
    float64, as one array [2, channels]; and the batch's count, 0 outside training.
    """
    code, stat = _ELEMENTS[x.dtype]
    shape = x.shape
    channels = shape[axis]
    if _spec.statistics_given(operation, training, factor, mean is not None, variance is not None):
        mean = _vector(operation, "mean", mean, stat, channels, shape)
        variance = _vector(operation, "variance", variance, stat, channels, shape)
    else:
        mean = variance = None
    scale = _vector(operation, "scale", scale, stat, channels, shape)
    offset = _vector(operation, "offset", offset, stat, channels, shape)
    epsilon = _spec.non_negative(operation, "epsilon", epsilon)
    correction = _spec.non_negative(operation, "correction", correction)
    activation = _spec.activation(operation, activation)
    layout = layout_of_axis(x, axis)
    if weights is not None:
        weights = layout.positions(_position_weights(operation, weights, stat, shape, axis), stat)
    if residual is not None:
        residual = _like_x(operation, "residual", residual, x)
    if out is not None:
        _output(operation, out, x, residual)

    y = out if out is not None and layout.lies_so(out) else layout.empty_like(x)
    mean_out, variance_out = np.empty(channels, stat), np.empty(channels, stat)
    batch = np.empty((2, channels)) if keep_batch else None
    count = _core.forward(
        code,
        layout.outer,
        layout.channels,
        layout.inner,
        layout.memory(x),
        training,
        mean,
        variance,
        weights,
        scale,
        offset,
        None if residual is None else layout.memory(residual),
        activation,
        epsilon,
        correction,
        factor,
        y,
        mean_out,
        variance_out,
        batch,
    )
    if count < 0:
        _check_variance(operation, variance)
    if out is not None and y is not out:
        out[...] = y
        y = out
    return FusedBatchNorm(y, mean_out, variance_out), batch, count


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
    found: FusedBatchNorm | None = forward_of_plain(
        x, scale, offset, mean, variance, epsilon, data_format, is_training,
        exponential_avg_factor, axis, activation, residual, weights, correction, out, False,
    )  # fmt: skip
    if found is not None:
        return found
    operation = "fused_batch_norm"
    x = array_of(operation, "x", x)
    result, _, _ = forward(
        operation,
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        _spec.channel_axis(operation, x.shape, data_format, axis),
        _spec.flag(operation, "is_training", is_training),
        _spec.fraction(operation, "exponential_avg_factor", exponential_avg_factor),
        activation,
        residual,
        weights,
        correction,
        out,
        keep_batch=False,
    )
    return result


def gradient(
    operation: str,
    dy: Any,
    x: Array,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    epsilon: Any,
    axis: int,
    training: bool,
    activation: Any,
    residual: Any,
    weights: Any,
    dmean: Any,
    dvariance: Any,
) -> FusedBatchNormGrad:
    """Do what :func:`fusebn.fused_batch_norm_grad` and :class:`fusebn.BatchNorm` share."""
    code, stat = _ELEMENTS[x.dtype]
    shape = x.shape
    channels = shape[axis]
    dy = _like_x(operation, "dy", dy, x)
    for name, value in (("mean", mean), ("variance", variance)):
        if value is None:
            expected = "be given: the one that normalized x"
            _spec.fail(ValueError, operation, name, expected, "None")
    mean = _vector(operation, "mean", mean, _FLOAT64, channels, shape)
    variance = _vector(operation, "variance", variance, _FLOAT64, channels, shape)
    _check_variance(operation, variance)
    scale = _vector(operation, "scale", scale, stat, channels, shape)
    offset = _vector(operation, "offset", offset, stat, channels, shape)
    dmean = _vector(operation, "dmean", dmean, stat, channels, shape)
    dvariance = _vector(operation, "dvariance", dvariance, stat, channels, shape)
    if not training and (dmean is not None or dvariance is not None):
        name = "dmean" if dmean is not None else "dvariance"
        expected = "be None with is_training=False, where the statistics do not depend on x"
        _spec.fail(ValueError, operation, name, expected, "an array")
    epsilon = _spec.non_negative(operation, "epsilon", epsilon)
    activation = _spec.activation(operation, activation)
    layout = layout_of_axis(x, axis)
    if weights is not None:
        weights = layout.positions(_position_weights(operation, weights, stat, shape, axis), stat)
    if residual is not None:
        residual = _like_x(operation, "residual", residual, x)

    dx = layout.empty_like(x)
    dresidual = None if residual is None else layout.empty_like(x)
    dscale = None if scale is None else np.empty(channels, stat)
    doffset = None if offset is None else np.empty(channels, stat)
    _core.gradient(
        code,
        layout.outer,
        layout.channels,
        layout.inner,
        layout.memory(dy),
        layout.memory(x),
        training,
        mean,
        variance,
        weights,
        scale,
        offset,
        None if residual is None else layout.memory(residual),
        activation,
        epsilon,
        dmean,
        dvariance,
        0.0,
        1.0,
        dx,
        dresidual,
        dscale,
        doffset,
        None,
        None,
    )
    return FusedBatchNormGrad(dx, dscale, doffset, dresidual)


def gradient_between(
    dy: Any,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    epsilon: float,
    axis: int,
    activation: Any,
    residual: Array | None,
    weights: Any,
    count: float,
    between: Callable[[Array, Array], tuple[Array, Array]],
) -> FusedBatchNormGrad:
    """Return the gradients where the batch's statistics were not those that normalized x.

    They were made into `mean` and `variance`, and `between` goes that way back: given the gradients
    of these two, it returns dmean and dvariance of the batch, in::

        dx = scale * rstd * g + weight / count * (dmean + 2 * (x - mean) * dvariance)

    with the mean that normalized x; all vectors are float64. Everything else has been checked.
    """
    operation = "BatchNorm.backward"
    code, stat = _ELEMENTS[x.dtype]
    shape, channels = x.shape, x.shape[axis]
    dy = _like_x(operation, "dy", dy, x)
    layout = layout_of_axis(x, axis)
    if weights is not None:
        weights = layout.positions(_position_weights(operation, weights, stat, shape, axis), stat)
    shifted = variance + epsilon
    rstd = np.where(shifted == 0, 0, 1 / np.sqrt(np.where(shifted == 0, 1, shifted)))
    arrays = (
        layout.memory(dy),
        layout.memory(x),
        mean,
        rstd,
    )
    block = code, layout.outer, layout.channels, layout.inner
    scale, offset = (
        _vector(operation, name, value, stat, channels, shape)
        for name, value in (("scale", scale), ("offset", offset))
    )
    parameters = (
        scale,
        offset,
        None if residual is None else layout.memory(residual),
        _spec.activation(operation, activation),
    )
    sum_g, sum_g_x = np.empty(channels), np.empty(channels)
    _core.backward_sums(*block, *arrays, *parameters, sum_g, sum_g_x)
    slope = rstd if scale is None else scale * rstd
    dmean, dvariance = between(-slope * sum_g, -slope * rstd**2 / 2 * sum_g_x)
    nothing = np.zeros(channels)
    dx = layout.empty_like(x)
    dresidual = None if residual is None else layout.empty_like(x)
    _core.backward(
        *block,
        *arrays,
        weights,
        *parameters,
        count,
        nothing,
        nothing,
        dmean,
        dvariance,
        dx,
        dresidual,
    )
    return FusedBatchNormGrad(
        dx,
        None if scale is None else (rstd * sum_g_x).astype(stat),
        None if offset is None else sum_g.astype(stat),
        dresidual,
    )


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
    found: FusedBatchNormGrad | None = gradient_of_plain(
        dy, x, scale, offset, mean, variance, epsilon, data_format, is_training, axis,
        activation, residual, weights, dmean, dvariance,
    )  # fmt: skip
    if found is not None:
        return found
    operation = "fused_batch_norm_grad"
    x = array_of(operation, "x", x)
    return gradient(
        operation,
        dy,
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        _spec.channel_axis(operation, x.shape, data_format, axis),
        _spec.flag(operation, "is_training", is_training),
        activation,
        residual,
        weights,
        dmean,
        dvariance,
    )


# ---- statistics ----


def moments_of_blocks(
    operation: str, x: Any, axes: Any, weights: Any = None, weights_name: str = "weights"
) -> tuple[float, Array, Array, tuple[int, ...]]:
    """Return count, mean and m2 in float64, of the kept axes' shape, and the reduced axes."""
    x = array_of(operation, "x", x)
    code, stat = _ELEMENTS[x.dtype]
    reduced = _spec.axes_of(operation, axes, x.shape)
    kept = tuple(axis for axis in range(x.ndim) if axis not in reduced)
    layout = layout_of_axes(x, kept)
    if weights is not None:
        shape = tuple(x.shape[axis] for axis in reduced)
        weights = layout.positions(_weights(operation, weights_name, weights, stat, shape), stat)
    mean, m2 = np.empty(layout.channels), np.empty(layout.channels)
    count = _core.moments(
        code, layout.outer, layout.channels, layout.inner, layout.memory(x), weights, mean, m2
    )
    mean, m2 = layout.channel_array(mean, x.shape), layout.channel_array(m2, x.shape)
    return count, mean, m2, reduced


def _returned(x: Any, reduced: tuple[int, ...], keepdims: bool, *statistics: Array) -> list[Array]:
    """Round statistics to the type that x's dtype calls for, with the reduced axes if kept."""
    stat = np.dtype(_spec.stat_type(x.dtype.name))
    rounded = [np.asarray(value).astype(stat) for value in statistics]
    return [np.expand_dims(value, reduced) for value in rounded] if keepdims else rounded


def moments(
    x: Any, axes: Any, *, weights: Any = None, keepdims: Any = False
) -> tuple[Array, Array]:
    """See :func:`fusebn.moments`."""
    keepdims = _spec.flag("moments", "keepdims", keepdims)
    count, mean, m2, reduced = moments_of_blocks("moments", x, axes, weights)
    if count == 0:
        mean, m2 = mean + math.nan, m2 + math.nan
    mean, variance = _returned(x, reduced, keepdims, mean, m2 / (count or 1))
    return mean, variance


def weighted_moments(
    x: Any, axes: Any, frequency_weights: Any, keepdims: Any = False
) -> tuple[Array, Array]:
    """See :func:`fusebn.weighted_moments`."""
    operation = "weighted_moments"
    x = array_of(operation, "x", x)
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    reduced = _spec.axes_of(operation, axes, x.shape)
    shape = np.shape(frequency_weights)
    full = (1,) * (x.ndim - len(shape)) + shape
    if all(full[axis] == 1 for axis in range(x.ndim) if axis not in reduced):
        kept = tuple(axis for axis in range(x.ndim) if axis not in reduced)
        weights = np.asarray(frequency_weights).reshape(full).squeeze(kept)
        name = "frequency_weights"
        count, mean, m2, _ = moments_of_blocks(operation, x, reduced, weights, name)
        total = np.asarray(count)
    else:
        total, mean, m2 = _moments_of_own_weights(operation, x, reduced, frequency_weights)
    with np.errstate(invalid="ignore"):
        mean = np.where(total > 0, mean, math.nan)
        variance = np.where(total > 0, m2, math.nan) / np.where(total > 0, total, 1)
    mean, variance = _returned(x, reduced, keepdims, mean, variance)
    return mean, variance


def _moments_of_own_weights(
    operation: str, x: Array, reduced: tuple[int, ...], frequency_weights: Any
) -> tuple[Array, Array, Array]:
    """Weights that differ between channels, which the core has no verb for: two passes in NumPy."""
    weights = _weights(operation, "frequency_weights", frequency_weights, _FLOAT64, x.shape)
    wide = np.where(weights > 0, x, 0).astype(np.float64)
    total = weights.sum(reduced, keepdims=True)
    mean = (weights * wide).sum(reduced, keepdims=True) / np.where(total > 0, total, 1)
    m2 = (weights * (wide - mean) ** 2).sum(reduced)
    return total.squeeze(reduced), mean.squeeze(reduced), m2


def sufficient_statistics(
    x: Any, axes: Any, shift: Any = None, keepdims: Any = False
) -> tuple[Array, Array, Array, Array | None]:
    """See :func:`fusebn.sufficient_statistics`."""
    operation = "sufficient_statistics"
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    count, mean, m2, reduced = moments_of_blocks(operation, x, axes)
    if shift is not None:
        kept = tuple(1 if axis in reduced else n for axis, n in enumerate(x.shape))
        wide = _parameter(operation, "shift", shift, _FLOAT64)
        try:
            wide = np.broadcast_to(wide, kept).squeeze(reduced)
        except ValueError:
            expected = f"broadcast to {kept}, one value for each mean"
            _spec.fail(ValueError, operation, "shift", expected, f"shape {wide.shape}")
        mean = mean - wide
        shift = np.asarray(shift)
    total = np.asarray(count, _spec.stat_type(x.dtype.name))
    mean_ss, variance_ss = _returned(x, reduced, keepdims, count * mean, m2 + count * mean * mean)
    return total, mean_ss, variance_ss, shift


def normalize_moments(
    counts: Any, mean_ss: Any, variance_ss: Any, shift: Any
) -> tuple[Array, Array]:
    """See :func:`fusebn.normalize_moments`."""
    operation = "normalize_moments"
    mean_ss = array_of(operation, "mean_ss", mean_ss)
    _, stat = _ELEMENTS[mean_ss.dtype]
    total = np.asarray(counts, np.float64)
    sums = mean_ss.astype(np.float64)
    squares = _parameter(operation, "variance_ss", variance_ss, _FLOAT64)
    _spec.same_shape(operation, "variance_ss", squares.shape, sums.shape, of="mean_ss")
    if not (total >= 0).all():
        _spec.fail(ValueError, operation, "counts", "not be negative", f"{total.min()}")
    total = np.where(total > 0, total, math.nan)
    shifted = sums / total
    variance = np.maximum(squares / total - shifted * shifted, 0)
    if shift is not None:
        shifted = shifted + _parameter(operation, "shift", shift, _FLOAT64)
    return shifted.astype(stat), variance.astype(stat)


# ---- normalization by given statistics ----


def batch_normalization(
    x: Any,
    mean: Any,
    variance: Any,
    offset: Any,
    scale: Any,
    variance_epsilon: Any,
) -> Array:
    """See :func:`fusebn.batch_normalization`."""
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    return _normalize("batch_normalization", "x", x, given, variance_epsilon)


def _normalize(
    operation: str, argument: str, x: Any, given: dict[str, Any], variance_epsilon: Any
) -> Array:
    """Normalize by mean, variance, offset and scale: `given` in that order, by public name."""
    x = array_of(operation, argument, x)
    code, stat = _ELEMENTS[x.dtype]
    epsilon = _spec.non_negative(operation, "variance_epsilon", variance_epsilon)
    parameters = {}
    for name, value in given.items():
        if value is None and name in ("mean", "variance"):
            _spec.fail(TypeError, operation, name, "be an array", "None")
        if value is not None:
            parameters[name] = _parameter(operation, name, value, stat)
    shape = x.shape
    for name, array in parameters.items():
        try:
            shape = np.broadcast_shapes(shape, array.shape)
        except ValueError:
            expected = f"broadcast against {argument} of shape {x.shape}"
            _spec.fail(ValueError, operation, name, expected, f"shape {array.shape}")
    x = np.broadcast_to(x, shape)

    # The channels are the axes along which any parameter varies.
    rank = len(shape)
    full = {name: (1,) * (rank - a.ndim) + a.shape for name, a in parameters.items()}
    channel_axes = tuple(
        axis for axis in range(rank) if any(sizes[axis] > 1 for sizes in full.values())
    )
    layout = layout_of_axes(x, channel_axes)
    channel_shape = tuple(shape[axis] for axis in channel_axes)
    others = tuple(axis for axis in range(rank) if axis not in channel_axes)
    vectors: dict[str, Array | None] = dict.fromkeys(given)
    for name, array in parameters.items():
        own = array.reshape(full[name]).squeeze(others)
        vectors[name] = layout.channel_vector(np.broadcast_to(own, channel_shape), stat)
    mean, variance, offset, scale = vectors.values()
    y = layout.empty_like(x)
    count = _core.forward(
        code,
        layout.outer,
        layout.channels,
        layout.inner,
        layout.memory(x),
        False,
        mean,
        variance,
        None,
        scale,
        offset,
        None,
        _spec.activation(operation, None),
        epsilon,
        0.0,
        1.0,
        y,
        None,
        None,
        None,
    )
    if count < 0:
        _check_variance(operation, variance)
    return y


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
    gamma = gamma if scaled else None
    given = {"mean": mean, "variance": variance, "beta": beta, "gamma": gamma}
    return _normalize(operation, "input", input, given, variance_epsilon)
