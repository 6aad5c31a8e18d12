"""`fusebn.torch.batch_norm` against `torch.nn.functional.batch_norm`: values, gradients, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusebn.torch as fbt
from devices import seeded
from fusebn.torch import _kernels

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "reversed axes": lambda x: (
        x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    ),
    "narrowed": lambda x: torch.cat([x, x])[: len(x)],
}


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Return a generator seeded by the test's own name."""
    return seeded(sum(request.node.name.encode()))


def normal(generator: torch.Generator, *shape: int, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def four(generator: torch.Generator, dtype: Any = torch.float64) -> list[Tensor]:
    """A running mean and variance, a weight and a bias."""
    return [
        normal(generator, 3, dtype=dtype),
        normal(generator, 3, dtype=dtype).square() + 0.5,
        normal(generator, 3, dtype=dtype) + 1,
        normal(generator, 3, dtype=dtype),
    ]


def assert_near(actual: Tensor, expected: Tensor, ulps: float = 64) -> None:
    """Assert that a result has the digits its dtype can have, beside terms of size 8."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    allowed = ulps * torch.finfo(actual.dtype).eps * (8 + expected.double().abs())
    assert bool((error <= allowed).all()), error.max()


# ---- values and gradients ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_pytorch(
    generator: torch.Generator, shape: Any, layout: str, training: bool, dtype: Any
) -> None:
    """In every layout, which y and the gradient have too."""
    stat = torch.float64 if dtype is torch.float64 else torch.float32
    x = normal(generator, *shape, dtype=torch.float32).to(dtype)
    dy = normal(generator, *shape, dtype=torch.float32).to(dtype)
    mean, var, weight, bias = four(generator, stat)
    ours = [LAYOUTS[layout](x).detach().requires_grad_(), weight.requires_grad_(), bias]
    theirs = [v.detach().double().requires_grad_(v.requires_grad) for v in (x, weight, bias)]
    theirs[0].requires_grad_()
    running = [mean.clone(), var.clone()], [mean.double(), var.double()]

    y = fbt.batch_norm(ours[0], *running[0], *ours[1:], training, 0.3, 1e-3)
    expected = F.batch_norm(theirs[0], *running[1], *theirs[1:], training, 0.3, 1e-3)
    assert y.dtype is dtype
    assert y.stride() == torch.empty_like(ours[0]).stride()
    assert_near(y, expected, 4)
    for got, want in zip(*running, strict=True):
        assert_near(got, want)
    grads = torch.autograd.grad(y, ours[:2], dy)
    wanted = torch.autograd.grad(expected, theirs[:2], dy.double())
    for got, want in zip(grads, wanted, strict=True):
        assert_near(got, want, 4)
    with torch.no_grad():
        again = fbt.batch_norm(ours[0], mean, var, *ours[1:], training, 0.3, 1e-3)
    assert torch.equal(again, y)


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_what_surrounds_it(
    generator: torch.Generator, parameters: str, activation: Any, added: bool, training: bool
) -> None:
    x, residual = (normal(generator, 4, 3, 5).requires_grad_() for _ in range(2))
    mean, var, weight, bias = (v.requires_grad_(i > 1) for i, v in enumerate(four(generator)))
    weight = weight if parameters in ("both", "weight") else None  # type: ignore[assignment]
    bias = bias if parameters in ("both", "bias") else None  # type: ignore[assignment]
    sources = [v for v in (x, weight, bias, residual if added else None) if v is not None]
    plain = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)
    expected = ACTIVATIONS[activation](plain + residual if added else plain)
    y = fbt.batch_norm(
        x, mean, var, weight, bias, training, residual=residual if added else None,
        activation=activation,
    )  # fmt: skip
    assert_near(y, expected)
    dy = normal(generator, 4, 3, 5)
    grads = (torch.autograd.grad(v, sources, dy) for v in (y, expected))
    for got, want in zip(*grads, strict=True):
        assert_near(got, want)


def test_half_parameters_and_half_statistics(generator: torch.Generator) -> None:
    """All in one half type, as PyTorch takes it; or the statistics in float32, as it does not."""
    for dtype in (torch.float16, torch.bfloat16):
        x = normal(generator, 50, 3, dtype=dtype)
        mean, var, weight, bias = four(generator, dtype)
        running = [v.clone() for v in (mean, var)], [v.float() for v in (mean, var)]
        half = fbt.batch_norm(x, *running[0], weight.requires_grad_(), bias, True)
        mixed = fbt.batch_norm(x, *running[1], weight, bias, True)
        assert torch.equal(half, mixed)
        for one, other in zip(*running, strict=True):
            assert torch.equal(one, other.to(dtype))
        (dweight,) = torch.autograd.grad(half.float().square().sum(), weight)
        assert dweight.dtype is dtype
        still = fbt.batch_norm(x, mean, var, weight, bias)
        assert_near(
            still, F.batch_norm(x.double(), *(v.double() for v in (mean, var, weight, bias))), 1
        )


def test_parameters_in_odd_places(generator: torch.Generator) -> None:
    """Not contiguous, expanded, of more axes."""
    x = normal(generator, 8, 3).float()
    mean, var, weight, bias = four(generator, torch.float32)
    expected = fbt.batch_norm(x, mean, var, weight, bias)
    table = torch.stack([mean, var, weight, bias], 1)
    assert torch.equal(fbt.batch_norm(x, *table.unbind(1)), expected)
    assert torch.equal(fbt.batch_norm(x, mean, var, weight[:, None], bias[None]), expected)
    ones = torch.ones(1).expand(3)
    assert torch.equal(fbt.batch_norm(x, mean, var, ones), fbt.batch_norm(x, mean, var))
    running = torch.stack([mean, var], 1)
    fbt.batch_norm(x, *running.unbind(1), training=True)
    fbt.batch_norm(x, mean, var, training=True)
    assert torch.equal(running, torch.stack([mean, var], 1))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_the_axis(generator: torch.Generator, axis: int) -> None:
    x = normal(generator, 3, 3, 3, 3)
    running = four(generator)[:2]
    ours = [v.clone() for v in running]
    y = fbt.batch_norm(x, *ours, training=True, axis=axis)
    expected = F.batch_norm(x.movedim(axis, 1), *running, training=True)
    assert_near(y.movedim(axis, 1), expected)
    assert_near(ours[1], running[1])


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_the_correction(generator: torch.Generator, correction: float) -> None:
    x = normal(generator, 8, 3)
    var = torch.ones(3, dtype=torch.float64)
    y = fbt.batch_norm(x, torch.zeros(3).double(), var, training=True, correction=correction)
    assert_near(var, 0.9 + 0.1 * x.var(0, correction=0) * 8 / (8 - correction))
    assert_near(y, F.batch_norm(x, None, None, training=True))


def test_the_weights(generator: torch.Generator) -> None:
    """Of 0 and 1 they leave positions out; a NaN left out is left out."""
    x, mean, var = normal(generator, 6, 3, 4), torch.zeros(3).double(), torch.ones(3).double()
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None]
    kept = x[weights[:, 0] > 0].clone().requires_grad_()
    ours, theirs = [mean.clone(), var.clone()], [mean, var]
    x[1] = torch.nan
    x.requires_grad_()
    y = fbt.batch_norm(x, *ours, training=True, weights=weights)
    expected = F.batch_norm(kept, *theirs, training=True)
    assert_near(y[weights[:, 0] > 0], expected)
    for got, want in zip(ours, theirs, strict=True):
        assert_near(got, want)
    dy = normal(generator, 4, 3, 4)
    (dx,) = torch.autograd.grad(y[weights[:, 0] > 0], x, dy)
    assert_near(dx[weights[:, 0] > 0], torch.autograd.grad(expected, kept, dy)[0])
    nothing = fbt.batch_norm(x.detach(), *ours, training=True, weights=0 * weights)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    for got, want in zip(ours, theirs, strict=True):
        assert_near(got, want)


@pytest.mark.parametrize("momentum", [0.1, 1, 1.0, 0])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
def test_an_empty_batch_leaves_what_is_running(shape: Any, momentum: float) -> None:
    running = torch.full((3,), 2.0), torch.full((3,), 3.0)
    x = torch.ones(shape, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    y = fbt.batch_norm(x, *running, weight, training=True, momentum=momentum)
    assert y.shape == shape
    assert running[0].tolist() == [2, 2, 2]
    assert running[1].tolist() == [3, 3, 3]
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0, 0]


def test_a_residual_of_another_type(generator: torch.Generator) -> None:
    """The sum has the type PyTorch gives it: under autocast a residual may be float32."""
    x, residual = normal(generator, 6, 3).bfloat16(), normal(generator, 6, 3).float()
    y = fbt.batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    assert y.dtype is torch.float32
    plain = fbt.batch_norm(x, None, None, training=True)
    assert torch.equal(y, F.relu(plain + residual))


def test_autocast(generator: torch.Generator) -> None:
    x, running = normal(generator, 8, 3).float(), [torch.zeros(3), torch.ones(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = F.linear(x, torch.eye(3))
        y = fbt.batch_norm(hidden, *running, training=True)
        expected = F.batch_norm(hidden, torch.zeros(3), torch.ones(3), training=True)
    assert hidden.dtype is y.dtype is expected.dtype is torch.bfloat16
    assert_near(y, expected, 2)
    assert running[0].dtype is torch.float32


def test_the_statistics_are_not_part_of_the_graph(generator: torch.Generator) -> None:
    """A second call before the first's backward changes nothing for it."""
    x = normal(generator, 8, 3).requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for training in (True, False):
        before = mean.clone(), var.clone()
        y = fbt.batch_norm(x, mean, var, training=training)
        fbt.batch_norm(3 * x + 1, mean, var, training=True)
        expected = F.batch_norm(x, *before, training=training)
        grads = (torch.autograd.grad(v.sin().sum(), x) for v in (y, expected))
        assert_near(next(grads)[0], next(grads)[0])
    assert not mean.requires_grad


class Named(Tensor):
    """A tensor that is not plain."""


def test_every_way_gives_the_same(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass, and a PyTorch that tells nothing of its tensors to C, take the longer way."""
    x = normal(generator, 6, 3).float()
    running = [[torch.zeros(3), torch.ones(3)] for _ in range(3)]
    plain = fbt.batch_norm(x, *running[0], training=True, activation="relu")
    named = fbt.batch_norm(x.as_subclass(Named), *running[1], training=True, activation="relu")
    assert type(named) is Named
    monkeypatch.setattr(_kernels, "_EXCHANGE_API", None)
    older = fbt.batch_norm(x, *running[2], training=True, activation="relu")
    for other, statistics in ((named.as_subclass(Tensor), running[1]), (older, running[2])):
        assert torch.equal(other, plain)
        assert torch.equal(statistics[0], running[0][0])
        assert torch.equal(statistics[1], running[0][1])


# ---- bad input ----

X, M, V = torch.ones(4, 3, 5), torch.zeros(3), torch.ones(3)
# What PyTorch refuses too: with the same type and, up to where ours goes on, the same text.
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no statistics": ((X, None, None), {}),
    "no variance": ((X, M, None), {}),
    "mean alone": ((X, M, None), {"training": True}),
    "variance alone": ((X, None, V), {"training": True}),
    "long mean": ((X, torch.zeros(4), V), {}),
    "long variance": ((X, M, torch.zeros(4)), {}),
    "long weight": ((X, M, V, torch.zeros(4)), {}),
    "short bias": ((X, M, V, None, torch.zeros(2)), {}),
    "one value": ((torch.ones(1, 3), M, V), {"training": True}),
    "one pixel": ((torch.ones(1, 3, 1, 1), M, V), {"training": True}),
    "eps 0": ((X, M, V), {"training": True, "eps": 0.0}),
    "eps below 0": ((X, M, V), {"eps": -1.0}),
    "no momentum": ((X, M, V), {"momentum": None}),
    "training is no bool": ((X, M, V), {"training": 1}),
    "an array": ((np.ones((4, 3)), M, V), {}),
    "a list": ((X, M, V, [1, 1, 1]), {}),
    "integers": ((X.long(), M, V), {}),
    "a wide weight": ((X, M, V, V.double()), {}),
    "a half weight": ((X, M, V, V.half()), {}),
    "another half": ((X.half(), M, V, V.bfloat16()), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pytorchs_errors(name: str) -> None:
    arguments, options = REFUSED[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.batch_norm(*arguments, **options)
    with pytest.raises(Exception) as ours:  # noqa: PT011
        fbt.batch_norm(*arguments, **options)
    assert ours.type is theirs.type
    expected = str(theirs.value).replace("numpy.ndarray", "ndarray")
    assert str(ours.value).startswith(expected)
    assert M.tolist() == [0, 0, 0]


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"axis": 3}, ValueError, r"`axis` must lie in \[-3, 3\); got 3"),
    ({"axis": 1.0}, TypeError, "`axis` must be an integer; got 1.0"),
    ({"activation": "tanh"}, ValueError, "`activation` must be one of .*; got 'tanh'"),
    ({"activation": ["relu"]}, TypeError, "`activation` must be one of"),
    ({"activation": F.relu}, TypeError, "Apply any other function to y yourself"),
    ({"correction": -1}, ValueError, "`correction` must be finite and not negative"),
    ({"correction": "1"}, TypeError, "`correction` must be a real number"),
    ({"residual": X[0]}, ValueError, r"`residual` must have the shape of input, \(4, 3, 5\)"),
    ({"residual": 1.0}, TypeError, "`residual` must be a tensor; got float"),
    ({"weights": torch.ones(3)}, ValueError, r"`weights` must broadcast to \(4, 5\)"),
    pytest.param(
        {"weights": -torch.ones(5)},
        ValueError,
        "`weights` must be finite and not negative; got -1",
        marks=pytest.mark.of_the_cpu,  # elsewhere that would have to be waited for
    ),
    ({"weights": "ones"}, TypeError, "`weights` must be a tensor; got str"),
]


@pytest.mark.parametrize(("options", "kind", "message"), ERRORS)
def test_our_errors(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fbt.batch_norm(X, M, V, training=True, **options)
    assert M.tolist() == [0, 0, 0]


@pytest.mark.of_the_cpu  # elsewhere that would have to be waited for
def test_a_negative_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="`variance` must not be negative; got -1"):
        fbt.batch_norm(X, M, -V)


def test_statistics_that_want_a_gradient() -> None:
    """In training they are written to, which autograd cannot follow. In evaluation it can."""
    mean = M.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"not differentiable with respect to .*'running_mean'"):
        fbt.batch_norm(X, mean, V, training=True)
    (dmean,) = torch.autograd.grad(fbt.batch_norm(X, mean, V, eps=0.0).sum(), mean)
    assert dmean.tolist() == [-20, -20, -20]


# ---- other devices ----


def meta(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to("meta") for tensor in tensors]


def test_another_device() -> None:
    x, mean, var = meta(X, M, V)
    y = fbt.batch_norm(x, mean, var, training=True, residual=x, activation="relu")
    assert y.device.type == "meta"
    assert y.shape == X.shape
    assert fbt.batch_norm(x.movedim(1, 2), mean, var, axis=2).shape == (4, 5, 3)
    with pytest.raises(NotImplementedError, match="`weights` must be None but on a CPU"):
        fbt.batch_norm(x, mean, var, training=True, weights=torch.ones(5, device="meta"))
    with pytest.raises(RuntimeError, match="not on the expected device meta"):
        fbt.batch_norm(x, M, V)
    with pytest.raises(RuntimeError, match="not on the expected device cpu"):
        fbt.batch_norm(X, mean, var)
