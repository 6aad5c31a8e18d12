"""Moments of a batch in parts: gathered, merged, and mixed into running statistics.

    count = sum of n_r,   mean = sum of n_r * mean_r / count,
    m2    = sum of m2_r + n_r * (mean_r - mean)^2

This is exact for parts of any size, of none, and of any weights: Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", 1983. The collectives can be differentiated as often as one
likes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusebn.torch._portable import Moments

# ---- the merge ----


def merged(part: Moments, group: Any) -> Moments:
    """Return the moments of the whole batch, of which every process has a part: one collective."""
    count, mean, m2 = part
    return merge(Gather.apply(torch.cat([count.reshape(1), mean, m2]), group))


def merge(gathered: Tensor) -> Moments:
    """Merge moments, a row [count, mean, m2] for each rank."""
    channels = (gathered.shape[1] - 1) // 2
    counts, means, m2s = torch.split(gathered, [1, channels, channels], 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / torch.where(count > 0, count, 1)
    return Moments(count, mean, (m2s + counts * (means - mean).square()).sum(0))


def variance_of(moments: Moments) -> Tensor:
    """Return the biased variance, infinite for a batch of count 0: x is forgotten."""
    counted = moments.count > 0
    return torch.where(counted, moments.m2 / torch.where(counted, moments.count, 1), torch.inf)


@torch.no_grad()
def mix(mean: Tensor, variance: Tensor, moments: Moments, factor: float, correction: float) -> None:
    """Move running statistics towards those of the batch; one of count 0 has none."""
    count, n = moments.count, torch.where(moments.count > 0, moments.count, 1)
    unbiased = torch.where(count > correction, count - correction, n)

    def mixed(old: Tensor, new: Tensor) -> Tensor:
        # With factor 1 what was there has no part in it, whatever it was.
        new = new if factor == 1 else (1 - factor) * old.double() + factor * new
        return torch.where(count > 0, new, old.double())

    # Both or none: nothing that could fail is left when the first is written.
    both = mixed(mean, moments.mean), mixed(variance, moments.m2 / unbiased)
    mean.copy_(both[0])
    variance.copy_(both[1])


# ---- the collectives ----


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


class Gather(torch.autograd.Function):
    """The vectors of all processes, a row for each rank."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = values.new_empty(dist.get_world_size(group) * values.numel())
        # Not into a list, which NCCL would fill by way of one more copy of everything.
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
        return gathered.view(-1, values.numel())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient, ctx.group)[dist.get_rank(ctx.group)], None
