"""A batch norm over a batch whose parts lie in several processes.

Each process takes the moments of its part; all gather all moments, and merge them alike, in the
order of the ranks, so that everyone goes on with the same bits:

    count = sum of n_r,   mean = sum of n_r * mean_r / count,
    m2    = sum of m2_r + n_r * (mean_r - mean)^2

This is exact for parts of any size, of none, and of any weights: Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", 1983. Backward adds up the two sums of the verb `backward_sums`
before `backward` uses them. So there is one collective forward, and one backward, of 2 * channels
doubles. Gradients of scale and offset stay those of the part, as everything else does that
``DistributedDataParallel`` averages.

Derivatives of higher order, those of the weights, and other devices than the CPU take the
composite: `_portable` on both sides of a gather that can be differentiated.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusebn import _core
from fusebn.torch import _kernels, _portable
from fusebn.torch._arguments import ELEMENTS
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
    if not x.is_cpu:
        y, moments = _composite(x, scale, offset, residual, weights, options, group)
        return y, Moments(*(value.detach() for value in moments))
    y, *moments = _Synchronized.apply(x, scale, offset, residual, weights, options, group)
    return y, Moments(*moments)


# ---- the merge ----


def _merge(gathered: Tensor) -> Moments:
    """Merge moments, a row [count, mean, m2] for each rank."""
    channels = (gathered.shape[1] - 1) // 2
    counts, means, m2s = torch.split(gathered, [1, channels, channels], 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / torch.where(count > 0, count, 1)
    return Moments(count, mean, (m2s + counts * (means - mean).square()).sum(0))


def _variance(moments: Moments) -> Tensor:
    """Return the biased variance, infinite for a batch of count 0: x is forgotten."""
    counted = moments.count > 0
    return torch.where(counted, moments.m2 / torch.where(counted, moments.count, 1), torch.inf)


@torch.no_grad()
def mix(mean: Tensor, variance: Tensor, moments: Moments, factor: float, correction: float) -> None:
    """Move running statistics towards those of the batch; one of count 0 has none."""
    count, n = moments.count, torch.where(moments.count > 0, moments.count, 1)
    unbiased = torch.where(count > correction, count - correction, n)
    for old, new in ((mean, moments.mean), (variance, moments.m2 / unbiased)):
        mixed = (1 - factor) * old.double() + factor * new
        old.copy_(torch.where(count > 0, mixed, old.double()))


# ---- the collectives, differentiable ----


class _Sum(torch.autograd.Function):
    """The sum over all processes. What flows back is the sum of what flows back everywhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient, ctx.group), None


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over all processes, differentiable as often as one likes."""
    total: Tensor = _Sum.apply(values, None)
    return total


class _Gather(torch.autograd.Function):
    """The vectors of all processes, a row for each rank."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = values.new_empty(dist.get_world_size(group), values.numel())
        dist.all_gather(list(gathered), values.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient, ctx.group)[dist.get_rank(ctx.group)], None


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
    moments = _merge(_Gather.apply(torch.cat([count.reshape(1), mean, m2]), group))
    given = moments.mean, _variance(moments)
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
        moments = _merge(_Gather.apply(torch.cat([mean.new_tensor([count]), mean, m2]), group))
        ctx.options, ctx.group, ctx.count = options, group, moments.count.item()
        mean, rstd = moments.mean.clone(), _rstd(_variance(moments), options.epsilon)
        ctx.save_for_backward(x, scale, offset, residual, weights, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        y = _kernels.empty_like(x)
        # Of a batch of count 0 x is forgotten, NaN and all.
        source = x if ctx.count else y.zero_()
        _Normalization(y, source, mean, rstd, scale, offset, residual, options).write(y)
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
        normalization = _Normalization(dx, x, mean, rstd, scale, offset, residual, options)
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


def _rstd(variance: Tensor, epsilon: float) -> Tensor:
    shifted = variance + epsilon
    return torch.where(shifted == 0, 0, shifted.rsqrt())


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


class _Normalization:
    """What the verbs are told of a normalization, laid out beside a dense tensor to be written."""

    def __init__(
        self,
        out: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> None:
        self.axis = options.axis
        self.block = ELEMENTS[x.dtype], *_kernels.block(out, options.axis)
        self.x = _kernels.beside(out, x)
        self.mean, self.rstd = mean, rstd
        self.scale, self.offset = scale, offset
        self.residual = None if residual is None else _kernels.beside(out, residual)
        self.activation = _kernels.ACTIVATIONS[options.activation]
        _kernels.follow_threads()

    def write(self, y: Tensor) -> None:
        _core.normalize(
            *self.block, _at(self.x), _at(self.mean), _at(self.rstd), _at(self.scale),
            _at(self.offset), _at(self.residual), self.activation, _at(y), lent=True,
        )  # fmt: skip

    def sums(self, dy: Tensor) -> Tensor:
        """Return sum_g and sum_g_x of this part of the batch."""
        sums = self.rstd.new_empty(2, self.rstd.numel())
        _core.backward_sums(
            *self.block, _at(dy), _at(self.x), _at(self.mean), _at(self.rstd), _at(self.scale),
            _at(self.offset), _at(self.residual), self.activation, _at(sums[0]), _at(sums[1]),
            lent=True,
        )  # fmt: skip
        return sums

    def write_gradients(
        self,
        dy: Tensor,
        weights: Tensor | None,
        count: float,
        sums: Tensor | None,
        dx: Tensor,
        dresidual: Tensor | None,
    ) -> None:
        """Write dx, through the statistics too if there are sums, and dresidual if wanted."""
        if weights is not None:
            weights = _kernels.positions("SyncBatchNorm", dx, weights, self.axis)
        sum_g, sum_g_x = (None, None) if sums is None else (_at(sums[0]), _at(sums[1]))
        _core.backward(
            *self.block, _at(dy), _at(self.x), _at(self.mean), _at(self.rstd), _at(weights),
            _at(self.scale), _at(self.offset), _at(self.residual), self.activation, count,
            sum_g, sum_g_x, None, None, _at(dx), _at(dresidual), lent=True,
        )  # fmt: skip


_at = _kernels.address
