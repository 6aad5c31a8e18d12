"""The public functions on TensorFlow's tensors: fusebn's own names, order and results.

Each checks what is known of its arguments (`_spec`), brings them into the form of the op, and calls
it (`_ops`). What is unknown while a graph is built, the op checks when it runs. `nn` gives the same
functions TensorFlow's names, order and results. The docstrings are in ``fusebn/__init__.py``.
"""

import math
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fusebn import _spec
from fusebn._results import FusedBatchNorm, FusedBatchNormGrad
from fusebn.tensorflow import _ops, _portable, moving_averages
from fusebn.tensorflow._array_ops import array_ops as array_ops
from fusebn.tensorflow._autograph import unconverted

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

Tensor = Any
Shape = tuple[int | None, ...]  # None: unknown while the graph is built

# ---- arguments ----


def tensor_of(operation: str, argument: str, value: Any) -> Tensor:
    """Return a tensor of an element type."""
    tensor = _converted(operation, argument, value)
    _spec.element_type(operation, argument, tensor.dtype.name)
    return tensor


def _converted(operation: str, argument: str, value: Any) -> Tensor:
    if isinstance(value, tf.Tensor):
        return value
    try:
        return tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        _spec.fail(TypeError, operation, argument, "be a tensor", type(value).__name__)


def shape_of(tensor: Tensor) -> Shape | None:
    """Return a tensor's static shape, None if not even its rank is known."""
    shape = tensor.shape
    return None if shape.rank is None else tuple(shape.as_list())


def stat_type(x: Tensor) -> Any:
    """Return the dtype of the statistics of x."""
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def _known_rank(operation: str, argument: str) -> NoReturn:
    fix = "Use tf.ensure_shape."
    _spec.fail(ValueError, operation, argument, "have a known rank", "an unknown one", fix)


def _broadcast(one: Shape | None, other: Shape | None) -> bool:
    """Whether two shapes broadcast, as far as they are known."""
    if one is None or other is None:
        return True
    pairs = zip(reversed(one), reversed(other), strict=False)
    return all(a == b or a in (1, None) or b in (1, None) for a, b in pairs)


def _broadcasts_to(shape: Shape, target: Shape) -> bool:
    """Whether a shape broadcasts to another, as far as they are known."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, None, b) or b is None for a, b in pairs)


def _same_shape(operation: str, argument: str, got: Shape | None, expected: Shape | None) -> None:
    """Check what is known of two shapes."""
    if got is None or expected is None:
        return
    if len(got) == len(expected):
        got, expected = (
            tuple(b if a is None else a for a, b in zip(mine, other, strict=True))
            for mine, other in ((got, expected), (expected, got))
        )
    _spec.same_shape(operation, argument, got, expected)  # type: ignore[arg-type]


def _like_x(operation: str, argument: str, value: Any, x: Tensor) -> Tensor:
    tensor = tensor_of(operation, argument, value)
    _spec.same_type(operation, argument, tensor.dtype.name, x.dtype.name)
    _same_shape(operation, argument, shape_of(tensor), shape_of(x))
    return tensor


def _parameter(operation: str, argument: str, value: Any, dtype: Any) -> Tensor:
    """Return a floating parameter of any shape as a tensor of `dtype`."""
    if isinstance(value, float | int | list | tuple):
        # Python's numbers have the type they are used in; by way of float32 they would lose digits.
        value = np.asarray(value, dtype.as_numpy_dtype)
    tensor = tensor_of(operation, argument, value)
    return tensor if tensor.dtype == dtype else tf.cast(tensor, dtype)


def _vector(
    operation: str, argument: str, value: Any, dtype: Any, channels: int | None, shape: Shape | None
) -> Tensor | None:
    if value is None:
        return None
    vector = _parameter(operation, argument, value, dtype)
    got = shape_of(vector)
    if got is not None:
        known = channels if channels is not None else got[0] if got else None
        if len(got) != 1 or (got[0] is not None and got[0] != known):
            _spec.channel_vector(operation, argument, got, known, shape or ())  # type: ignore[arg-type]
    return vector


def _flag(operation: str, argument: str, value: Any) -> Any:
    """Return a switch: a bool if its value is known, else a boolean scalar."""
    if value is True or value is False:
        return value
    if not tf.is_tensor(value):
        return _spec.flag(operation, argument, value)
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype != tf.bool or tensor.shape.rank not in (0, None):
        got = f"{tensor.dtype.name} of shape {tensor.shape}"
        _spec.fail(TypeError, operation, argument, "be a bool, or a boolean scalar", got)
    return tensor


def channel_axis(operation: str, x: Tensor, data_format: Any, axis: Any) -> tuple[Tensor, int]:
    """Return x, with the rank it must have, and its channel axis."""
    shape = shape_of(x)
    if shape is not None:
        return x, _spec.channel_axis(operation, shape, data_format, axis)  # type: ignore[arg-type]
    if axis is not None:
        return x, _spec.integer(operation, "axis", axis)
    rank = _spec.DATA_FORMATS[data_format][0] if data_format in _spec.DATA_FORMATS else 0
    axis = _spec.channel_axis(operation, (0,) * rank, data_format)
    return tf.ensure_shape(x, [None] * rank), axis


def _weights(operation: str, argument: str, value: Any, x: Tensor, kept: set[int]) -> Tensor:
    """Return weights that broadcast to the reduced positions, in the rank of x, 1 where kept."""
    weights = _converted(operation, argument, value)
    if not (weights.dtype.is_integer or weights.dtype.is_bool):
        _spec.element_type(operation, argument, weights.dtype.name)
    weights = tf.cast(weights, stat_type(x))
    shape, got = shape_of(x), shape_of(weights)
    if shape is None or got is None:
        _known_rank(operation, "x" if shape is None else argument)
    rank = len(shape)
    target = tuple(1 if i in kept else n for i, n in enumerate(shape))
    if len(got) < rank or any(got[i] not in (1, None) for i in kept):
        # Of the shape of the reduced axes alone: put the kept ones in.
        reduced = [n for i, n in enumerate(shape) if i not in kept]
        mine = [1] * (len(reduced) - len(got)) + list(got)
        if not _broadcasts_to(got, tuple(reduced)):
            expected = (
                f"broadcast to {tuple(reduced)}, one weight for each position that is reduced"
            )
            _spec.fail(ValueError, operation, argument, expected, f"shape {got}")
        dynamic = tf.concat([[1] * (len(mine) - len(got)), tf.shape(weights)], 0)
        full = tf.unstack(dynamic) if None in mine else mine
        following = iter(full)
        weights = tf.reshape(weights, [1 if i in kept else next(following) for i in range(rank)])
    if None in target or shape_of(weights) != target:
        dynamic = [tf.shape(x)[i] if n is None else n for i, n in enumerate(target)]
        weights = tf.broadcast_to(weights, dynamic)
    return weights


# ---- the fused functions ----


def forward(
    operation: str,
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    epsilon: Any,
    data_format: Any,
    is_training: Any,
    factor: Any,
    axis: Any,
    activation: Any,
    residual: Any,
    weights: Any,
    correction: Any,
    name: str | None = None,
) -> _portable.BatchNorm:
    """Do what `fused_batch_norm` and the layers share: check the arguments, call the op."""
    x = tensor_of(operation, "x", x)
    x, axis = channel_axis(operation, x, data_format, axis)
    shape, stat = shape_of(x), stat_type(x)
    channels = None if shape is None else shape[axis]
    is_training = _flag(operation, "is_training", is_training)
    factor = _spec.fraction(operation, "exponential_avg_factor", factor)
    has_mean, has_variance = mean is not None, variance is not None
    training = is_training if isinstance(is_training, bool) else None
    if not _spec.statistics_given(operation, training, factor, has_mean, has_variance):
        mean = variance = None
    epsilon = _spec.non_negative(operation, "epsilon", epsilon)
    correction = _spec.non_negative(operation, "correction", correction)
    _spec.activation(operation, activation)
    mean, variance, scale, offset = (
        _vector(operation, argument, value, stat, channels, shape)
        for argument, value in (
            ("mean", mean),
            ("variance", variance),
            ("scale", scale),
            ("offset", offset),
        )
    )
    if weights is not None:
        weights = _weights(operation, "weights", weights, x, {axis})
    if residual is not None:
        residual = _like_x(operation, "residual", residual, x)
    return _ops.batch_norm(
        x,
        scale,
        offset,
        mean,
        variance,
        is_training=is_training,
        axis=axis,
        epsilon=epsilon,
        correction=correction,
        factor=factor,
        activation=activation or "identity",
        residual=residual,
        weights=weights,
        name=name,
    )


@unconverted
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
    if out is not None:
        expected = "be None: a tensor cannot be written to"
        _spec.fail(TypeError, operation, "out", expected, type(out).__name__)
    result = forward(
        operation,
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        exponential_avg_factor,
        axis,
        activation,
        residual,
        weights,
        correction,
    )
    return FusedBatchNorm(*result[:3])


@unconverted
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
    x = tensor_of(operation, "x", x)
    x, axis = channel_axis(operation, x, data_format, axis)
    shape, stat = shape_of(x), stat_type(x)
    channels = None if shape is None else shape[axis]
    is_training = _flag(operation, "is_training", is_training)
    dy = _like_x(operation, "dy", dy, x)
    for name, value in (("mean", mean), ("variance", variance)):
        if value is None:
            expected = "be given: the one that normalized x"
            _spec.fail(ValueError, operation, name, expected, "None")
    if is_training is False and (dmean is not None or dvariance is not None):
        name = "dmean" if dmean is not None else "dvariance"
        expected = "be None with is_training=False, where the statistics do not depend on x"
        _spec.fail(ValueError, operation, name, expected, "a tensor")
    mean = _vector(operation, "mean", mean, tf.float64, channels, shape)
    variance = _vector(operation, "variance", variance, tf.float64, channels, shape)
    scale, offset, dmean, dvariance = (
        _vector(operation, argument, value, stat, channels, shape)
        for argument, value in (
            ("scale", scale),
            ("offset", offset),
            ("dmean", dmean),
            ("dvariance", dvariance),
        )
    )
    none = tf.zeros_like(mean, stat)
    if weights is not None:
        weights = _weights(operation, "weights", weights, x, {axis})
    if residual is not None:
        residual = _like_x(operation, "residual", residual, x)
    _spec.activation(operation, activation)
    gradients = _ops.batch_norm_gradient(
        dy,
        x,
        tf.stack([mean, variance]),
        none if dmean is None else dmean,
        none if dvariance is None else dvariance,
        is_training=is_training,
        scale=scale,
        offset=offset,
        residual=residual,
        weights=weights,
        axis=axis,
        epsilon=_spec.non_negative(operation, "epsilon", epsilon),
        correction=0.0,
        factor=1.0,
        activation=activation or "identity",
    )
    return FusedBatchNormGrad(*gradients)


# ---- statistics: float64 until they are returned ----


def moments_of(
    operation: str, x: Tensor, axes: Any, weights: Any = None, weights_name: str = "weights"
) -> tuple[_portable.Moments, tuple[int, ...]]:
    """Return count (a float where it is known), mean and m2, and the reduced axes."""
    shape = shape_of(x)
    if shape is None:
        _known_rank(operation, "x")
    reduced = _spec.axes_of(operation, _static(operation, axes), shape)  # type: ignore[arg-type]
    if weights is not None:
        weights = _weights(operation, weights_name, weights, x, set(range(len(shape))) - {*reduced})
    found = _ops.moments(x, reduced, weights)
    positions = [n for axis in reduced if (n := shape[axis]) is not None]
    if weights is None and len(positions) == len(reduced) and 0 not in positions:
        found = found._replace(count=float(math.prod(positions)))  # nothing to ask at run time
    return found, reduced


def _static(operation: str, axes: Any) -> Any:
    """Return axes that came as a tensor."""
    if not tf.is_tensor(axes):
        return axes
    value = tf.get_static_value(axes)
    if value is None:
        expected = "be known while the graph is built"
        _spec.fail(ValueError, operation, "axes", expected, "a tensor that is computed")
    return value


def _mean_and_variance(
    count: Tensor, mean: Tensor, m2: Tensor, undefined: float = math.nan
) -> tuple[Tensor, Tensor]:
    """Return mean and m2 / count, both `undefined` where count is 0."""
    if isinstance(count, float):
        return mean, m2 / count
    counted = count > 0
    variance = m2 / tf.where(counted, count, tf.ones_like(count))
    none = tf.constant(undefined, tf.float64)
    return tf.where(counted, mean, none), tf.where(counted, variance, none)


def _returned(
    x: Tensor, reduced: tuple[int, ...], keepdims: bool, *statistics: Tensor
) -> list[Tensor]:
    """Round statistics to the type that x's dtype calls for, with the reduced axes if kept."""
    for axis in reduced if keepdims else ():
        statistics = tuple(tf.expand_dims(value, axis) for value in statistics)
    return [tf.cast(value, stat_type(x)) for value in statistics]


@unconverted
def moments(
    x: Any, axes: Any, *, weights: Any = None, keepdims: Any = False
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.moments`."""
    keepdims = _spec.flag("moments", "keepdims", keepdims)
    x = tensor_of("moments", "x", x)
    found, reduced = moments_of("moments", x, axes, weights)
    mean, variance = _returned(x, reduced, keepdims, *_mean_and_variance(*found))
    return mean, variance


@unconverted
def weighted_moments(
    x: Any, axes: Any, frequency_weights: Any, keepdims: Any = False
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.weighted_moments`."""
    x = tensor_of("weighted_moments", "x", x)
    return weighted_mean_and_variance(x, axes, frequency_weights, keepdims, undefined=math.nan)


def weighted_mean_and_variance(
    x: Tensor, axes: Any, frequency_weights: Any, keepdims: Any, *, undefined: float
) -> tuple[Tensor, Tensor]:
    """Return what `weighted_moments` does, and `undefined` where all weights are 0."""
    operation = "weighted_moments"
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    found, reduced = _weighted_moments_of(operation, x, axes, frequency_weights)
    mean, variance = _returned(x, reduced, keepdims, *_mean_and_variance(*found, undefined))
    return mean, variance


def _weighted_moments_of(
    operation: str, x: Tensor, axes: Any, frequency_weights: Any
) -> tuple[_portable.Moments, tuple[int, ...]]:
    """Return count, mean and m2, and the reduced axes, for weights that broadcast against x."""
    name = "frequency_weights"
    weights = _converted(operation, name, frequency_weights)
    shape, mine = shape_of(x), shape_of(weights)
    if shape is None or mine is None:
        return moments_of(operation, x, axes, weights, name)  # says what is missing
    reduced = _spec.axes_of(operation, _static(operation, axes), shape)  # type: ignore[arg-type]
    full = (1,) * (len(shape) - len(mine)) + mine
    if not _broadcasts_to(mine, shape):
        expected = f"broadcast to {shape}, the shape of x"
        _spec.fail(ValueError, operation, name, expected, f"shape {mine}")
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    if all(full[axis] == 1 for axis in kept):
        squeezed = tf.reshape(weights, tf.gather(_full_shape(weights, len(shape)), reduced))
        return moments_of(operation, x, reduced, squeezed, name)
    # Weights that differ between channels, which the op cannot take: each position a batch.
    w = tf.cast(tf.broadcast_to(weights, tf.shape(x)), tf.float64)
    wide = tf.where(w > 0, tf.cast(x, tf.float64), tf.zeros_like(w))
    count = tf.reduce_sum(w, reduced, keepdims=True)
    n = tf.where(count > 0, count, tf.ones_like(count))
    mean = tf.reduce_sum(w * wide, reduced, keepdims=True) / n
    m2 = tf.reduce_sum(w * tf.square(wide - mean), reduced)
    return _portable.Moments(tf.squeeze(count, reduced), tf.squeeze(mean, reduced), m2), reduced


def _full_shape(tensor: Tensor, rank: int) -> Tensor:
    return tf.concat([tf.ones([rank - tensor.shape.rank], tf.int32), tf.shape(tensor)], 0)


@unconverted
def sufficient_statistics(
    x: Any, axes: Any, shift: Any = None, keepdims: Any = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See :func:`fusebn.sufficient_statistics`."""
    operation = "sufficient_statistics"
    x = tensor_of(operation, "x", x)
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    (count, mean, m2), reduced = moments_of(operation, x, axes)
    if shift is not None:
        shift = tensor_of(operation, "shift", shift)
        kept = tuple(1 if i in reduced else n for i, n in enumerate(shape_of(x) or ()))
        mine = shape_of(shift)
        if mine is None:
            _known_rank(operation, "shift")
        if not _broadcasts_to(mine, kept):
            expected = f"broadcast to {kept}, one value for each mean"
            _spec.fail(ValueError, operation, "shift", expected, f"shape {mine}")
        wide = tf.reshape(tf.cast(shift, tf.float64), _full_shape(shift, len(kept)))
        mean = mean - tf.squeeze(wide, reduced)
    sums = _returned(x, reduced, keepdims, count * mean, m2 + count * tf.square(mean))
    if isinstance(count, float):
        count = tf.constant(count, tf.float64)
    return tf.cast(count, stat_type(x)), *sums, shift


@unconverted
def normalize_moments(
    counts: Any, mean_ss: Any, variance_ss: Any, shift: Any
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.normalize_moments`."""
    operation = "normalize_moments"
    mean_ss = tensor_of(operation, "mean_ss", mean_ss)
    variance_ss = tensor_of(operation, "variance_ss", variance_ss)
    _same_shape_of_sums(operation, variance_ss, mean_ss)
    wide = counts if tf.is_tensor(counts) else np.asarray(counts, np.float64)
    counts = tf.cast(_converted(operation, "counts", wide), tf.float64)
    known = tf.get_static_value(counts)
    if known is not None and not (known >= 0).all():
        _spec.fail(ValueError, operation, "counts", "not be negative", f"{known.min()}")
    total = tf.where(counts > 0, counts, tf.constant(math.nan, tf.float64))
    shifted = tf.cast(mean_ss, tf.float64) / total
    variance = tf.cast(variance_ss, tf.float64) / total - tf.square(shifted)
    # Not tf.maximum, which may drop a NaN.
    variance = tf.where(variance < 0, tf.zeros_like(variance), variance)
    if shift is not None:
        shifted += _parameter(operation, "shift", shift, tf.float64)
    stat = stat_type(mean_ss)
    return tf.cast(shifted, stat), tf.cast(variance, stat)


def _same_shape_of_sums(operation: str, variance_ss: Tensor, mean_ss: Tensor) -> None:
    got, expected = shape_of(variance_ss), shape_of(mean_ss)
    if not variance_ss.shape.is_compatible_with(mean_ss.shape):
        _spec.same_shape(operation, "variance_ss", got, expected, of="mean_ss")  # type: ignore[arg-type]


# ---- normalization by given statistics ----


@unconverted
def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: Any
) -> Tensor:
    """See :func:`fusebn.batch_normalization`."""
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    return normalize("batch_normalization", "x", x, given, variance_epsilon)


def normalize(
    operation: str, argument: str, x: Any, given: dict[str, Any], variance_epsilon: Any
) -> Tensor:
    """Normalize by mean, variance, offset and scale: `given` in that order, by public name."""
    x = tensor_of(operation, argument, x)
    stat = stat_type(x)
    parameters: dict[str, Tensor | None] = {}
    for name, value in given.items():
        if value is None and name in ("mean", "variance"):
            _spec.fail(TypeError, operation, name, "be a tensor", "None")
        parameters[name] = None if value is None else _parameter(operation, name, value, stat)
    mean, variance, offset, scale = parameters.values()
    shapes = [tensor.shape for tensor in parameters.values() if tensor is not None]
    for name, tensor in parameters.items():
        if tensor is not None and not _broadcast(shape_of(x), shape_of(tensor)):
            expected = f"broadcast against {argument} of shape {shape_of(x)}"
            _spec.fail(ValueError, operation, name, expected, f"shape {shape_of(tensor)}")
    epsilon = tf.get_static_value(variance_epsilon) if tf.is_tensor(variance_epsilon) else None
    if epsilon is None and tf.is_tensor(variance_epsilon):
        variance, epsilon = variance + tf.cast(variance_epsilon, stat), 0.0
    else:
        value = variance_epsilon if epsilon is None else epsilon
        epsilon = _spec.non_negative(operation, "variance_epsilon", value)

    axis = _only_axis(x.shape, shapes)
    if axis is None:
        wide = [None if v is None else tf.cast(v, tf.float64) for v in parameters.values()]
        mean, variance, offset, scale = wide
        y = _portable.normalize(x, mean, variance, scale, offset, epsilon)
        return tf.cast(y, x.dtype)
    vectors = [
        None if v is None else _as_vector(v, x.shape[axis]) for v in (scale, offset, mean, variance)
    ]
    return _ops.batch_norm(x, *vectors, is_training=False, axis=axis, epsilon=epsilon).y


def _as_vector(parameter: Tensor, channels: int) -> Tensor:
    if parameter.shape.rank != 1:
        parameter = tf.reshape(parameter, [-1])
    return parameter if parameter.shape[0] == channels else tf.broadcast_to(parameter, [channels])


def _only_axis(x: Any, shapes: list[Any]) -> int | None:
    """Return the one axis of x along which parameters of these shapes vary, if there is one.

    There must be no doubt, and x must have its full length there.
    """
    rank = x.rank
    if rank is None or any(shape.rank is None or shape.rank > rank for shape in shapes):
        return None
    varies = {
        axis + rank - shape.rank
        for shape in shapes
        for axis, length in enumerate(shape)
        if length != 1
    }
    if len(varies) != 1:
        return None
    (axis,) = varies
    lengths = [shape[axis - rank] for shape in shapes if shape.rank >= rank - axis]
    sure = x[axis] is not None and all(length in (1, x[axis]) for length in lengths)
    return axis if sure else None


@unconverted
def batch_norm_with_global_normalization(
    input: Any,
    mean: Any,
    variance: Any,
    beta: Any,
    gamma: Any,
    variance_epsilon: Any,
    scale_after_normalization: Any,
) -> Tensor:
    """See :func:`fusebn.batch_norm_with_global_normalization`."""
    operation = "batch_norm_with_global_normalization"
    scaled = _spec.flag(operation, "scale_after_normalization", scale_after_normalization)
    given = {"mean": mean, "variance": variance, "beta": beta, "gamma": gamma if scaled else None}
    return normalize(operation, "input", input, given, variance_epsilon)


# ---- moving averages ----


@unconverted
def assign_moving_average(
    variable: Any, value: Any, decay: Any, zero_debias: Any = False
) -> Tensor:
    """See :func:`fusebn.assign_moving_average`."""
    return moving_averages.assign_moving_average(variable, value, decay, zero_debias)


# ---- to NumPy and back ----


def to_numpy(operation: str, argument: str, value: Any) -> NDArray[Any]:
    """Return the values of a tensor or variable as a NumPy array."""
    tensor = tensor_of(operation, argument, value)
    if not hasattr(tensor, "numpy"):
        fix = "In a graph, run it in a session first and pass what comes back."
        _spec.fail(TypeError, operation, argument, "have a value", "a symbolic tensor", fix)
    return np.asarray(tensor.numpy())


def from_numpy(array: NDArray[Any], like: Tensor) -> Tensor:
    """Return a NumPy array as a tensor, on the device of `like`."""
    with tf.device(like.device):
        return tf.constant(array)
