"""The ops again, made of PyTorch's own: for derivatives of higher order, and those of the weights.

The arguments and results of `_ops`, by the textbook in two passes, differentiable as often as one
likes. What keeps it safe:

- moments: distances from the mean are summed, never ``E[x^2] - E[x]^2``. The mean is a sum of two
  floats, ``high + low``, where low is the mean of ``x - high``: float32 data of 1e6 +- 1 is centred
  as exactly as it can carry, and the variance cannot be negative.
- normalize: the mean is taken from x before anything else.
- every division and square root is guarded before it is taken, so that no derivative of a branch
  that is not chosen becomes NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The arguments of a batch norm that are no tensors."""

    training: bool
    axis: int  # counted from the front
    epsilon: float
    correction: float
    factor: float
    activation: str  # "identity" for none


class Moments(NamedTuple):
    """Statistics over some axes, all in float64."""

    count: Tensor  # type: ignore[assignment]  # sum of the weights
    mean: Tensor
    m2: Tensor  # sum of weight * (x - mean)^2


class BatchNorm(NamedTuple):
    """What `batch_norm` returns, here and in `_ops`."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    batch: Tensor  # the mean and biased variance that normalized x, in float64: [2, channels]
    count: Tensor  # type: ignore[assignment]  # of the weights, in float64; 0 outside training


class Gradient(NamedTuple):
    """The gradients of `batch_norm` with respect to its tensors; empty where a tensor is None."""

    dx: Tensor
    dscale: Tensor
    doffset: Tensor
    dmean: Tensor
    dvariance: Tensor
    dresidual: Tensor


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "leaky_relu": torch.nn.functional.leaky_relu,  # of slope 0.01
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def total(x: Tensor, axes: list[int] | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Return the sum over axes; over none of them it is x, where PyTorch would take all."""
    return x.sum(axes, keepdim=keepdim) if axes else x


def moments(x: Tensor, axes: list[int], weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and m2 over `axes`, in float64; weights broadcast, and are 1 if None."""
    x = _wide(x)
    if weights is None:
        w = x.new_ones(())
        count = x.new_full((), math.prod([x.shape[axis] for axis in axes]), dtype=torch.float64)
    else:
        # One for each position: all of them count.
        weights = weights.expand([n if i in axes else 1 for i, n in enumerate(x.shape)])
        w = weights.to(x.dtype)
        count = weights.double().sum()
        x = torch.where(w > 0, x, 0)
    n = torch.where(count > 0, count, 1).to(x.dtype)

    def mean_of(values: Tensor) -> Tensor:
        return total(w * values, axes, keepdim=True) / n

    high = mean_of(x)
    low = mean_of(x - high)
    m2 = total(w * (x - high - low).square(), axes).double()
    mean = (high.double() + low.double()).squeeze(tuple(axes))
    return count, torch.where(mean.isfinite(), mean, math.nan), m2


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Return (x - mean) * scale * rstd + offset, wide; all but x are float64 and broadcast."""
    x = _wide(x)
    shifted = variance + epsilon
    none = (shifted == 0) | shifted.isinf()
    slope = torch.where(none, 0, torch.where(none, 1, shifted).rsqrt())
    high = mean.to(x.dtype)
    low = (mean - high.double()).to(x.dtype)
    z = torch.where(none, 0, x - high - low)
    z = z * (slope if scale is None else slope * scale.double()).to(x.dtype)
    return z if offset is None else z + offset.to(x.dtype)


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> BatchNorm:
    """Do what `_ops.batch_norm` does."""
    axis, correction, factor = options.axis, options.correction, options.factor
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = None
    if mean is not None and variance is not None:
        given = torch.stack([mean.double(), variance.double()])
    if options.training:
        count, batch_mean, m2 = moments(x, [i for i in range(x.ndim) if i != axis], weights)
        counted = count > 0
        n = torch.where(counted, count, 1)
        unbiased = torch.where(count > correction, count - correction, n)
        batch = torch.where(counted, torch.stack([batch_mean, m2 / n]), math.nan)
        returned = torch.where(counted, torch.stack([batch_mean, m2 / unbiased]), math.nan)
        if given is not None and factor != 1:
            returned = torch.where(counted, (1 - factor) * given + factor * returned, given)
        # A batch of count 0 is normalized as if its variance were infinite: x is forgotten.
        used = torch.stack(
            [torch.where(counted, batch[0], 0), torch.where(counted, batch[1], math.inf)]
        )
    else:
        assert given is not None
        count = given.new_zeros(())
        used = batch = returned = given

    def spread(vector: Tensor | None) -> Tensor | None:
        shape = [1] * x.ndim
        shape[axis] = -1
        return None if vector is None else vector.reshape(shape)

    m, v = used.reshape([2, *(-1 if i == axis else 1 for i in range(x.ndim))]).unbind()
    z = normalize(x, m, v, spread(scale), spread(offset), options.epsilon)
    if residual is not None:
        z = z + _wide(residual)
    y = ACTIVATIONS[options.activation](z).to(x.dtype)
    mean, variance = returned.to(stat).unbind()
    return BatchNorm(y, mean, variance, batch, count)


Tensors = dict[str, Tensor | None]  # by these names
NAMES = ("x", "scale", "offset", "mean", "variance", "residual", "weights")


def gradient(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    tensors: Tensors,
    options: Options,
    sources: list[str],
) -> tuple[Tensor, ...]:
    """Return the gradients of the composite with respect to the tensors named in `sources`."""

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        result = batch_norm(
            **{**tensors, **dict(zip(sources, values, strict=True))},  # type: ignore[arg-type]
            options=options,
        )
        return result[:3]

    found, back = torch.func.vjp(  # type: ignore[misc]
        outputs, *(tensors[name] for name in sources)
    )
    cotangents = tuple(
        torch.zeros_like(value) if given is None else given
        for value, given in zip(found, (dy, dmean, dvariance), strict=True)
    )
    gradients: tuple[Tensor, ...] = back(cotangents)
    return gradients
