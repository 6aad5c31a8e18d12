"""Batch normalization of tensors: by the way that is shortest for those who watch.

- A plain tensor of the CPU, in eager mode, takes `FusedBatchNorm`, which spares PyTorch's
  dispatcher.
- What compilers, exporters and ``torch.func`` are to see goes through the ops of `_library`.
- On a CUDA device the kernels are those of `_gpu`, where that is wanted, by the same two ways.
- On other devices it is PyTorch's own kernels, in `_native`.

Every tensor that arrives here has been checked: parameters and statistics have one value a channel
and the type of the statistics (the running ones may be of another), weights have the rank of x and
length 1 for the channels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from fusebn.torch import _gpu, _kernels, _library, _native, _portable
from fusebn.torch._arguments import stat_type
from fusebn.torch._portable import Moments, Options


class FusedBatchNorm(torch.autograd.Function):
    """Gives y, which has been computed, its gradients: what profilers and ``grad_fn`` show.

    Few arguments, each of which costs a quarter of a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Tensor, Any, Options],
    ) -> Tensor:
        """Return y."""
        ctx.save_for_backward(x, scale, offset, residual)
        y, *ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Return the gradients: by the op where they are to be differentiated again."""
        x, scale, offset, residual = ctx.saved_tensors
        batch, options = ctx.rest
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or not is_plain(dy) or is_legacy_batchedtensor(dy):
            return _differentiable(dy, x, scale, offset, residual, batch, options, needed)
        # Without an activation the residual's gradient is dy.
        masked = options.activation != "identity"
        if not isinstance(batch, np.ndarray):
            wanted = *needed[:3], needed[3] and masked
            statistics, count = batch
            dx, dscale, doffset, dresidual = _gpu.gradient(
                dy, x, statistics, count, scale, offset, residual, None, options, wanted
            )
            return dx, dscale, doffset, dresidual if masked or not needed[3] else dy, None
        dscale = torch.empty_like(scale) if needed[1] else None
        doffset = torch.empty_like(offset) if needed[2] else None
        dresidual = None
        if needed[3]:
            dresidual = _kernels.empty_like(x) if masked else dy
        dx = _kernels.gradient(
            dy, None, None, x, scale, offset, residual, None, batch, options,
            None if dresidual is dy else dresidual, dscale, doffset,
        )  # fmt: skip
        return dx, dscale, doffset, dresidual, None


def _differentiable(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    batch: Any,
    options: Options,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    statistics = torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch[0]
    mean, variance = (None, None) if options.training else statistics.to(stat_type(x))
    inputs = [x, scale, offset, mean, variance, residual, None]
    wanted = (*needed[:3], False, False, needed[3], False)
    # What was given is not read again, and has been overwritten since.
    options = options._replace(factor=1.0)
    found = _library.gradients(dy, None, None, statistics, inputs, options, wanted)
    dx, dscale, doffset, _, _, dresidual, _ = found
    return dx, dscale, doffset, dresidual, None


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Any) -> bool:
    """Say whether x is a tensor, and nobody but autograd watches what is done with it."""
    return type(x) in _PLAIN and not (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def short_way(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor | None:
    """Do what `batch_norm_updating` does for a plain x, or return None: this is not the way.

    It takes what nearly every call brings, and checks that it is this: so nothing else need have
    been checked.
    """
    if not (x.is_cpu and x.layout is torch.strided):
        return None
    if mean is not None and (mean.requires_grad or getattr(variance, "requires_grad", False)):
        return None
    y = _kernels.empty_like(x)
    graded = torch.is_grad_enabled()
    # An array, not a tensor: it is made in a sixth of the time.
    batch = np.empty((2, x.shape[options.axis])) if graded else None
    if not _kernels.forward_of_plain(x, y, mean, variance, scale, offset, residual, options, batch):
        return None
    # The same as FusedBatchNorm.apply, but for what that does for torch.func: two microseconds.
    return _apply(x, scale, offset, residual, (y, batch, options)) if graded else y


_apply = super(torch.autograd.Function, FusedBatchNorm).apply


# ---- for everyone ----


def _has_kernels(x: Tensor) -> bool:
    return x.is_cpu or _gpu.serves(x)


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
    """Return y, mean and variance, all differentiable."""
    tensors = (x, scale, offset, mean, variance, residual, weights)
    if not _has_kernels(x):
        return _native.batch_norm(*tensors, options)
    y, mean, variance, *_ = _library.batch_norm(*tensors, **options._asdict())
    return y, mean, variance


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
    """Return y, and in training write the returned statistics over the given ones.

    A batch of count 0 leaves them as they are.
    """
    plain = weights is None and is_plain(x)
    if plain:
        y = short_way(x, scale, offset, mean, variance, residual, options)
        if y is not None:
            return y
    tensors = (x, scale, offset, mean, variance, residual, weights)
    if not _has_kernels(x):
        return _native.batch_norm_updating(*tensors, options)
    if plain and _gpu.serves(x) and _have_addresses(*tensors[:6]):
        return _short_way_of_a_gpu(x, scale, offset, mean, variance, residual, options)
    return _through_op(*tensors, options)  # type: ignore[no-any-return]


def _have_addresses(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Say whether an address is all that a kernel need know of these tensors.

    That leaves out empty batches, which change no statistics, and statistics that are learned.
    """
    statistics = [of for of in (mean, variance) if of is not None]
    given = [*statistics, *(of for of in (scale, offset, residual) if of is not None)]
    return (
        x.numel() > 0
        and x.layout is torch.strided
        and all(type(of) in _PLAIN for of in given)
        and not any(of.requires_grad for of in statistics)
    )


def _short_way_of_a_gpu(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    options: Options,
) -> Tensor:
    """Do it past the dispatcher, and without the copies that an op must make: a launch for each."""
    with torch.no_grad():
        old = [None if of is None else of.to(stat_type(x)) for of in (mean, variance)]
        new: Any = _gpu.room_for_statistics(x, options.axis) if options.training else old
        y, batch, count = _gpu.forward(
            x, scale, offset, old[0], old[1], residual, None, options, new
        )
        if options.training and mean is not None and variance is not None:
            torch._foreach_copy_([mean, variance], new)
    if not torch.is_grad_enabled():
        return y
    result: Tensor = _apply(x, scale, offset, residual, (y, (batch, count), options))
    return result


def _through_op(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> Any:
    stat = stat_type(x)
    given = [mean, variance]
    if options.training:
        # Copies: the op keeps them for its backward, and they are about to be overwritten.
        given = [None if of is None else of.detach().clone() for of in given]
    given = [None if of is None else of.to(stat) for of in given]
    y, *returned, _, count = _library.batch_norm(
        x, scale, offset, *given, residual, weights, **options._asdict()
    )
    if options.training and mean is not None and variance is not None:
        with torch.no_grad():
            running = mean, variance
            both = [new.detach().to(old.dtype) for old, new in zip(running, returned, strict=True)]
            if options.factor == 1:  # the op does not know what was given
                both = [
                    torch.where(count > 0, new, old) for old, new in zip(running, both, strict=True)
                ]
            # Both or none: nothing that could fail is left when the first is written.
            for old, new in zip(running, both, strict=True):
                old.copy_(new)
    return y


def batch_norm_backward(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    tensors: tuple[Tensor | None, ...],
    options: Options,
) -> Any:
    """Return the gradients of the first six tensors, x to residual; of None, anything.

    `batch` is the mean and biased variance that normalized x, in float64.
    """
    if _has_kernels(dy):
        return _library.batch_norm_backward(
            dy, dmean, dvariance, batch, *tensors, **options._asdict()
        )
    return _native.batch_norm_backward(dy, dmean, dvariance, tensors, options)


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None) -> Moments:
    """Return count, mean and m2 over `axes`, sorted and counted from the front, in float64."""
    if not _has_kernels(x):
        return Moments(*_portable.moments(x, list(axes), weights))
    return Moments(*_library.moments(x, weights, axes=list(axes)))
