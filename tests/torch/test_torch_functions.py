"""fusebn's functions on tensors against the oracle: values, gradients, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensors import array, arrays, tensor

import cases
import fusebn
from conftest import (
    Array,
    assert_close,
    assert_forward,
    assert_gradients,
    assert_moments,
    assert_same_bits,
    away_from_kinks,
    frozen,
    parameters,
    stat,
)
from fusebn import _reference as reference

EPSILON = 1e-3


def given(rng: np.random.Generator, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """A moving mean and variance."""
    return (
        frozen(rng.standard_normal(channels), stat(dtype)),
        frozen(rng.uniform(0.5, 2, channels), stat(dtype)),
    )


def call(*values: Any, **options: Any) -> Any:
    """Call fused_batch_norm on the arrays as tensors."""
    for name in ("residual", "weights"):
        if options.get(name) is not None:
            options[name] = tensor(options[name])
    return fusebn.fused_batch_norm(
        *(None if value is None else tensor(value) for value in values[:5]), *values[5:], **options
    )


# ---- forward ----


@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda shape: "x".join(map(str, shape.block)))
@pytest.mark.parametrize("is_training", [True, False])
def test_every_shape(
    rng: np.random.Generator, shape: cases.Shape, is_training: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", shape.block, dtype)
    scale, offset = parameters(rng, x.shape[1], dtype)
    mean, variance = given(rng, x.shape[1], dtype)
    result = call(x, scale, offset, mean, variance, is_training=is_training, axis=1)
    assert_forward(arrays(result), x, scale, offset, mean, variance, 1e-3, is_training, axis=1)


@pytest.mark.parametrize("data", cases.DATA, ids=lambda data: data.name)
def test_every_kind_of_data(
    rng: np.random.Generator, data: cases.Data, dtype: np.dtype[Any]
) -> None:
    if dtype not in data.dtypes:
        return
    x = cases.make(data.name, (64, 6, 5), dtype)
    scale, offset = parameters(rng, 6, dtype)
    result = call(x, scale, offset, axis=1)
    assert_forward(arrays(result), x, scale, offset, axis=1)
    assert_moments(arrays(fusebn.moments(tensor(x), (0, 2))), x, (0, 2))


@pytest.mark.parametrize("data_format", cases.FORMATS)
def test_every_format(rng: np.random.Generator, data_format: str) -> None:
    x = frozen(rng.standard_normal(cases.FORMATS[data_format]), cases.FLOAT32)
    scale, offset = parameters(rng, 5, cases.FLOAT32)
    axis = 1 if data_format[1] == "C" else -1
    result = call(x, scale, offset, data_format=data_format)
    assert_forward(arrays(result), x, scale, offset, axis=axis)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_what_is_returned(rng: np.random.Generator, factor: float, correction: float) -> None:
    x = frozen(rng.standard_normal((3, 4)), cases.FLOAT32)
    mean, variance = given(rng, 4, cases.FLOAT32)
    options: dict[str, Any] = {"exponential_avg_factor": factor, "correction": correction}
    result = call(x, None, None, mean, variance, axis=-1, **options)
    assert_forward(arrays(result), x, None, None, mean, variance, **options)


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=lambda shape: shape.why)
def test_an_empty_batch(shape: cases.Shape, dtype: np.dtype[Any]) -> None:
    x = np.zeros(shape.block, dtype)
    y, mean, variance = arrays(call(x, None, None, axis=1))
    assert y.shape == x.shape
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    old = np.full(x.shape[1], 2, stat(dtype))
    result = call(x, None, None, old, old, exponential_avg_factor=0.1, axis=1)
    assert_same_bits(array(result.mean), old)
    assert_same_bits(array(result.variance), old)


def test_one_element_a_channel(dtype: np.dtype[Any]) -> None:
    x, offset = np.full((1, 3), 7, dtype), frozen([-1, 0, 2], stat(dtype))
    y, mean, variance = arrays(call(x, None, offset, axis=1, activation="relu"))
    assert_same_bits(y, np.array([[0, 0, 2]], dtype))
    assert_same_bits(mean, np.full(3, 7, stat(dtype)))
    assert_same_bits(variance, np.zeros(3, stat(dtype)))


def test_the_weights_may_be_of_any_shape_that_broadcasts(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((4, 3, 2, 5)), cases.FLOAT32)
    for shape in [(4, 3, 2), (4, 1, 1), (4, 3, 2, 1), (4, 1, 1, 1), (3, 2), (2,), ()]:
        weights = frozen(rng.integers(0, 3, shape).astype(np.float32) + 0.5)
        result = call(x, None, None, weights=weights)
        full = weights[..., 0] if weights.ndim == 4 else weights
        assert_forward(arrays(result), x, None, None, weights=full)
    weights = frozen(rng.integers(0, 3, (4, 3, 2)))  # integers
    assert_forward(arrays(call(x, None, None, weights=weights)), x, None, None, weights=weights)


def test_out_is_written(rng: np.random.Generator) -> None:
    x = tensor(rng.standard_normal((4, 3)))
    out = torch.full_like(x, torch.nan)
    expected = fusebn.fused_batch_norm(x, None, None, axis=1).y
    assert fusebn.fused_batch_norm(x, None, None, axis=1, out=out).y is out
    assert torch.equal(out, expected)
    assert fusebn.fused_batch_norm(x, None, None, axis=1, out=x).y is x
    assert torch.equal(x, expected)


# ---- gradients ----


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("extras", ["plain", "residual", "weights", "both"])
def test_values_and_gradients(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    is_training: bool,
    activation: str | None,
    extras: str,
) -> None:
    """By autograd and by the function that returns them: both are right, and the same."""
    shape = (6, 5, 7)
    x, dy, residual = (frozen(rng.standard_normal(shape), dtype) for _ in range(3))
    scale, offset = parameters(rng, 5, dtype)
    mean, variance = given(rng, 5, dtype)
    options: dict[str, Any] = {"axis": 1, "activation": activation}
    if extras in ("weights", "both"):
        options["weights"] = frozen(rng.integers(0, 3, (6, 7)), stat(dtype))
    if extras in ("residual", "both"):
        options["residual"] = residual
    batch = reference.fused_batch_norm(
        x, mean=mean, variance=variance, is_training=is_training, axis=1,
        weights=options.get("weights"), correction=0,
    )  # fmt: skip
    used = batch.mean, batch.variance
    dy = away_from_kinks(dy, x, scale, offset, *used, axis=1, residual=options.get("residual"))
    expected = dy, x, scale, offset, *used, EPSILON, is_training

    sources = [tensor(v, needs_gradient=True) for v in (x, scale, offset)]
    arguments = {k: tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    if "residual" in options:
        sources.append(arguments["residual"].requires_grad_())
    result = fusebn.fused_batch_norm(
        *sources[:3], tensor(mean), tensor(variance), is_training=is_training, **arguments
    )
    assert_forward(
        arrays(result), x, scale, offset, mean, variance, EPSILON, is_training, **options
    )
    found = torch.autograd.grad(result.y, sources, tensor(dy))
    assert_gradients((*arrays(found), None)[:4], *expected, **options)

    found = fusebn.fused_batch_norm_grad(
        tensor(dy), *sources[:3], *(tensor(v.astype("d")) for v in used),
        is_training=is_training, **arguments,
    )  # fmt: skip
    assert_gradients(arrays(found), *expected, **options)


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_gradients_through_the_returned_statistics(
    rng: np.random.Generator, dtype: np.dtype[Any], factor: float, correction: float
) -> None:
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    mean, variance = given(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    sources = [tensor(v, needs_gradient=True) for v in (x, mean, variance)]
    result = fusebn.fused_batch_norm(
        sources[0], None, None, *sources[1:], axis=1, exponential_avg_factor=factor,
        correction=correction,
    )  # fmt: skip
    dx, *into_given = torch.autograd.grad(
        list(result), sources, [tensor(v) for v in (dy, dmean, dvariance)],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    batch = reference.moments(x, 0)
    assert_gradients(
        (array(dx), None, None, None), dy, x, None, None, batch.mean[0], batch.variance()[0],
        dmean=factor * dmean.astype(np.longdouble),
        dvariance=factor * dvariance.astype(np.longdouble) * 9 / (9 - correction),
        axis=1,
    )  # fmt: skip
    for got, into in zip(into_given, (dmean, dvariance), strict=True):
        expected = (1 - factor) * into
        assert_close(array(got), expected, dtype=stat(dtype), magnitude=np.abs(into), ulps=1)


def test_gradients_of_the_given_statistics(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    """At inference y depends on them, and they are returned."""
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    scale, offset = parameters(rng, 4, dtype)
    mean, variance = given(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    sources = [tensor(v, needs_gradient=True) for v in (mean, variance)]
    result = fusebn.fused_batch_norm(
        tensor(x), tensor(scale), tensor(offset), *sources, is_training=False, axis=1
    )
    found = torch.autograd.grad(list(result), sources, [tensor(v) for v in (dy, dmean, dvariance)])
    g, rstd = reference.wide(dy), reference.rstd(variance, EPSILON)
    centred = reference.wide(x) - reference.wide(mean)
    slope = reference.wide(scale) * rstd
    into_mean = dmean - slope * g.sum(0)
    into_variance = dvariance - slope * rstd**2 / 2 * (g * centred).sum(0)
    for got, want, terms in (
        (found[0], into_mean, np.abs(g).sum(0)),
        (found[1], into_variance, rstd**2 * np.abs(g * centred).sum(0)),
    ):
        magnitude = np.abs(slope) * terms + 1
        assert_close(array(got), want, dtype=stat(dtype), magnitude=magnitude, ulps=8)


# ---- statistics ----

AXES: list[Any] = [(), 0, 1, -1, (0, 2), (1, 2), (0, 1, 3), (0, 1, 2, 3), None]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_moments(rng: np.random.Generator, dtype: np.dtype[Any], axes: Any, weighted: bool) -> None:
    x = frozen(rng.standard_normal((3, 4, 2, 5)), dtype)
    reduced = tuple(range(4)) if axes is None else tuple(np.atleast_1d(axes).astype(int) % 4)
    weights = of = None
    if weighted:
        shape = [n if axis in reduced else 1 for axis, n in enumerate(x.shape)]
        weights = frozen(rng.integers(0, 3, shape) + 0.5, stat(dtype))
        of = tensor(weights).squeeze([axis for axis in range(4) if axis not in reduced])
    for memory in (tensor(x), tensor(x.transpose(0, 3, 1, 2)).permute(0, 2, 3, 1)):
        result = fusebn.moments(memory, axes, weights=of)
        assert_moments(arrays(result), x, reduced, weights)
        kept = fusebn.moments(memory, axes, weights=of, keepdims=True)
        assert kept[0].shape == tuple(1 if i in reduced else n for i, n in enumerate(x.shape))


def test_moments_of_nothing() -> None:
    mean, variance = fusebn.moments(torch.ones(0, 3), 0)
    assert mean.isnan().all()
    assert variance.isnan().all()
    mean, variance = fusebn.moments(torch.ones(2, 3), 0, weights=torch.zeros(2))
    assert mean.isnan().all()
    assert variance.isnan().all()


@pytest.mark.parametrize("axes", [0, (0, 2), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradients_of_moments(rng: np.random.Generator, axes: Any, weighted: bool) -> None:
    x = tensor(rng.standard_normal((3, 4, 2)), needs_gradient=True)
    shape = [x.shape[axis] for axis in np.atleast_1d(axes)]
    weights = tensor(rng.uniform(0.5, 2, shape), needs_gradient=True) if weighted else None
    inputs = (x, weights) if weighted else (x,)

    def both(x: Any, weights: Any = None) -> Any:
        return fusebn.moments(x, axes, weights=weights)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_the_gradient_of_a_variance_far_from_0() -> None:
    """Where float32 cannot hold the mean, the distance from it is still right."""
    x = 1e6 + torch.tensor([[0.0], [0.0625], [0.125], [0.5]])
    _, variance = fusebn.moments(x.requires_grad_(), 0)
    (dx,) = torch.autograd.grad(variance.sum(), x)
    wide = x.detach().double()
    torch.testing.assert_close(dx, (2 / 4 * (wide - wide.mean())).float())


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 1, 1), (3, 2), (4, 3, 2), (1,)], ids=str)
def test_weighted_moments(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x = frozen(rng.standard_normal((4, 3, 2)), cases.FLOAT32)
    weights = frozen(rng.integers(0, 3, shape), cases.FLOAT32)
    result = fusebn.weighted_moments(tensor(x), (0, 1), tensor(weights))
    for mean, want in zip(arrays(result), fusebn.weighted_moments(x, (0, 1), weights), strict=True):
        assert_close(mean, want, dtype=cases.FLOAT32, magnitude=1 + np.abs(want), ulps=4)


@pytest.mark.parametrize("shift", [None, 3.0, "vector"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_sufficient_statistics(rng: np.random.Generator, shift: Any, keepdims: bool) -> None:
    x = frozen(rng.standard_normal((4, 3, 2)) + 3, cases.FLOAT32)
    if shift is not None:
        shift = np.asarray(rng.standard_normal(2) if shift == "vector" else shift, "f")
    of = None if shift is None else tensor(shift)
    count, *sums, kept = fusebn.sufficient_statistics(tensor(x), (0, 1), of, keepdims)
    want = fusebn.sufficient_statistics(x, (0, 1), shift, keepdims)
    assert kept is of
    assert_same_bits(array(count), want[0])
    for got, expected in zip(sums, want[1:3], strict=True):
        magnitude = np.abs(expected) + 1
        assert_close(array(got), expected, dtype=cases.FLOAT32, magnitude=magnitude, ulps=4)
    shape = sums[0].shape if keepdims else (2,)
    mean, variance = fusebn.normalize_moments(count, *sums, of)
    batch = reference.moments(x, (0, 1))
    for got, expected in ((mean, batch.mean), (variance, batch.variance())):
        expected = expected.reshape(shape)
        assert_close(array(got), expected, dtype=cases.FLOAT32, magnitude=20, ulps=4)


# ---- normalization by given statistics ----


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 5), (4, 1), (3, 1, 1), (4, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str
)
def test_batch_normalization(
    rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    """With parameters of any shape that broadcasts: at most one axis is a kernel's."""
    x = frozen(rng.standard_normal((3, 4, 5)), dtype)
    mean, offset, scale = (frozen(rng.standard_normal(shape), stat(dtype)) for _ in range(3))
    variance = frozen(rng.uniform(0.5, 2, shape), stat(dtype))
    for one, other in ((offset, scale), (None, scale), (offset, None), (None, None)):
        of = [None if v is None else tensor(v) for v in (one, other)]
        y = fusebn.batch_normalization(tensor(x), tensor(mean), tensor(variance), *of, EPSILON)
        want = fusebn.batch_normalization(x, mean, variance, one, other, EPSILON)
        assert_close(array(y), want, dtype=dtype, magnitude=np.abs(want.astype("f")) + 8, ulps=4)
    y = fusebn.batch_norm_with_global_normalization(
        tensor(x), tensor(mean), tensor(variance), tensor(offset), tensor(scale), EPSILON, False
    )
    want = fusebn.batch_normalization(x, mean, variance, offset, None, EPSILON)
    assert_close(array(y), want, dtype=dtype, magnitude=np.abs(want.astype("f")) + 8, ulps=4)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (3, 4)], ids=str)
def test_the_gradients_of_batch_normalization(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    x = tensor(rng.standard_normal((3, 4)), needs_gradient=True)
    mean, offset, scale = (tensor(rng.standard_normal(shape), needs_gradient=True) for _ in "123")
    variance = tensor(rng.uniform(0.5, 2, shape), needs_gradient=True)
    inputs = (x, mean, variance, offset, scale)
    assert torch.autograd.gradcheck(lambda *a: fusebn.batch_normalization(*a, 0.1), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: fusebn.batch_normalization(*a, 0.1), inputs)


# ---- moving averages ----


@pytest.mark.parametrize("zero_debias", [False, True])
def test_assign_moving_average(
    rng: np.random.Generator, dtype: np.dtype[Any], zero_debias: bool
) -> None:
    start = frozen(rng.standard_normal(4), dtype)
    ours, numpys = tensor(start, needs_gradient=True), start.copy()
    for _ in range(3):
        value = frozen(rng.standard_normal(4), dtype)
        assert fusebn.assign_moving_average(ours, tensor(value), 0.9, zero_debias) is ours
        fusebn.assign_moving_average(numpys, value, 0.9, zero_debias)
        assert_close(array(ours), numpys, dtype=dtype, magnitude=1 + np.abs(value), ulps=1)


# ---- bad input ----

X = torch.ones(2, 3)
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("fused_batch_norm", (X.long(), None, None), {"axis": 1}, TypeError, "`x` must be an array of"),
    ("fused_batch_norm", (X, None, None), {}, ValueError, "`x` must have 4 axes"),
    ("fused_batch_norm", (X, None, None), {"axis": 2}, ValueError, "`axis` must lie in"),
    (
        "fused_batch_norm", (X, torch.ones(2), None), {"axis": 1}, ValueError,
        r"`scale` must have shape \(3,\)",
    ),
    (
        "fused_batch_norm", (X, "scale", None), {"axis": 1}, TypeError,
        "`scale` must be a tensor; got str",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "is_training": False}, ValueError,
        "`mean` must be given",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "residual": X.double()}, TypeError,
        "`residual` must have the dtype of x, float32; got dtype float64",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "residual": X[:1]}, ValueError,
        r"`residual` must have the shape of x, \(2, 3\); got shape \(1, 3\)",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "weights": X}, ValueError,
        r"`weights` must broadcast to \(2,\), one weight for each position",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "activation": "tanh"}, ValueError,
        "`activation` must be one of",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "out": X.half()}, TypeError,
        "`out` must have the dtype of x",
    ),
    (
        "fused_batch_norm_grad", (X, X, None, None, None, X[0]), {"axis": 1}, ValueError,
        "`mean` must be given",
    ),
    (
        "fused_batch_norm_grad", (X, X, None, None, X[0], X[0]),
        {"axis": 1, "is_training": False, "dmean": X[0]}, ValueError, "`dmean` must be None",
    ),
    ("moments", (X, 2), {}, ValueError, "`axes` must lie in"),
    ("moments", (X, 0), {"weights": X[0]}, ValueError, r"`weights` must broadcast to \(2,\)"),
    (
        "weighted_moments", (X, 0, torch.ones(2)), {}, ValueError,
        r"`frequency_weights` must broadcast to \(2, 3\), the shape of x",
    ),
    (
        "sufficient_statistics", (X, 0, torch.ones(2)), {}, ValueError,
        r"`shift` must broadcast to \(1, 3\)",
    ),
    ("normalize_moments", (-X, X, X, None), {}, ValueError, "`counts` must not be negative"),
    ("normalize_moments", (X, X, X[0], None), {}, ValueError, "`variance_ss` must have the shape"),
    ("batch_normalization", (X, None, X, X, X, 0), {}, TypeError, "`mean` must be a tensor"),
    (
        "batch_normalization", (X, X, torch.ones(2), X, X, 0), {}, ValueError,
        r"`variance` must broadcast against x of shape \(2, 3\)",
    ),
    ("assign_moving_average", (X, X[0], 0.9), {}, ValueError, "`value` must have the shape of"),
    ("assign_moving_average", (X, X, 1.5), {}, ValueError, r"`decay` must lie in \[0, 1\]"),
    ("assign_moving_average", (X[0], X[0], 0.5, True), {}, ValueError, "`variable` must own its"),
    ("assign_moving_average", (X, X, 1, True), {}, ValueError, "`decay` must be below 1"),
]  # fmt: skip
# What only values tell: elsewhere than on a CPU it would have to be waited for.
ERRORS_OF_VALUES: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "weights": -X[:, 0]}, ValueError,
        "`weights` must be finite and not negative; got -1",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "weights": X[:, 0] / 0}, ValueError,
        "`weights` must be finite and not negative; got inf",
    ),
    (
        "fused_batch_norm", (X, None, None, X[0], -X[0]), {"axis": 1, "is_training": False},
        ValueError, "`variance` must not be negative; got -1",
    ),
    (
        "fused_batch_norm_grad", (X, X, None, None, X[0], -X[0]), {"axis": 1}, ValueError,
        "`variance` must not be negative; got -1",
    ),
    ("moments", (X, 0), {"weights": -X[:, 0]}, ValueError, "`weights` must be finite and not"),
]  # fmt: skip
OF_THE_CPU = [pytest.param(*case, marks=pytest.mark.of_the_cpu) for case in ERRORS_OF_VALUES]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "kind", "message"),
    [*ERRORS, *OF_THE_CPU],
    ids=lambda v: str(v)[:40],
)
def test_errors(
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        getattr(fusebn, name)(*arguments, **options)
    assert bool((X == 1).all())
