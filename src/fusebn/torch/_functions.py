"""The public functions on PyTorch's tensors: fusebn's own names, order and results.

Each checks its arguments (`_arguments`, `_spec`), brings them into the form of the ops, and calls
them (`_ops`). All are differentiable, as often as one likes. The docstrings are in
``fusebn/__init__.py``.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusebn import _moving, _spec
from fusebn._results import FusedBatchNorm, FusedBatchNormGrad
from fusebn.torch import _ops, _portable
from fusebn.torch._arguments import (
    like_x,
    name_of,
    on_device_of,
    parameter,
    position_weights,
    stat_type,
    tensor_of,
    vector,
)
from fusebn.torch._array_ops import array_ops as array_ops  # found by fusebn.quantize
from fusebn.torch._portable import Moments, Options

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
    x = tensor_of(operation, "x", x)
    axis = _spec.channel_axis(operation, tuple(x.shape), data_format, axis)
    training = _spec.flag(operation, "is_training", is_training)
    factor = _spec.fraction(operation, "exponential_avg_factor", exponential_avg_factor)
    given = mean is not None, variance is not None
    if not _spec.statistics_given(operation, training, factor, *given):
        mean = variance = None
    _spec.activation(operation, activation)
    options = Options(
        training,
        axis,
        _spec.non_negative(operation, "epsilon", epsilon),
        _spec.non_negative(operation, "correction", correction),
        factor,
        activation or "identity",
    )
    stat = stat_type(x)
    vectors = {"scale": scale, "offset": offset, "mean": mean, "variance": variance}
    scale, offset, mean, variance = (
        vector(operation, name, of, x, axis, stat) for name, of in vectors.items()
    )
    if weights is not None:
        weights = position_weights(operation, "weights", weights, x, {axis})
    if residual is not None:
        residual = like_x(operation, "residual", residual, x)
    if out is not None:
        like_x(operation, "out", out, x)
    y, mean, variance = _ops.batch_norm(
        x, scale, offset, mean, variance, residual, weights, options
    )
    return FusedBatchNorm(y if out is None else out.copy_(y), mean, variance)


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
    axis = _spec.channel_axis(operation, tuple(x.shape), data_format, axis)
    training = _spec.flag(operation, "is_training", is_training)
    dy = like_x(operation, "dy", dy, x)
    for name, value in (("mean", mean), ("variance", variance)):
        if value is None:
            expected = "be given: the one that normalized x"
            _spec.fail(ValueError, operation, name, expected, "None")
    if not training and (dmean is not None or dvariance is not None):
        name = "dmean" if dmean is not None else "dvariance"
        expected = "be None with is_training=False, where the statistics do not depend on x"
        _spec.fail(ValueError, operation, name, expected, "a tensor")
    stat = stat_type(x)
    mean, variance = (
        vector(operation, name, of, x, axis, torch.float64)
        for name, of in (("mean", mean), ("variance", variance))
    )
    _check_variance(operation, variance)
    vectors = {"scale": scale, "offset": offset, "dmean": dmean, "dvariance": dvariance}
    scale, offset, dmean, dvariance = (
        vector(operation, name, of, x, axis, stat) for name, of in vectors.items()
    )
    _spec.activation(operation, activation)
    options = Options(
        training,
        axis,
        _spec.non_negative(operation, "epsilon", epsilon),
        0.0,
        1.0,
        activation or "identity",
    )
    if weights is not None:
        weights = position_weights(operation, "weights", weights, x, {axis})
    if residual is not None:
        residual = like_x(operation, "residual", residual, x)
    given = (None, None) if training else (mean.to(stat), variance.to(stat))
    dx, dscale, doffset, _, _, dresidual = _ops.batch_norm_backward(
        dy,
        dmean,
        dvariance,
        torch.stack([mean, variance]),
        (x, scale, offset, *given, residual, weights),
        options,
    )
    return FusedBatchNormGrad(
        dx,
        None if scale is None else dscale,
        None if offset is None else doffset,
        None if residual is None else dresidual,
    )


def _check_variance(operation: str, variance: Tensor) -> None:
    """Check the values, where a tensor has any that can be asked for."""
    if _ops.is_plain(variance) and variance.is_cpu and (variance < 0).any():
        got = f"{variance.min().item()}"
        _spec.fail(ValueError, operation, "variance", "not be negative", got)


# ---- statistics: float64 until they are returned ----


def _moments_of(
    operation: str, x: Tensor, axes: Any, weights: Any = None, weights_name: str = "weights"
) -> tuple[Moments, tuple[int, ...]]:
    """Return count, mean and m2, and the reduced axes."""
    reduced = _spec.axes_of(operation, axes, tuple(x.shape))
    if weights is not None:
        kept = set(range(x.ndim)) - {*reduced}
        weights = position_weights(operation, weights_name, weights, x, kept)
    return _ops.moments(x, reduced, weights), reduced


def _mean_and_variance(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and m2 / count, both NaN where count is 0."""
    counted = count > 0
    variance = m2 / torch.where(counted, count, 1)
    return torch.where(counted, mean, math.nan), torch.where(counted, variance, math.nan)


def _returned(
    x: Tensor, reduced: tuple[int, ...], keepdims: bool, *statistics: Tensor
) -> list[Tensor]:
    """Round statistics to the type that x's dtype calls for, with the reduced axes if kept."""
    for axis in reduced if keepdims else ():
        statistics = tuple(value.unsqueeze(axis) for value in statistics)
    return [value.to(stat_type(x)) for value in statistics]


def moments(
    x: Any, axes: Any, *, weights: Any = None, keepdims: Any = False
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.moments`."""
    keepdims = _spec.flag("moments", "keepdims", keepdims)
    x = tensor_of("moments", "x", x)
    found, reduced = _moments_of("moments", x, axes, weights)
    mean, variance = _returned(x, reduced, keepdims, *_mean_and_variance(*found))
    return mean, variance


def weighted_moments(
    x: Any, axes: Any, frequency_weights: Any, keepdims: Any = False
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.weighted_moments`."""
    operation, name = "weighted_moments", "frequency_weights"
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    x = tensor_of(operation, "x", x)
    weights = frequency_weights
    if not isinstance(weights, Tensor):
        weights = parameter(operation, name, weights, x, torch.float64)
    on_device_of(x, operation, name, weights)
    reduced = _spec.axes_of(operation, axes, tuple(x.shape))
    full = (1,) * (x.ndim - weights.ndim) + tuple(weights.shape)
    if not _broadcasts(full, tuple(x.shape)):
        expected = f"broadcast to {tuple(x.shape)}, the shape of x"
        _spec.fail(ValueError, operation, name, expected, f"shape {tuple(weights.shape)}")
    weights = weights.reshape(full)
    if all(full[axis] == 1 for axis in range(x.ndim) if axis not in reduced):
        found, _ = _moments_of(operation, x, reduced, weights, name)
    else:
        found = _moments_of_own_weights(x, reduced, weights)
    mean, variance = _returned(x, reduced, keepdims, *_mean_and_variance(*found))
    return mean, variance


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(
        a in (1, b) for a, b in zip(shape, target, strict=True)
    )


def _moments_of_own_weights(x: Tensor, reduced: tuple[int, ...], weights: Tensor) -> Moments:
    """Weights that differ between channels, which the core has no verb for: two passes."""
    w = weights.to(torch.float64).expand(x.shape)
    wide = torch.where(w > 0, x.to(torch.float64), 0)
    count = _portable.total(w, reduced, keepdim=True)
    mean = _portable.total(w * wide, reduced, keepdim=True) / torch.where(count > 0, count, 1)
    m2 = _portable.total(w * (wide - mean).square(), reduced)
    return Moments(count.squeeze(reduced), mean.squeeze(reduced), m2)


def sufficient_statistics(
    x: Any, axes: Any, shift: Any = None, keepdims: Any = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See :func:`fusebn.sufficient_statistics`."""
    operation = "sufficient_statistics"
    keepdims = _spec.flag(operation, "keepdims", keepdims)
    x = tensor_of(operation, "x", x)
    (count, mean, m2), reduced = _moments_of(operation, x, axes)
    if shift is not None:
        shift = (
            shift if isinstance(shift, Tensor) else parameter(operation, "shift", shift, x, x.dtype)
        )
        on_device_of(x, operation, "shift", shift)
        kept = tuple(1 if axis in reduced else n for axis, n in enumerate(x.shape))
        full = (1,) * (x.ndim - shift.ndim) + tuple(shift.shape)
        if not _broadcasts(full, kept):
            expected = f"broadcast to {kept}, one value for each mean"
            _spec.fail(ValueError, operation, "shift", expected, f"shape {tuple(shift.shape)}")
        mean = mean - shift.to(torch.float64).reshape(full).squeeze(reduced)
    sums = _returned(x, reduced, keepdims, count * mean, m2 + count * mean.square())
    return count.to(stat_type(x)), *sums, shift


def normalize_moments(
    counts: Any, mean_ss: Any, variance_ss: Any, shift: Any
) -> tuple[Tensor, Tensor]:
    """See :func:`fusebn.normalize_moments`."""
    operation, wide = "normalize_moments", torch.float64
    mean_ss = tensor_of(operation, "mean_ss", mean_ss)
    variance_ss = tensor_of(operation, "variance_ss", variance_ss)
    on_device_of(mean_ss, operation, "variance_ss", variance_ss)
    shapes = tuple(variance_ss.shape), tuple(mean_ss.shape)
    _spec.same_shape(operation, "variance_ss", *shapes, of="mean_ss")
    counts = torch.as_tensor(counts, dtype=wide, device=mean_ss.device)
    if _ops.is_plain(counts) and counts.is_cpu and not (counts >= 0).all():
        _spec.fail(ValueError, operation, "counts", "not be negative", f"{counts.min().item()}")
    total = torch.where(counts > 0, counts, math.nan)
    shifted = mean_ss.to(wide) / total
    variance = variance_ss.to(wide) / total - shifted.square()
    # Not clamp, which has another derivative at 0; a NaN stays.
    variance = torch.where(variance < 0, 0, variance)
    if shift is not None:
        shifted = shifted + parameter(operation, "shift", shift, mean_ss, wide)
    return shifted.to(stat_type(mean_ss)), variance.to(stat_type(mean_ss))


# ---- normalization by given statistics ----


def batch_normalization(
    x: Any, mean: Any, variance: Any, offset: Any, scale: Any, variance_epsilon: Any
) -> Tensor:
    """See :func:`fusebn.batch_normalization`."""
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    return _normalize("batch_normalization", "x", x, given, variance_epsilon)


def _normalize(
    operation: str, argument: str, x: Any, given: dict[str, Any], variance_epsilon: Any
) -> Tensor:
    """Normalize by mean, variance, offset and scale: `given` in that order, by public name."""
    x = tensor_of(operation, argument, x)
    epsilon = _spec.non_negative(operation, "variance_epsilon", variance_epsilon)
    parameters: dict[str, Any] = {}
    shape = x.shape
    for name, value in given.items():
        if value is None and name in ("mean", "variance"):
            _spec.fail(TypeError, operation, name, "be a tensor", "None")
        if value is not None:
            value = parameter(operation, name, value, x, stat_type(x))
            shape = _broadcast(operation, argument, name, value, x, shape)
        parameters[name] = value
    mean, variance, offset, scale = parameters.values()
    axis = _only_axis(x, shape, [v for v in parameters.values() if v is not None])
    if axis is None:
        wide: Any = [None if v is None else v.to(torch.float64) for v in parameters.values()]
        _check_variance(operation, wide[1])
        mean, variance, offset, scale = wide
        return _portable.normalize(x, mean, variance, scale, offset, epsilon).to(x.dtype)
    scale, offset, mean, variance = (
        None if v is None else v.reshape(-1).expand(x.shape[axis])
        for v in (scale, offset, mean, variance)
    )
    options = Options(False, axis, epsilon, 0.0, 1.0, "identity")
    return _ops.batch_norm(x, scale, offset, mean, variance, None, None, options)[0]


def _broadcast(
    operation: str, argument: str, name: str, value: Tensor, x: Tensor, shape: Any
) -> Any:
    try:
        return torch.broadcast_shapes(shape, value.shape)
    except RuntimeError:
        expected = f"broadcast against {argument} of shape {tuple(x.shape)}"
        _spec.fail(ValueError, operation, name, expected, f"shape {tuple(value.shape)}")


def _only_axis(x: Tensor, shape: torch.Size, parameters: list[Tensor]) -> int | None:
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
    return _normalize(operation, "input", input, given, variance_epsilon)


# ---- moving averages ----


def assign_moving_average(variable: Any, value: Any, decay: Any, zero_debias: Any = False) -> Any:
    """See :func:`fusebn.assign_moving_average`."""
    operation = "assign_moving_average"
    variable = tensor_of(operation, "variable", variable)
    new = value if isinstance(value, Tensor) else torch.as_tensor(value, device=variable.device)
    if new.is_floating_point() or new.is_complex() or new.dtype is torch.bool:
        _spec.element_type(operation, "value", name_of(new.dtype))
    shapes = tuple(new.shape), tuple(variable.shape)
    _spec.same_shape(operation, "value", *shapes, of="variable")
    decay = _spec.fraction(operation, "decay", decay, "It is the weight of the old value.")
    factor = _moving.factor(decay, 1)
    if _spec.flag(operation, "zero_debias", zero_debias):
        factor = _moving.factor(decay, _count_update(operation, variable, decay), zero_debias=True)
    with torch.no_grad():
        wide = variable.to(torch.float64)
        mixed = (1 - factor) * wide + factor * new.detach().to(torch.float64)
        variable.copy_(mixed)
    return variable


def _count_update(operation: str, variable: Tensor, decay: float) -> int:
    if decay == 1:
        _spec.fail(ValueError, operation, "decay", "be below 1 with zero_debias", "1.0")
    if variable._is_view():
        # A view made anew for each call would be a new object each time, and count as fresh.
        expected = "own its memory with zero_debias, which counts the updates of a tensor"
        _spec.fail(ValueError, operation, "variable", expected, "a view", "Pass the tensor itself.")
    return _moving.count_update(variable)


# ---- to NumPy and back ----


def to_numpy(operation: str, argument: str, value: Any) -> NDArray[Any]:
    """Return a tensor's values as a NumPy array of its dtype."""
    tensor = tensor_of(operation, argument, value).detach().cpu()
    if tensor.dtype is torch.bfloat16:  # which NumPy itself does not know
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: NDArray[Any], like: Tensor) -> Tensor:
    """Return a NumPy array's values as a tensor of the dtype of `like`, which is its own."""
    bits = array.view(np.int16) if like.dtype is torch.bfloat16 else array
    return torch.from_numpy(bits).view(like.dtype).to(like.device)
