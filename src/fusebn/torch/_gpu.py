"""The ops on tensors of a CUDA device, by the kernels in ``fusebn.triton``, where that is wanted.

It is wanted by FUSEBN_TRITON=1 in the environment: the kernels are right in Triton's interpreter
and compile to what they should, but no GPU has run them yet.

Nothing here waits for the device or reads a value back, so a CUDA graph can record it. All room is
allocated in the call that fills it, on the stream it is filled on: calls on several streams or
devices share nothing, and an aborted one leaves nothing behind.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fusebn import _spec
from fusebn.torch import _kernels
from fusebn.torch._arguments import stat_type
from fusebn.torch._portable import Options

# Read once: compilers take it for the constant that it is.
WANTED = os.environ.get("FUSEBN_TRITON") == "1"

# Triton's own limit: https://github.com/triton-lang/triton#compatibility
_CAPABILITY = (8, 0)

# ---- where ----


def serves(x: Tensor) -> bool:
    """Say whether the kernels are to take x."""
    return x.is_cuda and WANTED


def _kernels_for(x: Tensor) -> Any:
    """Return the kernels, or say why x cannot have them."""
    _check(x.device)
    from fusebn import triton

    return triton


@cache
def _check(device: torch.device) -> None:
    if find_spec("triton") is None:
        _spec.missing("FUSEBN_TRITON=1", "triton")
    if device.type != "cuda":  # Triton's interpreter
        return
    expected = "be on an NVIDIA GPU of compute capability 8.0 or higher with FUSEBN_TRITON=1"
    fix = "Without FUSEBN_TRITON=1 PyTorch's own kernels serve."
    if torch.version.hip is not None:
        _spec.fail(ValueError, "batch_norm", "x", expected, "one on an AMD GPU", fix)
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        got = f"one of {capability[0]}.{capability[1]}, {device}"
        _spec.fail(ValueError, "batch_norm", "x", expected, got, fix)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launch where x is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- the ops ----


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
    o = Options(**options)
    returned = room_for_statistics(x, o.axis)
    y, batch, count = forward(x, scale, offset, mean, variance, residual, weights, o, returned)
    return y, *returned, batch, count


def room_for_statistics(x: Tensor, axis: int) -> list[Tensor]:
    """Return room for what is returned of a batch.

    It is not that of what is running: a launch that fails leaves no average half updated.
    """
    return [x.new_empty([x.shape[axis]], dtype=stat_type(x)) for _ in range(2)]


def forward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    o: Options,
    returned: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and the statistics that normalized x and their count; fill what is returned."""
    kernels = _kernels_for(x)
    y = torch.empty_like(x)
    with _device_of(x):
        found = kernels.forward(
            _kernels.beside(y, x),
            kernels.Block(*_kernels.block(y, o.axis)),
            kernels.Normalization(*_normalization(y, scale, offset, residual, weights, o)),
            None if mean is None or variance is None else (mean, variance),
            kernels.Returned(*_in_line(mean, variance), *returned, o.correction, o.factor),
            y,
        )
    return y, found.batch, found.count


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
    kernels, o = _kernels_for(x), Options(**options)
    dx = torch.empty_like(x)
    vectors = _kernels.gradients_like(x, scale, offset, mean, variance)
    dscale, doffset, *dgiven = (vector if vector.numel() else None for vector in vectors)
    dresidual = x.new_empty([0]) if residual is None else torch.empty_like(dx)
    of = kernels.Normalization(*_normalization(dx, scale, offset, residual, weights, o))
    if of.weights is None:
        count = batch.new_full((), dx.numel() // max(x.shape[o.axis], 1))
    else:
        count = of.weights.sum(dtype=torch.float64)
    with _device_of(x):
        kernels.gradient(
            _kernels.beside(dx, dy),
            _kernels.beside(dx, x),
            kernels.Block(*_kernels.block(dx, o.axis)),
            of,
            kernels.Statistics(count, batch),
            kernels.Flowing(*_in_line(dmean, dvariance), o.correction, o.factor),
            dx,
            None if residual is None else dresidual,
            dscale,
            doffset,
            tuple(dgiven) if all(vector is not None for vector in dgiven) else None,
        )
    return dx, *vectors, dresidual


# ---- what a batch in parts is made of, as in `_verbs` ----


def moments(x: Tensor, axis: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and m2 of each index of the axis, in float64."""
    kernels = _kernels_for(x)
    y = x if _kernels.is_dense(x) else x.contiguous()
    if weights is not None:
        weights = _kernels.positions("batch_norm", y, weights, axis)
    with _device_of(x):
        count, batch = kernels.moments(y, kernels.Block(*_kernels.block(y, axis)), weights)
    counted = count > 0
    return count, torch.where(counted, batch[0], 0), torch.where(counted, batch[1] * count, 0)


def normalize(
    x: Tensor,
    batch: Tensor,
    count: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor:
    """Return y, by the mean and variance of a batch that may be larger than x."""
    kernels = _kernels_for(x)
    y = torch.empty_like(x)
    with _device_of(x):
        kernels.normalize(
            _kernels.beside(y, x),
            y,
            kernels.Block(*_kernels.block(y, options.axis)),
            kernels.Statistics(count, batch),
            kernels.Normalization(*_normalization(y, scale, offset, residual, None, options)),
        )
    return y


def gradient(
    dy: Tensor,
    x: Tensor,
    batch: Tensor,
    count: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    needed: Sequence[bool],
    join: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Do what `_verbs.gradient` does; the batch is x where there is nothing to join."""
    kernels = _kernels_for(x)
    dx = torch.empty_like(x)
    dscale, doffset = (
        torch.empty_like(vector) if wanted and vector is not None else None
        for vector, wanted in zip((scale, offset), needed[1:3], strict=True)
    )
    dresidual = torch.empty_like(dx) if needed[3] else None
    with _device_of(x):
        kernels.gradient(
            _kernels.beside(dx, dy),
            _kernels.beside(dx, x),
            kernels.Block(*_kernels.block(dx, options.axis)),
            kernels.Normalization(*_normalization(dx, scale, offset, residual, weights, options)),
            kernels.Statistics(count, batch),
            kernels.Flowing(None, None, 0.0, 1.0),
            dx,
            dresidual,
            dscale,
            doffset,
            None,
            join,
        )
    return dx, dscale, doffset, dresidual


# ---- what the kernels are told ----


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
    return *_in_line(scale, offset), residual, weights, o.activation, o.epsilon, o.training


def _in_line(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if vector is None else vector.contiguous() for vector in vectors]
