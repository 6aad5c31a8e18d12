"""The verbs of the core on tensors of the CPU, one by one, for what happens in between.

`moments`, `normalize` and `gradient` are what a batch in parts is made of; `_gpu` has the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusebn import _core
from fusebn.torch import _kernels
from fusebn.torch._arguments import ELEMENTS, stat_type
from fusebn.torch._portable import Options

_at = _kernels.address


def rstd_of(variance: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(variance + epsilon), and 0 where that sum is 0."""
    shifted = variance + epsilon
    return torch.where(shifted == 0, 0, shifted.rsqrt())


class Normalization:
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
        self.mean, self.rstd = mean.contiguous(), rstd.contiguous()
        self.scale, self.offset = _in_line(scale), _in_line(offset)
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

    def into_vectors(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of scale, offset, mean and variance, where none depends on x."""
        sum_g, sum_g_x = self.sums(dy)
        slope = self.rstd if self.scale is None else self.scale.double() * self.rstd
        # With the slope as the verbs have it: so a batch of one cancels exactly.
        dmean = -slope.to(stat_type(self.x)).double() * sum_g
        dvariance = slope * self.rstd * self.rstd * sum_g_x / -2
        return self.rstd * sum_g_x, sum_g, dmean, dvariance

    def write_gradients(
        self,
        dy: Tensor,
        weights: Tensor | None,
        count: float,
        sums: Tensor | None,
        dx: Tensor,
        dresidual: Tensor | None,
        dmean: Tensor | None = None,
        dvariance: Tensor | None = None,
    ) -> None:
        """Write dx, through the statistics too if there are sums, and dresidual if wanted."""
        if weights is not None:
            weights = _kernels.positions("batch_norm", dx, weights, self.axis)
        sum_g, sum_g_x = (None, None) if sums is None else (_at(sums[0]), _at(sums[1]))
        _core.backward(
            *self.block, _at(dy), _at(self.x), _at(self.mean), _at(self.rstd), _at(weights),
            _at(self.scale), _at(self.offset), _at(self.residual), self.activation, count,
            sum_g, sum_g_x, _at(dmean), _at(dvariance), _at(dx), _at(dresidual), lent=True,
        )  # fmt: skip


def _in_line(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


# ---- a batch in parts ----

moments = _kernels.moments


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
    y = _kernels.empty_like(x)
    # Of a batch of count 0 x is forgotten, NaN and all.
    source = x if count.item() else y.zero_()
    rstd = rstd_of(batch[1], options.epsilon)
    Normalization(y, source, batch[0], rstd, scale, offset, residual, options).write(y)
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
    join: Callable[[Tensor], None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, scale, offset and residual; the last three, if needed.

    `join` adds up the sums of all parts of the batch, in place; scale and offset get what comes of
    the part that x is.
    """
    dx = _kernels.empty_like(x)
    rstd = rstd_of(batch[1], options.epsilon)
    normalization = Normalization(dx, x, batch[0], rstd, scale, offset, residual, options)
    dy = _kernels.beside(dx, dy)
    sums = normalization.sums(dy)
    dscale = (rstd * sums[1]).to(stat_type(x)) if needed[1] else None
    doffset = sums[0].to(stat_type(x), copy=True) if needed[2] else None
    join(sums)
    dresidual = _kernels.empty_like(x) if needed[3] else None
    total = count.item()
    through = sums if total else None
    normalization.write_gradients(dy, weights, total, through, dx, dresidual)
    return dx, dscale, doffset, dresidual
