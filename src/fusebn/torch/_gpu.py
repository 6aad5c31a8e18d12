"""The ops on tensors of a CUDA device, by the kernels in ``fusebn.triton``, where that is wanted.

It is wanted by FUSEBN_TRITON=1 in the environment: the kernels are right in Triton's interpreter
and compile to what they should, but no GPU has run them yet.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fusebn.torch import _kernels
from fusebn.torch._arguments import stat_type
from fusebn.torch._portable import Options


@cache
def _is_wanted() -> bool:
    return os.environ.get("FUSEBN_TRITON") == "1" and find_spec("triton") is not None


def serves(x: Tensor) -> bool:
    """Say whether the kernels take x."""
    return x.is_cuda and _is_wanted()


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Do what ``fusebn::batch_norm`` does. A negative variance gives NaN: nothing waits to see."""
    from fusebn import triton  # which needs a package that few have

    o = Options(**options)
    y = torch.empty_like(x)
    stat = stat_type(x)
    returned = [x.new_empty([x.shape[o.axis]], dtype=stat) for _ in range(2)]
    with _device_of(x):
        found = triton.forward(
            _kernels.beside(y, x),
            triton.Block(*_kernels.block(y, o.axis)),
            triton.Normalization(*_normalization(y, scale, offset, residual, weights, o)),
            None if mean is None or variance is None else (mean, variance),
            triton.Returned(mean, variance, returned[0], returned[1], o.correction, o.factor),
            y,
        )
    return y, *returned, found.batch, found.count


def batch_norm_backward(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Do what ``fusebn::batch_norm_backward`` does."""
    from fusebn import triton

    o = Options(**options)
    dx = torch.empty_like(x)
    stat = stat_type(x)
    vectors = [
        x.new_empty([0] if of is None else of.shape, dtype=stat)
        for of in (scale, offset, mean, variance)
    ]
    dscale, doffset, *dgiven = (vector if vector.numel() else None for vector in vectors)
    dresidual = None if residual is None else torch.empty_like(dx)
    of = triton.Normalization(*_normalization(dx, scale, offset, residual, weights, o))
    if of.weights is None:
        count = batch.new_full((), dx.numel() // max(x.shape[o.axis], 1))
    else:
        count = of.weights.sum(dtype=torch.float64)
    with _device_of(x):
        triton.gradient(
            _kernels.beside(dx, dy),
            _kernels.beside(dx, x),
            triton.Block(*_kernels.block(dx, o.axis)),
            of,
            triton.Statistics(count, batch),
            triton.Flowing(dmean, dvariance, o.correction, o.factor),
            dx,
            dresidual,
            dscale,
            doffset,
            None if dgiven[0] is None or dgiven[1] is None else (dgiven[0], dgiven[1]),
        )
    return dx, *vectors, x.new_empty([0]) if dresidual is None else dresidual


def moments(x: Tensor, axis: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and m2 of each index of the axis, in float64."""
    from fusebn import triton

    y = x if _kernels.is_dense(x) else x.contiguous()
    if weights is not None:
        weights = _kernels.positions("batch_norm", y, weights, axis)
    with _device_of(x):
        count, batch = triton.moments(y, triton.Block(*_kernels.block(y, axis)), weights)
    counted = count > 0
    return count, torch.where(counted, batch[0], 0), torch.where(counted, batch[1] * count, 0)


def _normalization(
    y: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    o: Options,
) -> tuple[Any, ...]:
    """Return what normalizes and what surrounds it, laid out as y is."""
    if residual is not None:
        residual = _kernels.beside(y, residual)
    if weights is not None:
        weights = _kernels.positions("batch_norm", y, weights, o.axis)
    vectors = (None if vector is None else vector.contiguous() for vector in (scale, offset))
    return *vectors, residual, weights, o.activation, o.epsilon, o.training


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch where x is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
