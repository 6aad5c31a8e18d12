"""PyTorch's ops for CUDA tensors, interpreted on a CPU, whose own ops are the judge."""

import interpreted  # noqa: F401  # all programs at once
import numpy as np
import pytest
import torch

from fusebn.torch import _gpu, _library

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
}


def options(training=True, activation="relu", axis=1):
    return {
        "training": training, "axis": axis, "epsilon": 1e-3, "correction": 1.0, "factor": 0.25,
        "activation": activation,
    }  # fmt: skip


def tensors(rng, lay_out, *, weights, residual):
    def of(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype("float32"))

    channels = 32
    x, dy, beside = (lay_out(of(3, channels, 4, 6)) for _ in range(3))
    return dy, [
        x, of(channels), of(channels), of(channels), of(channels).square() + 0.5,
        beside if residual else None,
        torch.from_numpy(rng.uniform(0.5, 2, (3, 1, *x.shape[2:])).astype("float32"))
        if weights else None,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("training", "weights", "residual"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_batch_norm_and_backward(layout, training, weights, residual, rng):
    dy, given = tensors(rng, LAYOUTS[layout], weights=weights, residual=residual)
    x = given[0]
    wanted = torch.ops.fusebn.batch_norm(*given, **options(training))
    found = _gpu.batch_norm(*given, **options(training))
    assert found[0].stride() == torch.empty_like(x).stride()
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    flows = [None, None] if not training else torch.from_numpy(
        rng.standard_normal((2, 32)).astype("float32")
    )  # fmt: skip
    backward = dy, *flows, wanted[3], *given
    wanted = torch.ops.fusebn.batch_norm_backward(*backward, **options(training))
    found = _gpu.batch_norm_backward(*backward, **options(training))
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_moments(axis, rng):
    x = torch.from_numpy(rng.standard_normal((40, 24)))
    weights = torch.from_numpy(rng.integers(0, 3, (1, 24) if axis == 0 else (40, 1)) * 1.0)
    for given in (None, weights):
        wanted = torch.ops.fusebn.moments(x, given, axes=[1 - axis])
        found = _gpu.moments(x, axis, given)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_moments_of_nothing():
    count, mean, m2 = _gpu.moments(torch.empty(0, 3), 1, None)
    assert (float(count), mean.tolist(), m2.tolist()) == (0, [0] * 3, [0] * 3)


def test_they_are_registered_and_wanted_on_request_alone(monkeypatch):
    for name in ("batch_norm", "batch_norm_backward", "moments"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusebn::{name}", "CUDA")
    assert _library is not None

    class OnADevice:
        is_cuda = True

    for asked, serves in ((None, False), ("0", False), ("1", True)):
        _gpu._is_wanted.cache_clear()
        monkeypatch.delenv("FUSEBN_TRITON", raising=False)
        if asked is not None:
            monkeypatch.setenv("FUSEBN_TRITON", asked)
        assert _gpu.serves(OnADevice()) is serves
    _gpu._is_wanted.cache_clear()
    assert not np.any(_gpu.serves(torch.zeros(1)))
