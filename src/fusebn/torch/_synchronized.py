"""A batch norm over a batch whose parts lie in several processes.

Each process takes the moments of its part; all gather all moments, and merge them alike, in the
order of the ranks, so that everyone goes on with the same bits (`_merging`). Backward adds up the
two sums of the verb `backward_sums` before `backward` uses them. So there is one collective
forward, and one backward, of 2 * channels doubles. Gradients of scale and offset stay those of the
part, as everything else does that ``DistributedDataParallel`` averages.

The verbs are the core's on a CPU, and Triton's on a CUDA device where these are wanted. Derivatives
of higher order, those of the weights, and other devices take the composite: `_portable` on both
sides of a gather that can be differentiated.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusebn.torch import _gpu, _portable, _verbs
from fusebn.torch._merging import merged, variance_of
from fusebn.torch._portable import Moments, Options


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
    verbs = _verbs_for(x)
    if verbs is None:
        y, moments = _composite(x, scale, offset, residual, weights, options, group)
        return y, Moments(*(value.detach() for value in moments))
    y, *found = _Synchronized.apply(x, scale, offset, residual, weights, options, group, verbs)
    return y, Moments(*found)


def _verbs_for(x: Tensor) -> Any:
    """Return the module of the verbs that take x, or None if there is none."""
    if _gpu.serves(x):
        return _gpu
    return _verbs if x.is_cpu else None


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
    moments = merged(Moments(*_portable.moments(x, axes, weights)), group)
    given = moments.mean, variance_of(moments)
    y, *_ = _portable.batch_norm(
        x, scale, offset, *given, residual, None, options._replace(training=False)
    )
    return y, moments


# ---- by the verbs ----


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
        verbs: Any,
    ) -> Any:
        moments = merged(Moments(*verbs.moments(x, options.axis, weights)), group)
        batch = torch.stack([moments.mean, variance_of(moments)])
        ctx.options, ctx.group, ctx.verbs = options, group, verbs
        ctx.save_for_backward(x, scale, offset, residual, weights, batch, moments.count)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        y = verbs.normalize(x, batch, moments.count, scale, offset, residual, options)
        return y, *moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        *tensors, batch, count = ctx.saved_tensors
        x, scale, offset, residual, weights = tensors
        options, group, needed = ctx.options, ctx.group, ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(x)
        if torch.is_grad_enabled() or needed[4]:
            return *_through_composite(dy, tensors, options, group, needed), None, None, None

        def join(sums: Tensor) -> None:
            if needed[0]:
                dist.all_reduce(sums, group=group)

        # Without an activation the residual's gradient is dy.
        masked = options.activation != "identity"
        wanted = *needed[:3], needed[3] and masked
        *found, dresidual = ctx.verbs.gradient(
            dy, x, batch, count, scale, offset, residual, weights, options, wanted, join
        )
        if needed[3] and not masked:
            dresidual = dy
        return *found, dresidual, None, None, None, None


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
