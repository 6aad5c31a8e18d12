"""What other devices get, PyTorch's own kernels: run on the CPU, where it can be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusebn
import fusebn.torch as fbt
from devices import seeded
from fusebn.torch import _native, _ops
from fusebn.torch._portable import Options


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.fixture
def tensors() -> list[Tensor]:
    """x, scale, offset, mean, variance and residual, in float64."""
    generator = seeded(0)
    shapes = [(5, 3, 4), (3,), (3,), (3,), (3,), (5, 3, 4)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[4] = made[4].square() + 0.5
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu6", "gelu"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("correction", [0.0, 1.0])
def test_as_the_kernels(
    tensors: list[Tensor], training: bool, activation: str, factor: float, correction: float
) -> None:
    options = Options(training, 1, 1e-3, correction, factor, activation)
    results = [of(*tensors, None, options) for of in (_native.batch_norm, _ops.batch_norm)]
    close(*results)
    updated = []
    for of in (_native.batch_norm_updating, _ops.batch_norm_updating):
        x, scale, offset, mean, variance, residual = (v.clone() for v in tensors)
        x.requires_grad_()
        y = of(x, scale, offset, mean, variance, residual, None, options)
        y.sin().sum().backward()
        updated.append((y, mean, variance, x.grad))
    close(*updated)


@pytest.mark.parametrize("axis", [0, 2])
def test_another_axis(tensors: list[Tensor], axis: int) -> None:
    x = tensors[0]
    options = Options(True, axis, 1e-3, 1.0, 1.0, "relu")
    given = (x, None, None, None, None, x, None, options)
    close(_native.batch_norm(*given), _ops.batch_norm(*given))


def test_an_empty_batch_updates_nothing() -> None:
    mean, variance = torch.ones(3), torch.ones(3)
    options = Options(True, 1, 1e-3, 1.0, 0.1, "identity")
    y = _native.batch_norm_updating(
        torch.ones(0, 3), None, None, mean, variance, None, None, options
    )
    assert y.shape == (0, 3)
    assert mean.tolist() == variance.tolist() == [1, 1, 1]


def test_one_value_a_channel(tensors: list[Tensor]) -> None:
    x, offset = tensors[0][:1, :, 0], tensors[2]
    given = (x, None, offset, None, None, None, None, Options(True, 1, 1e-3, 1.0, 1.0, "relu"))
    close(_native.batch_norm(*given), (offset.relu()[None], x[0], torch.zeros_like(offset)))
    close(_native.batch_norm(*given), _ops.batch_norm(*given))


@pytest.mark.parametrize("training", [True, False])
def test_the_gradients(tensors: list[Tensor], training: bool) -> None:
    x, scale, offset, mean, variance, residual = tensors
    options = Options(training, 1, 1e-3, 0.0, 1.0, "silu")
    dmean = torch.ones(3, dtype=torch.float64) if training else None
    if training:
        mean, variance = x.mean((0, 2)), x.var((0, 2), correction=0)
    rest = (x, scale, offset, *((None, None) if training else (mean, variance)), residual, None)
    dy = residual.cos()
    native = _native.batch_norm_backward(dy, dmean, None, rest, options)
    kernels = _ops.batch_norm_backward(
        dy, dmean, None, torch.stack([mean, variance]), rest, options
    )
    for i in (0, 1, 2, 5):
        close(native[i], kernels[i])


def test_the_public_functions_reach_it() -> None:
    """On the device that computes nothing; what has no kernel there would raise."""
    x, one = torch.ones(2, 3, device="meta"), torch.ones(3, device="meta")
    assert fbt.batch_norm(x, one, one, training=True, activation="silu").device.type == "meta"
    y, mean, _ = fusebn.fused_batch_norm(x, one, None, axis=1)
    assert y.shape == (2, 3)
    assert mean.shape == (3,)
    assert fusebn.fused_batch_norm_grad(x, x, one, None, one, one, axis=1).dscale.shape == (3,)
    assert fusebn.moments(x, 0, weights=torch.ones(2, device="meta"))[0].shape == (3,)
    assert fusebn.batch_normalization(x, one, one, None, one, 0.1).shape == (2, 3)
    support = fusebn.info()["frameworks"]["torch"]["support"]
    assert "PyTorch's own on other devices (untested)" in support
