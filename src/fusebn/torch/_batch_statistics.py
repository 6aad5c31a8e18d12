"""A batch norm whose batch's statistics are transformed before they normalize it.

    mean, variance = moments of x,   mean', variance' = transforms of these
    y  = activation((x - mean') * scale * rstd' + offset + residual)

Backward needs, of the verbs, no pass more than any batch norm. With g = dy * activation'(z),

    dmean'     = -scale * rstd' * sum of g
    dvariance' = -scale * rstd'^3 / 2 * sum of g * (x - mean')          `backward_sums`

flow through whatever the transforms are into dmean and dvariance of the batch, and then

    dx = scale * rstd' * g + weight / count * (dmean + 2 * (x - mean) * dvariance)      `backward`

So there are two functions, and the transforms between them are PyTorch's to differentiate. The
first has x as a result, too, which the second takes: on the way back it is the second that comes
first, knows dy and what y was made of, and hands both to the first, in place of the gradient of x.
To be differentiated again, they hand over gradients that are ones.

Where others watch than autograd, and on other devices, it is `moments` and `batch_norm` of `_ops`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fusebn.torch import _kernels, _library, _ops
from fusebn.torch._arguments import stat_type
from fusebn.torch._merging import merged, mix
from fusebn.torch._portable import Moments, Options
from fusebn.torch._variables import Through
from fusebn.torch._verbs import Normalization, rstd_of


def batch_norm_updating(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    through: Through,
    group: Any = None,
) -> Tensor:
    """Do what `_ops.batch_norm_updating` does in training, with transforms in between.

    What is running takes up the batch's own statistics. The batch is that of a group of processes
    if there is one.
    """
    if torch.compiler.is_compiling() and group is not None:
        return _apart(x, scale, offset, mean, variance, residual, weights, options, through, group)
    short = _ops.is_plain(x) and x.is_cpu and not (weights is not None and weights.requires_grad)
    way = _short_way if short else _long_way
    y, moments = way(x, scale, offset, residual, weights, options, through, group)
    if mean is not None and variance is not None:
        mix(mean, variance, moments, options.factor, options.correction)
    return y


@torch._disable_dynamo  # type: ignore[attr-defined]
def _apart(*arguments: Any) -> Tensor:
    """Do it between two compiled graphs."""
    return batch_norm_updating(*arguments)


# ---- by the ops ----


def _long_way(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    through: Through,
    group: Any,
) -> tuple[Tensor, Moments]:
    moments = _moments(x, weights, options.axis, group)
    mean, variance = through.of_batch(moments.mean, _variance(moments), stat_type(x))
    counted = moments.count > 0
    # Of a batch of count 0 x is forgotten.
    mean, variance = torch.where(counted, mean, 0), torch.where(counted, variance, torch.inf)
    if weights is not None:
        x = torch.where(counted, x, 0)
    given = options._replace(training=False, factor=1.0)
    y, *_ = _ops.batch_norm(x, scale, offset, mean, variance, residual, None, given)
    return y, Moments(*(value.detach() for value in moments))


def _moments(x: Tensor, weights: Tensor | None, axis: int, group: Any) -> Moments:
    """Return the moments of the whole batch, differentiable as often as one likes."""
    axes = tuple(i for i in range(x.ndim) if i != axis)
    moments = _ops.moments(x, axes, weights)
    return moments if group is None else merged(moments, group)


def _variance(moments: Moments) -> Tensor:
    return moments.m2 / torch.where(moments.count > 0, moments.count, 1)


# ---- by the verbs ----


class _Handed(NamedTuple):
    """What the second function tells the first on the way back."""

    normalization: Normalization
    dy: Tensor
    dx: Tensor  # to be filled


class _Link:
    """What the two functions share, besides tensors."""

    def __init__(self, options: Options, group: Any) -> None:
        self.options, self.group = options, group
        self.count = 0.0
        self.handed: _Handed | None = None


def _short_way(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    through: Through,
    group: Any,
) -> tuple[Tensor, Moments]:
    link = _Link(options, group)
    mean, variance, count, m2, x, residual = _Statistics.apply(x, residual, weights, link)
    moments = Moments(count, mean.detach(), m2)
    if link.count:
        mean, variance = through.of_batch(mean, variance, stat_type(x))
    else:
        mean, variance = torch.zeros_like(m2), torch.full_like(m2, torch.inf)
    return _Normalize.apply(x, scale, offset, mean, variance, residual, link), moments


class _Statistics(torch.autograd.Function):
    """The moments of the whole batch; x and the residual pass through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weights: Tensor | None, link: _Link
    ) -> Any:
        moments = Moments(*_kernels.moments(x, link.options.axis, weights))
        if link.group is not None:
            moments = Moments(*(value.clone() for value in merged(moments, link.group)))
        link.count = moments.count.item()
        ctx.link = link
        ctx.save_for_backward(x, weights, moments.mean)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.count, moments.m2)
        return moments.mean, _variance(moments), moments.count, moments.m2, x, residual

    @staticmethod
    def backward(
        ctx: Any,
        dmean: Tensor | None,
        dvariance: Tensor | None,
        _: Any,
        __: Any,
        dx: Tensor | None,
        dresidual: Tensor | None,
    ) -> Any:
        x, weights, mean = ctx.saved_tensors
        link = ctx.link
        handed, link.handed = link.handed, None
        if handed is None:
            if dmean is not None or dvariance is not None:
                flows = _through_moments(x, weights, dmean, dvariance, link)
                dx = flows if dx is None else dx + flows
            return dx, dresidual, None, None
        flowing = torch.stack(
            [torch.zeros_like(mean) if d is None else d for d in (dmean, dvariance)]
        )
        if link.group is not None:
            dist.all_reduce(flowing, group=link.group)
        normalization, dy, dx = handed
        # The verb takes distances from the mean that normalized x.
        dmean, dvariance = flowing
        dmean = dmean - 2 * dvariance * (mean - normalization.mean)
        dresidual = None
        if ctx.needs_input_grad[1]:
            masked = link.options.activation != "identity"
            dresidual = _kernels.empty_like(x) if masked else dy
        normalization.write_gradients(
            dy, weights, link.count, torch.zeros_like(flowing) if link.count else None, dx,
            None if dresidual is dy else dresidual, dmean, dvariance,
        )  # fmt: skip
        return dx, dresidual, None, None


def _through_moments(
    x: Tensor, weights: Tensor | None, dmean: Tensor | None, dvariance: Tensor | None, link: _Link
) -> Tensor:
    """Return what flows into x through the statistics, differentiable if that is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = x.view_as(x) if again else x.detach().requires_grad_()
        moments = _moments(own, weights, link.options.axis, link.group)
        found = (moments.mean, _variance(moments))
        flowing = [
            torch.zeros_like(of) if d is None else d
            for of, d in zip(found, (dmean, dvariance), strict=True)
        ]
        (dx,) = torch.autograd.grad(found, own, flowing, create_graph=again)
    return dx


class _Normalize(torch.autograd.Function):
    """Normalization by statistics that come from `_Statistics`, in whatever way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        residual: Tensor | None,
        link: _Link,
    ) -> Tensor:
        rstd = rstd_of(variance, link.options.epsilon)
        ctx.link = link
        ctx.save_for_backward(x, scale, offset, mean, variance, residual)
        ctx.set_materialize_grads(False)
        y = _kernels.empty_like(x)
        # Of a batch of count 0 x is forgotten, NaN and all.
        source = x if link.count else y.zero_()
        Normalization(y, source, mean, rstd, scale, offset, residual, link.options).write(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 7
        tensors, link = ctx.saved_tensors, ctx.link
        link.handed = None  # what is there, nobody fetched
        needed, options = ctx.needs_input_grad, link.options
        if torch.is_grad_enabled() or not _ops.is_plain(dy) or is_legacy_batchedtensor(dy):
            given = options._replace(training=False, factor=1.0)
            batch = torch.stack(tensors[3:5])
            found = _library.gradients(
                dy, None, None, batch, [*tensors, None], given, (*needed, False)
            )
            return *found[:6], None
        # Detached: what is handed over must not keep alive the graph that it hangs on.
        own: list[Any] = [None if tensor is None else tensor.detach() for tensor in tensors]
        x, scale, offset, mean, variance, residual = own
        rstd = rstd_of(variance, options.epsilon)
        dx = _kernels.empty_like(x)
        normalization = Normalization(dx, x, mean, rstd, scale, offset, residual, options)
        dy = _kernels.beside(dx, dy)
        dscale, doffset, dmean, dvariance = normalization.into_vectors(dy)
        if needed[0] or needed[5]:
            link.handed = _Handed(normalization, dy, dx)
        return (
            dy if needed[0] else None,
            dscale.to(scale.dtype) if needed[1] else None,
            doffset.to(offset.dtype) if needed[2] else None,
            dmean,
            dvariance,
            dy if needed[5] else None,
            None,
        )
