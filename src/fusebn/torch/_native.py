"""The ops on devices for which there are no kernels here: PyTorch's own, one after the other.

`torch.batch_norm` normalizes, then the residual is added, then the activation
follows. What PyTorch's kernels cannot do, weights, is refused.
"""

from typing import Any

import torch
from torch import Tensor

from fusebn import _spec
from fusebn.torch import _portable
from fusebn.torch._arguments import stat_type
from fusebn.torch._portable import ACTIVATIONS, Options


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `_ops.batch_norm` does."""
    y = _normalized(x, scale, offset, mean, variance, residual, weights, options)
    if not options.training:
        assert mean is not None
        assert variance is not None
        return y, mean.clone(), variance.clone()
    return y, *_returned(x, mean, variance, options)


def batch_norm_updating(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> Tensor:
    """Do what `_ops.batch_norm_updating` does."""
    y = _normalized(x, scale, offset, mean, variance, residual, weights, options)
    if options.training and mean is not None and variance is not None and x.numel():
        with torch.no_grad():
            for old, new in zip(
                (mean, variance), _returned(x, mean, variance, options), strict=True
            ):
                old.copy_(new)
    return y


def batch_norm_backward(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: Options,
) -> tuple[Tensor | None, ...]:
    """Do what `_ops.batch_norm_backward` does: by the composite."""
    given = dict(zip(_portable.NAMES, tensors, strict=True))
    sources = [name for name in _portable.NAMES[:6] if given[name] is not None]
    found = _portable.gradient(dy, dmean, dvariance, given, options, sources)
    by_name = dict(zip(sources, found, strict=True))
    return tuple(by_name.get(name) for name in _portable.NAMES[:6])


def _normalized(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> Tensor:
    if weights is not None:
        got = f"one on {x.device.type}"
        _spec.fail(
            NotImplementedError, "batch_norm", "weights", "be None but on a CPU", got,
            "Move x to the CPU, or leave the positions out of x.",
        )  # fmt: skip
    if options.training:
        mean = variance = None
    elif mean is not None and variance is not None:
        if mean.requires_grad or variance.requires_grad:  # PyTorch's kernel has no such gradients
            return _portable.batch_norm(x, scale, offset, mean, variance, residual, None, options).y
        mean, variance = mean.to(stat_type(x)), variance.to(stat_type(x))
    front = x.movedim(options.axis, 1) if x.ndim > 1 else x.unsqueeze(0)
    # Not functional.batch_norm, which refuses one value a channel.
    y = torch.batch_norm(
        front, scale, offset, mean, variance, options.training, 0.0, options.epsilon,
        torch.backends.cudnn.enabled,
    )  # fmt: skip
    y = y.movedim(1, options.axis) if x.ndim > 1 else y.squeeze(0)
    return ACTIVATIONS[options.activation](y if residual is None else y + residual)


def _returned(x: Tensor, mean: Any, variance: Any, options: Options) -> tuple[Tensor, Tensor]:
    """Return the statistics of the batch, mixed into the given ones."""
    axes = [axis for axis in range(x.ndim) if axis != options.axis]
    n = x.numel() // max(x.shape[options.axis], 1)
    correction = options.correction if n > options.correction else 0
    wide = x.to(stat_type(x))
    new_variance, new_mean = torch.var_mean(wide, axes, correction=correction)
    if mean is None or options.factor == 1:
        return new_mean, new_variance
    mixed = (torch.lerp(old.to(new.dtype), new, options.factor)
             for old, new in ((mean, new_mean), (variance, new_variance)))  # fmt: skip
    return tuple(mixed)  # type: ignore[return-value]
