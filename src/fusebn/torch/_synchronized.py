"""A batch norm over a batch whose parts lie in several processes.

Each process takes the moments of its part; all gather all moments, and merge them alike, in the
order of the ranks, so that everyone goes on with the same bits (`_merging`). Backward adds up the
two sums of the verb `backward_sums` before `backward` uses them. So there is one collective
forward, and one backward, of 2 * channels doubles. Gradients of scale and offset stay those of the
part, as everything else does that ``DistributedDataParallel`` averages.

Derivatives of higher order, those of the weights, and other devices than the CPU take the
composite: `_portable` on both sides of a gather that can be differentiated.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusebn.torch import _kernels, _portable
from fusebn.torch._merging import Gather, merge, variance_of
from fusebn.torch._portable import Moments, Options
from fusebn.torch._verbs import Normalization, rstd_of


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    group: Any,
) -> tuple[Tensor, Moments]:
    """Return y, and the moments of the whole batch, which are constants."""
    if torch.compiler.is_compiling():
        return _apart(x, scale, offset, residual, weights, options, group)
    return _batch_norm(x, scale, offset, residual, weights, options, group)


@torch._disable_dynamo  # type: ignore[attr-defined]
def _apart(*arguments: Any) -> tuple[Tensor, Moments]:
    """Do it between two compiled graphs."""
    return _batch_norm(*arguments)


def _batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    group: Any,
) -> tuple[Tensor, Moments]:
    if not x.is_cpu:
        y, moments = _composite(x, scale, offset, residual, weights, options, group)
        return y, Moments(*(value.detach() for value in moments))
    y, *moments = _Synchronized.apply(x, scale, offset, residual, weights, options, group)
    return y, Moments(*moments)


# ---- the composite ----


def _composite(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    group: Any,
) -> tuple[Tensor, Moments]:
    """Do what `batch_norm` does by PyTorch's own ops, differentiable as often as one likes."""
    axes = [i for i in range(x.ndim) if i != options.axis]
    count, mean, m2 = _portable.moments(x, axes, weights)
    moments = merge(Gather.apply(torch.cat([count.reshape(1), mean, m2]), group))
    given = moments.mean, variance_of(moments)
    y, *_ = _portable.batch_norm(
        x, scale, offset, *given, residual, None, options._replace(training=False)
    )
    return y, moments


# ---- on the core ----


class _Synchronized(torch.autograd.Function):
    """The four verbs, with a collective behind the first and the third."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        residual: Tensor | None,
        weights: Tensor | None,
        options: Options,
        group: Any,
    ) -> Any:
        count, mean, m2 = _kernels.moments(x, options.axis, weights)
        moments = merge(Gather.apply(torch.cat([mean.new_tensor([count]), mean, m2]), group))
        ctx.options, ctx.group, ctx.count = options, group, moments.count.item()
        mean, rstd = moments.mean.clone(), rstd_of(variance_of(moments), options.epsilon)
        ctx.save_for_backward(x, scale, offset, residual, weights, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        y = _kernels.empty_like(x)
        # Of a batch of count 0 x is forgotten, NaN and all.
        source = x if ctx.count else y.zero_()
        Normalization(y, source, mean, rstd, scale, offset, residual, options).write(y)
        return y, *moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        *tensors, mean, rstd = ctx.saved_tensors
        x, scale, offset, residual, weights = tensors
        options, group, needed = ctx.options, ctx.group, ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(x)
        if torch.is_grad_enabled() or needed[4]:
            return *_through_composite(dy, tensors, options, group, needed), None, None
        dx = _kernels.empty_like(x)
        normalization = Normalization(dx, x, mean, rstd, scale, offset, residual, options)
        dy = _kernels.beside(dx, dy)
        sums = normalization.sums(dy)
        dscale = (rstd * sums[1]).to(scale.dtype) if needed[1] else None
        doffset = sums[0].to(offset.dtype, copy=True) if needed[2] else None
        if needed[0]:
            dist.all_reduce(sums, group=group)
        dresidual = _kernels.empty_like(x) if needed[3] else None
        through = sums if ctx.count else None
        normalization.write_gradients(dy, weights, ctx.count, through, dx, dresidual)
        return dx, dscale, doffset, dresidual, None, None, None


def _through_composite(
    dy: Tensor, tensors: list[Any], options: Options, group: Any, needed: Any
) -> list[Tensor | None]:
    """Return the gradients of the composite, differentiable in their turn if that is asked for.

    They are taken at names of their own for the tensors: one may be made of another.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        x, scale, offset, residual, weights = own
        y, _ = _composite(x, scale, offset, residual, weights, options, group)
        wanted = [i for i in range(len(own)) if needed[i]]
        found = torch.autograd.grad(y, [own[i] for i in wanted], dy, create_graph=again)
    gradients: list[Tensor | None] = [None] * len(own)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients
