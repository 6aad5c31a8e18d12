"""Batches of real sizes, a training step with one, and the same by PyTorch in float64.

The oracle of the other tests is NumPy's and would take minutes here. This one is piece by piece, so
that it needs little memory besides the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusebn.torch as fbt
from devices import seeded

EPSILON, FACTOR = 1e-3, 0.25
# Units in the last place, as in conftest.py.
ULPS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 8, torch.float64: 32}
PIECE = 1 << 26  # elements
# Beside a kink of the activation rounding decides on which side of it an element is.
NEAR = 1e-4

channels_last = torch.channels_last


class Batch(NamedTuple):
    """What a training step is given; x, dy and residual lie in memory alike."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    scale: Tensor
    offset: Tensor
    mean: Tensor
    variance: Tensor


class Step(NamedTuple):
    """What a training step returns."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    dx: Tensor
    dscale: Tensor
    doffset: Tensor
    dresidual: Tensor | None


def batch_of(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    order: torch.memory_format = torch.contiguous_format,
    *,
    residual: bool = False,
    shift: int = 0,
    seed: int = 0,
) -> Batch:
    """Return a batch of random numbers; its tensors begin `shift` elements behind an allocation."""
    generator = seeded(seed)
    stat = torch.float64 if dtype is torch.float64 else torch.float32

    def large() -> Tensor:
        memory = torch.empty(math.prod(shape) + shift, dtype=dtype)[shift:]
        strides = torch.empty(shape, device="meta").to(memory_format=order).stride()
        memory.normal_(generator=generator)
        return memory.as_strided(shape, strides, shift)

    def vector() -> Tensor:
        return torch.randn(shape[1], generator=generator, dtype=stat)

    x, dy = large().add_(vector().to(dtype).reshape(-1, *[1] * (len(shape) - 2))), large()
    beside = large() if residual else None
    return Batch(x, dy, beside, vector() + 2, vector(), vector(), vector().square() + 0.5)


def step(of: Batch, activation: str | None = "relu") -> Step:
    """Take a training step, by the Triton kernels."""
    sources = [
        None if v is None else v.detach().requires_grad_()
        for v in (of.x, of.scale, of.offset, of.residual)
    ]
    x, scale, offset, residual = sources
    mean, variance = of.mean.clone(), of.variance.clone()
    y = fbt.batch_norm(
        x, mean, variance, scale, offset, True, FACTOR, EPSILON,
        residual=residual, activation=activation,
    )  # fmt: skip
    wanted = [v for v in sources if v is not None]
    gradients = torch.autograd.grad(y, wanted, of.dy)
    return Step(y.detach(), mean, variance, *gradients, *[None] * (4 - len(wanted)))


def assert_same_bits(found: Step, expected: Step) -> None:
    for name, one, other in zip(Step._fields, found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            assert torch.equal(one, other), name


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, name: str = "") -> None:
    """Assert that errors are some units in the last place of a magnitude; NaN is never right."""
    units = ULPS[actual.dtype] * torch.finfo(actual.dtype).eps
    wrong = ~((actual.double() - expected).abs() <= units * magnitude + 1e-300)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} differ"


def assert_right(of: Batch, found: Step, activation: str | None = "relu") -> None:
    """Assert a training step in float64, by the formulas of `_backward.py`."""
    assert activation in (None, "relu")
    n, channels = of.x.numel() // of.x.shape[1], of.x.shape[1]
    zeros = torch.zeros(channels, dtype=torch.float64)
    mean, m2, sums = zeros, zeros, torch.zeros(4, channels, dtype=torch.float64)
    for (x,) in pieces(of.x):
        mean = mean + x.double().sum((0, 2)) / n
    for (x,) in pieces(of.x):
        m2 = m2 + (x.double() - mean[:, None]).square().sum((0, 2))
    rstd = 1 / (m2 / n + EPSILON).sqrt()
    a, offset = of.scale.double() * rstd, of.offset.double()

    def z_and_g(x: Tensor, dy: Tensor, residual: Any) -> tuple[Tensor, Tensor, Tensor]:
        centred = x.double() - mean[:, None]
        z = centred * a[:, None] + offset[:, None]
        z = z if residual is None else z + residual.double()
        g = dy.double() if activation is None else torch.where(z > 0, dy.double(), 0)
        return centred, z, g

    given = (of.x, of.dy, of.residual)
    for x, dy, residual in pieces(*given):
        centred, _, g = z_and_g(x, dy, residual)
        terms = (g, g * centred, g.abs(), (g * centred).abs())
        sums = sums + torch.stack([term.sum((0, 2)) for term in terms])
    sum_g, sum_g_x, sum_abs_g, sum_abs_g_x = sums
    for x, dy, residual, y, dx, dresidual in pieces(*given, found.y, found.dx, found.dresidual):
        centred, z, g = z_and_g(x, dy, residual)
        spread = a.abs()[:, None] * centred.abs() + of.scale.abs()[:, None] + offset.abs()[:, None]
        spread = spread if residual is None else spread + residual.abs()
        assert_close(y, z if activation is None else z.relu(), spread, "y")
        through = sum_g[:, None] + centred * (rstd**2 * sum_g_x)[:, None]
        most = sum_abs_g[:, None] + centred.abs() * (rstd**2 * sum_abs_g_x)[:, None]
        wanted = a[:, None] * (g - through / n)
        size = a.abs()[:, None] * (dy.abs() + most / n)
        away = torch.ones_like(z) if activation is None else (z.abs() > NEAR).double()
        assert_close(dx * away.to(dx.dtype), wanted * away, size, "dx")
        if dresidual is not None:
            assert_close(dresidual * away.to(dresidual.dtype), g * away, dy.abs(), "dresidual")
    unbiased = m2 / max(n - 1, 1)
    for actual, old, new in (
        (found.mean, of.mean, mean),
        (found.variance, of.variance, unbiased),
    ):
        size = old.abs() + new.abs() + (m2 / n).sqrt()
        assert_close(actual, (1 - FACTOR) * old + FACTOR * new, size, "statistics")
    assert_close(found.dscale, rstd * sum_g_x, rstd * sum_abs_g_x, "dscale")
    assert_close(found.doffset, sum_g, sum_abs_g, "doffset")


def pieces(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Yield the same piece of each tensor of one shape, [rows, channels, columns]."""
    planes = [
        None if v is None else v.unsqueeze(-1) if v.ndim == 2 else v.flatten(2) for v in tensors
    ]
    first = planes[0]
    assert first is not None
    outer, channels, inner = first.shape
    columns = max(1, min(inner, PIECE // channels))
    rows = max(1, PIECE // (channels * columns))
    for row in range(0, outer, rows):
        for column in range(0, inner, columns):
            yield [
                None if v is None else v[row : row + rows, :, column : column + columns]
                for v in planes
            ]
