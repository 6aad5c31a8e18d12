"""The kernels on a GPU against PyTorch in float64: real sizes, every view, memory full of NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_batches import assert_right, batch_of, channels_last, step

import fusebn
import fusebn.torch as fbt
from devices import poisoned_memory

HALF = (torch.bfloat16, torch.float16)
TYPES = (*HALF, torch.float32, torch.float64)
# ResNet-50's, from its widest planes to its narrowest; then what no tile fits.
SHAPES = [
    (32, 64, 112, 112), (64, 256, 56, 56), (128, 512, 28, 28), (256, 1024, 14, 14),
    (256, 2048, 7, 7), (8, 3, 224, 224), (37, 35, 49, 1), (5, 1000, 3, 3), (1, 65, 511, 513),
]  # fmt: skip
# More samples than one axis of a grid has programs, also where cuDNN refuses.
MANY = [(70_000, 64), (70_001, 33), (66_000, 16, 2, 2), (2**20, 3, 1, 1)]
# More elements than 32 bits can count.
HUGE = [(2**25 + 3, 65), (33, 64, 1024, 1024), (3, 2, 2**14, 2**15), (2**31 + 7, 1)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
    torch.cuda.empty_cache()


@pytest.fixture(params=["1", "0"], ids=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", request.param)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("order", [torch.contiguous_format, channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_sizes(shape: Any, order: torch.memory_format) -> None:
    batch = batch_of(shape, order=order)
    assert_right(batch, step(batch))


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_every_type(dtype: torch.dtype, residual: bool, activation: str | None) -> None:
    for shape, order in (
        ((32, 128, 28, 28), channels_last),
        ((32, 30, 14, 14), channels_last),
        ((32, 30, 14, 14), torch.contiguous_format),
    ):
        batch = batch_of(shape, dtype, order, residual=residual)
        assert_right(batch, step(batch, activation), activation)


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_samples(shape: Any) -> None:
    batch = batch_of(shape, torch.float32, residual=True)
    assert_right(batch, step(batch))


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_more_than_32_bits_can_count(shape: Any) -> None:
    assert math.prod(shape) > 2**31
    # x, dy, y, dx, the oracle's pieces, and room between them.
    needed, free = 12 * math.prod(shape) + 2**33, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed >> 30} GiB of memory are needed, {free >> 30} are free")
    batch = batch_of(shape)
    assert_right(batch, step(batch))


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_views_that_begin_anywhere(shift: int, dtype: torch.dtype) -> None:
    """Where 16 bytes cannot be loaded at once, or no 4."""
    for shape in ((1000, 64), (100, 30), (9, 5, 7, 7)):
        batch = batch_of(shape, dtype, residual=True, shift=shift)
        assert batch.x.data_ptr() % 16 == shift * dtype.itemsize % 16
        assert_right(batch, step(batch))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "leaky_relu", "relu6"])
def test_as_on_a_cpu(training: bool, activation: str) -> None:
    """The rest of what there is, where the CPU's kernels are the judge."""
    batch = batch_of((50, 24, 9, 5), torch.float64, residual=True)
    weights = torch.rand(50, 9, 5, dtype=torch.float64)
    found = []
    for device in ("cuda", "cpu"):
        x, dy, residual, scale, offset, mean, variance = (
            v.to(device) for v in batch if v is not None
        )
        sources = [v.requires_grad_() for v in (x, scale, offset, residual)]
        y, *returned = fusebn.fused_batch_norm(
            x, scale, offset, mean, variance, is_training=training, data_format="NCHW",
            exponential_avg_factor=0.1, activation=activation, residual=residual,
            weights=weights.to(device) if training else None,
        )  # fmt: skip
        found.append([y, *returned, *torch.autograd.grad(y, sources, dy)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-10)


def test_moments_are_exact_far_from_0() -> None:
    x = 1e6 + torch.randn(100_000, 30)
    mean, variance = fusebn.moments(x, 0)
    wanted = torch.var_mean(x.double(), 0, correction=0)
    torch.testing.assert_close(variance, wanted[0].float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, wanted[1].float(), rtol=1e-7, atol=0)


def test_the_layer_and_its_averages() -> None:
    layer = fbt.BatchNorm2d(96, activation="relu").to(memory_format=channels_last)
    for seed in range(3):
        x = batch_of((16, 96, 14, 14), torch.bfloat16, channels_last, seed=seed).x
        assert layer(x).is_contiguous(memory_format=channels_last)
    assert layer.num_batches_tracked == 3
    assert layer.running_var.isfinite().all()
