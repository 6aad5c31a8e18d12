"""fusebn's functions on JAX's arrays against the oracle: values, gradients, errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax_arrays import arrays, given, types_of

import cases
import fusebn
import fusebn.jax as fbj
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


def moving(rng: np.random.Generator, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return a moving mean and variance."""
    return (
        frozen(rng.standard_normal(channels), stat(dtype)),
        frozen(rng.uniform(0.5, 2, channels), stat(dtype)),
    )


def call(x: Array, *values: Any, **options: Any) -> tuple[Any, ...]:
    """Call fused_batch_norm on x as JAX's array; the others come as they are."""
    with types_of(x.dtype):
        return arrays(fusebn.fused_batch_norm(jnp.asarray(x), *values, **options))


# ---- forward ----


@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda shape: "x".join(map(str, shape.block)))
@pytest.mark.parametrize("is_training", [True, False])
def test_every_shape(
    rng: np.random.Generator, shape: cases.Shape, is_training: bool, dtype: np.dtype[Any]
) -> None:
    """The same bits as on NumPy's arrays: what lies in between moves them and no more."""
    x = cases.make("standard_normal", shape.block, dtype)
    scale, offset = parameters(rng, x.shape[1], dtype)
    mean, variance = moving(rng, x.shape[1], dtype)
    arguments = scale, offset, mean, variance, EPSILON
    result = call(x, *arguments, is_training=is_training, axis=1)
    want = fusebn.fused_batch_norm(x, *arguments, is_training=is_training, axis=1)
    for got, expected in zip(result, want, strict=True):
        assert_same_bits(got, expected)
    assert_forward(result, x, *arguments, is_training, axis=1)


@pytest.mark.parametrize("data", cases.DATA, ids=lambda data: data.name)
def test_every_kind_of_data(
    rng: np.random.Generator, data: cases.Data, dtype: np.dtype[Any]
) -> None:
    if dtype not in data.dtypes:
        return
    x = cases.make(data.name, (64, 6, 5), dtype)
    scale, offset = parameters(rng, 6, dtype)
    assert_forward(call(x, scale, offset, axis=1), x, scale, offset, axis=1)
    with types_of(dtype):
        assert_moments(arrays(fusebn.moments(jnp.asarray(x), (0, 2))), x, (0, 2))


# Of float32; XLA's own operations flush subnormal numbers to 0.
IN_FLOAT32 = [d for d in cases.DATA if cases.FLOAT32 in d.dtypes and d.name != "subnormal"]


@pytest.mark.parametrize("data", IN_FLOAT32, ids=lambda data: data.name)
def test_every_kind_of_data_in_the_composite(data: cases.Data) -> None:
    """It is as safe as the kernels, if not as exact: 1e-5 of the variance."""
    dtype = cases.FLOAT32
    x = cases.make(data.name, (64, 6, 5), dtype)
    with fbj.portable():
        y, mean, variance = call(x, None, None, axis=1)
    want = reference.fused_batch_norm(x, axis=1)
    std = np.sqrt(want.variance)
    spread = 1 + np.abs(want.y)
    assert_close(y, want.y, dtype=dtype, magnitude=spread, ulps=32)
    magnitude = std + np.abs(want.mean)
    assert_close(mean, want.mean, dtype=dtype, magnitude=magnitude, ulps=8)
    assert_close(variance, want.variance, dtype=dtype, magnitude=want.variance, ulps=84)
    assert not (variance < 0).any()


@pytest.mark.parametrize("data_format", cases.FORMATS)
def test_every_format(rng: np.random.Generator, data_format: str) -> None:
    x = frozen(rng.standard_normal(cases.FORMATS[data_format]), cases.FLOAT32)
    scale, offset = parameters(rng, 5, cases.FLOAT32)
    axis = 1 if data_format[1] == "C" else -1
    assert_forward(call(x, scale, offset, data_format=data_format), x, scale, offset, axis=axis)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_what_is_returned(rng: np.random.Generator, factor: float, correction: float) -> None:
    x = frozen(rng.standard_normal((3, 4)), cases.FLOAT32)
    mean, variance = moving(rng, 4, cases.FLOAT32)
    options: dict[str, Any] = {"exponential_avg_factor": factor, "correction": correction}
    result = call(x, None, None, mean, variance, axis=-1, **options)
    assert_forward(result, x, None, None, mean, variance, **options)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=lambda shape: shape.why)
def test_an_empty_batch(shape: cases.Shape, portable: bool) -> None:
    x = np.zeros(shape.block, cases.FLOAT32)
    old = np.full(x.shape[1], 2, cases.FLOAT32)

    def both() -> tuple[Any, Any]:
        mixed = call(x, None, None, old, old, exponential_avg_factor=0.1, axis=1)
        return call(x, None, None, axis=1), mixed

    if portable:
        with fbj.portable():
            (y, mean, variance), mixed = both()
    else:
        (y, mean, variance), mixed = both()
    assert y.shape == x.shape
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    assert_same_bits(mixed[1], old)
    assert_same_bits(mixed[2], old)


@pytest.mark.parametrize(
    ("portable", "hidden"), [(False, 1.0), (False, np.nan), (False, np.inf), (True, np.nan)]
)
def test_a_batch_without_weight(hidden: float, portable: bool) -> None:
    """Whatever x holds there: y is what the offset makes, and the moving statistics stay."""
    x = np.full((4, 3), hidden, cases.FLOAT32)
    offset, old = np.float32([-1, 0, 2]), np.float32([1, 2, 3])

    def step(x: Any, offset: Any) -> Any:
        return fusebn.fused_batch_norm(
            x, None, offset, old, old, axis=1, activation="relu", exponential_avg_factor=0.1,
            weights=jnp.zeros(4),
        )  # fmt: skip

    def gradients(x: Any, offset: Any) -> Any:
        return jax.jit(jax.grad(lambda *a: step(*a).y.sum(), (0, 1)))(x, offset)

    def both() -> tuple[Any, Any]:
        inputs = jnp.asarray(x), jnp.asarray(offset)
        return step(*inputs), gradients(*inputs)

    if portable:
        with fbj.portable():
            (y, mean, variance), (dx, doffset) = both()
    else:
        (y, mean, variance), (dx, doffset) = both()
    assert_same_bits(y, np.tile(np.maximum(offset, 0), (4, 1)))
    assert_same_bits(mean, old)
    assert_same_bits(variance, old)
    assert_same_bits(dx, np.zeros_like(x))
    if hidden == 1:  # else the activation saw a NaN on its way back
        assert_same_bits(doffset, np.float32([0, 0, 4]))


def test_the_weights_may_be_of_any_shape_that_broadcasts(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((4, 3, 2, 5)), cases.FLOAT32)
    for shape in [(4, 3, 2), (4, 1, 1), (4, 3, 2, 1), (4, 1, 1, 1), (3, 2), (2,), ()]:
        weights = frozen(rng.integers(0, 3, shape).astype(np.float32) + 0.5)
        full = weights[..., 0] if weights.ndim == 4 else weights
        assert_forward(call(x, None, None, weights=weights), x, None, None, weights=full)
    for integers in (rng.integers(0, 3, (4, 3, 2)), rng.integers(0, 2, (4, 3, 2)) > 0):
        assert_forward(call(x, None, None, weights=integers), x, None, None, weights=integers)


def test_numbers_and_lists_are_parameters() -> None:
    x = jnp.asarray([[1.0, 2.0], [3.0, 6.0]])
    y = fusebn.fused_batch_norm(x, [2.0, 1.0], [0, 1], [2, 4], [1.0, 4.0], 0.0, "NC", False).y
    assert y.tolist() == [[-2.0, 0.0], [2.0, 2.0]]


# ---- gradients ----


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_values_and_gradients(
    rng: np.random.Generator, is_training: bool, activation: str | None
) -> None:
    _check_values_and_gradients(rng, cases.FLOAT32, is_training, activation, "both")


@pytest.mark.parametrize("extras", ["plain", "residual", "weights", "both"])
def test_values_and_gradients_in_every_type(
    rng: np.random.Generator, dtype: np.dtype[Any], extras: str
) -> None:
    _check_values_and_gradients(rng, dtype, True, "relu", extras)


def _check_values_and_gradients(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    is_training: bool,
    activation: str | None,
    extras: str,
) -> None:
    """By jax.vjp and by the function that returns them: both are right."""
    x, dy, residual = (frozen(rng.standard_normal((6, 5, 7)), dtype) for _ in range(3))
    scale, offset = parameters(rng, 5, dtype)
    mean, variance = moving(rng, 5, dtype)
    options: dict[str, Any] = {"axis": 1, "activation": activation}
    if extras in ("weights", "both"):
        options["weights"] = frozen(rng.integers(0, 3, (6, 7)), stat(dtype))
    if extras in ("residual", "both"):
        options["residual"] = residual
    batch = reference.fused_batch_norm(
        x, mean=mean, variance=variance, is_training=is_training, axis=1,
        weights=options.get("weights"), correction=0,
    )  # fmt: skip
    used = [v.astype(stat(dtype)) for v in (batch.mean, batch.variance)]
    dy = away_from_kinks(dy, x, scale, offset, *used, axis=1, residual=options.get("residual"))

    def forward(x: Any, scale: Any, offset: Any, residual: Any = None) -> Any:
        arguments = {**options} if residual is None else {**options, "residual": residual}
        return fusebn.fused_batch_norm(
            x, scale, offset, mean, variance, EPSILON, is_training=is_training, **arguments
        )

    with types_of(dtype):
        sources = given(x, scale, offset, *([residual] if "residual" in options else []))

        @jax.jit
        def both(dy: Any, *sources: Any) -> Any:
            _, back, result = jax.vjp(lambda *a: ((r := forward(*a)).y, r), *sources, has_aux=True)
            return result, back(dy)

        result, found = both(jnp.asarray(dy), *sources)
        direct = fusebn.fused_batch_norm_grad(
            *given(dy, x, scale, offset, *used), is_training=is_training, **options
        )
        result, found, direct = arrays(result), arrays(found), arrays(direct)
    assert_forward(result, x, scale, offset, mean, variance, EPSILON, is_training, **options)
    exact = dy, x, scale, offset, batch.mean, batch.variance, EPSILON, is_training
    assert_gradients((*found, None)[:4], *exact, **options)
    assert_gradients(direct, dy, x, scale, offset, *used, EPSILON, is_training, **options)


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_gradients_through_the_returned_statistics(
    rng: np.random.Generator, dtype: np.dtype[Any], factor: float, correction: float
) -> None:
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    mean, variance = moving(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    with types_of(dtype):
        _, back = jax.vjp(
            lambda x, mean, variance: tuple(
                fusebn.fused_batch_norm(
                    x, None, None, mean, variance, axis=1, exponential_avg_factor=factor,
                    correction=correction,
                )
            ),
            *given(x, mean, variance),
        )  # fmt: skip
        dx, *into_given = arrays(back(given(dy, dmean, dvariance)))
    batch = reference.moments(x, 0)
    assert_gradients(
        (dx, None, None, None), dy, x, None, None, batch.mean[0], batch.variance()[0],
        dmean=factor * dmean.astype(np.longdouble),
        dvariance=factor * dvariance.astype(np.longdouble) * 9 / (9 - correction),
        axis=1,
    )  # fmt: skip
    for got, into in zip(into_given, (dmean, dvariance), strict=True):
        expected = (1 - factor) * into
        assert_close(got, expected, dtype=stat(dtype), magnitude=np.abs(into), ulps=1)


def test_gradients_of_the_given_statistics(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    """At inference y depends on them, and they are returned."""
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    scale, offset = parameters(rng, 4, dtype)
    mean, variance = moving(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    with types_of(dtype):
        _, back = jax.vjp(
            lambda mean, variance: tuple(
                fusebn.fused_batch_norm(
                    jnp.asarray(x), scale, offset, mean, variance, is_training=False, axis=1
                )
            ),
            *given(mean, variance),
        )
        found = arrays(back(given(dy, dmean, dvariance)))
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
        assert_close(got, want, dtype=stat(dtype), magnitude=magnitude, ulps=8)


# ---- statistics ----

AXES: list[Any] = [(), 0, 1, -1, (0, 2), (1, 2), (0, 1, 3), (0, 1, 2, 3), None]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [cases.BFLOAT16, cases.FLOAT32, cases.FLOAT64], ids=str)
def test_moments(rng: np.random.Generator, dtype: np.dtype[Any], axes: Any, weighted: bool) -> None:
    x = frozen(rng.standard_normal((3, 4, 2, 5)), dtype)
    reduced = tuple(range(4)) if axes is None else tuple(np.atleast_1d(axes).astype(int) % 4)
    weights = of = None
    if weighted:
        shape = [n if axis in reduced else 1 for axis, n in enumerate(x.shape)]
        weights = frozen(rng.integers(0, 3, shape) + 0.5, stat(dtype))
        of = weights.squeeze(tuple(axis for axis in range(4) if axis not in reduced))
    with types_of(dtype):
        result = arrays(fusebn.moments(jnp.asarray(x), axes, weights=of))
        kept = fusebn.moments(jnp.asarray(x), axes, weights=of, keepdims=True)
        assert kept[0].shape == tuple(1 if i in reduced else n for i, n in enumerate(x.shape))
    assert_moments(result, x, reduced, weights)


def test_moments_of_nothing() -> None:
    for options in ({}, {"weights": jnp.zeros(2)}):
        x = jnp.ones((2 if options else 0, 3))
        for value in fusebn.moments(x, 0, **options):
            assert jnp.isnan(value).all()


@pytest.mark.parametrize("axes", [1, (0, 2)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradients_of_moments(rng: np.random.Generator, axes: Any, weighted: bool) -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((3, 4, 2)))
        shape = [x.shape[axis] for axis in np.atleast_1d(axes)]
        inputs = (x, jnp.asarray(rng.uniform(0.5, 2, shape))) if weighted else (x,)
        both = jax.jit(lambda x, weights=None: fusebn.moments(x, axes, weights=weights))
        check_grads(both, inputs, order=1)


def test_the_gradient_of_a_variance_far_from_0() -> None:
    """Where float32 cannot hold the mean, the distance from it is still right."""
    x = 1e6 + jnp.float32([[0.0], [0.0625], [0.125], [0.5]])
    dx = jax.grad(lambda x: fusebn.moments(x, 0)[1].sum())(x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(dx, 2 / 4 * (wide - wide.mean()), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 1, 1), (3, 2), (4, 3, 2), (1,)], ids=str)
def test_weighted_moments(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x = frozen(rng.standard_normal((4, 3, 2)), cases.FLOAT32)
    weights = frozen(rng.integers(0, 3, shape), cases.FLOAT32)
    result = arrays(fusebn.weighted_moments(*given(x), (0, 1), weights))
    for got, want in zip(result, fusebn.weighted_moments(x, (0, 1), weights), strict=True):
        assert_close(got, want, dtype=cases.FLOAT32, magnitude=1 + np.abs(want), ulps=4)


@pytest.mark.parametrize("shift", [None, 3.0, "vector"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_sufficient_statistics(rng: np.random.Generator, shift: Any, keepdims: bool) -> None:
    x = frozen(rng.standard_normal((4, 3, 2)) + 3, cases.FLOAT32)
    if shift is not None:
        shift = np.asarray(rng.standard_normal(2) if shift == "vector" else shift, "f")
    (of,) = given(shift)
    count, *sums, kept = fusebn.sufficient_statistics(jnp.asarray(x), (0, 1), of, keepdims)
    want = fusebn.sufficient_statistics(x, (0, 1), shift, keepdims)
    assert kept is of
    assert_same_bits(count, want[0])
    for got, expected in zip(arrays(sums), want[1:3], strict=True):
        magnitude = np.abs(expected) + 1
        assert_close(got, expected, dtype=cases.FLOAT32, magnitude=magnitude, ulps=4)
    shape = sums[0].shape if keepdims else (2,)
    mean, variance = fusebn.normalize_moments(count, *sums, of)
    batch = reference.moments(x, (0, 1))
    for got, expected in ((mean, batch.mean), (variance, batch.variance())):
        expected = expected.reshape(shape)
        assert_close(got, expected, dtype=cases.FLOAT32, magnitude=20, ulps=4)


# ---- normalization by given statistics ----


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 5), (4, 1), (3, 1, 1), (4, 5), (3, 4, 5), (2, 3, 4, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [cases.FLOAT16, cases.FLOAT32], ids=str)
def test_batch_normalization(
    rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    """With parameters of any shape that broadcasts: at most one axis is a kernel's."""
    x = frozen(rng.standard_normal((3, 4, 5)), dtype)
    mean, offset, scale = (frozen(rng.standard_normal(shape), stat(dtype)) for _ in range(3))
    variance = frozen(rng.uniform(0.5, 2, shape), stat(dtype))
    for pair in ((offset, scale), (None, scale), (offset, None), (None, None)):
        y = fusebn.batch_normalization(*given(x, mean, variance, *pair), EPSILON)
        want = fusebn.batch_normalization(x, mean, variance, *pair, EPSILON)
        assert_close(y, want, dtype=dtype, magnitude=np.abs(want.astype("f")) + 8, ulps=4)
    y = fusebn.batch_norm_with_global_normalization(
        *given(x, mean, variance, offset, scale), EPSILON, False
    )
    want = fusebn.batch_normalization(x, mean, variance, offset, None, EPSILON)
    assert_close(y, want, dtype=dtype, magnitude=np.abs(want.astype("f")) + 8, ulps=4)


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_the_gradients_of_batch_normalization(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    with jax.enable_x64(True):
        mean, offset, scale = (rng.standard_normal(shape) for _ in range(3))
        variance = rng.uniform(0.5, 2, shape)
        inputs = given(rng.standard_normal((3, 4)), mean, variance, offset, scale)
        check_grads(jax.jit(lambda *a: fusebn.batch_normalization(*a, 0.1)), inputs, order=1)


# ---- moving averages ----


def test_assign_moving_average(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    """The new value is returned; an array of JAX cannot change."""
    start, value = (frozen(rng.standard_normal(4), dtype) for _ in range(2))
    numpys = start.copy()
    fusebn.assign_moving_average(numpys, value, 0.9)
    with types_of(dtype):
        old = jnp.asarray(start)
        new = np.asarray(fusebn.assign_moving_average(old, value, 0.9))
        traced = np.asarray(jax.jit(fusebn.assign_moving_average)(old, value, 0.9))
        assert_same_bits(old, start)
    for result in (new, traced):
        assert_close(result, numpys, dtype=dtype, magnitude=1 + np.abs(value), ulps=1)


# ---- bad input ----

X = np.ones((2, 3), np.float32)
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("fused_batch_norm", (X > 0, None, None), {"axis": 1}, TypeError, "`x` must be an array of"),
    ("fused_batch_norm", (X, None, None), {}, ValueError, "`x` must have 4 axes"),
    ("fused_batch_norm", (X, None, None), {"axis": 2}, ValueError, "`axis` must lie in"),
    (
        "fused_batch_norm", (X, X[:, 0], None), {"axis": 1}, ValueError,
        r"`scale` must have shape \(3,\)",
    ),
    (
        "fused_batch_norm", (X, "scale", None), {"axis": 1}, TypeError,
        "`scale` must be an array; got str",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "is_training": False}, ValueError,
        "`mean` must be given",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "is_training": X[0]}, TypeError,
        "`is_training` must be a bool, or a boolean",
    ),
    (
        "fused_batch_norm", (X, None, None), {"axis": 1, "residual": np.float16(X)}, TypeError,
        "`residual` must have the dtype of x, float32; got dtype float16",
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
        "fused_batch_norm", (X, None, None), {"axis": 1, "out": X}, TypeError,
        "`out` must be None: JAX's arrays cannot be written to",
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
        "weighted_moments", (X, 0, X[:, 0]), {}, ValueError,
        r"`frequency_weights` must broadcast to \(2, 3\), the shape of x",
    ),
    (
        "sufficient_statistics", (X, 0, X[:, 0]), {}, ValueError,
        r"`shift` must broadcast to \(1, 3\)",
    ),
    ("normalize_moments", (X, X, X[0], None), {}, ValueError, "`variance_ss` must have the shape"),
    ("batch_normalization", (X, None, X, X, X, 0), {}, TypeError, "`mean` must be an array"),
    (
        "batch_normalization", (X, X, X[:, 0], X, X, 0), {}, ValueError,
        r"`variance` must broadcast against x of shape \(2, 3\)",
    ),
    ("assign_moving_average", (X, X[0], 0.9), {}, ValueError, "`value` must have the shape of"),
    ("assign_moving_average", (X, X, 1.5), {}, ValueError, r"`decay` must lie in \[0, 1\]"),
    ("assign_moving_average", (X, X, 0.5, True), {}, ValueError, "`zero_debias` must be False"),
]  # fmt: skip


def _of_jax(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize(
    ("name", "arguments", "options", "kind", "message"), ERRORS, ids=lambda v: str(v)[:40]
)
def test_errors(
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    options = {key: _of_jax(value) for key, value in options.items()}
    with pytest.raises(kind, match=message):
        getattr(fusebn, name)(*map(_of_jax, arguments), **options)


def test_errors_come_when_a_program_is_traced() -> None:
    with pytest.raises(ValueError, match=r"`scale` must have shape \(3,\)"):
        jax.jit(lambda x: fusebn.fused_batch_norm(x, x[:, 0], None, axis=1)).trace(X)


VALUES: list[tuple[dict[str, Any], str]] = [
    ({"mean": X[0], "variance": -X[0], "is_training": False}, "`variance` must not be negative"),
    ({"weights": np.float32([1, -1])}, "`weights` must be finite and not negative; got -1"),
    ({"weights": np.float32([1, np.inf])}, "`weights` must be finite and not negative; got inf"),
]


@pytest.mark.parametrize(("options", "message"), VALUES, ids=lambda v: str(v)[:40])
def test_bad_values_are_found_when_it_runs(options: dict[str, Any], message: str) -> None:
    step = jax.jit(lambda x: fusebn.fused_batch_norm(x, None, None, axis=1, **options).y)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(step(X))


# ---- batch_norm ----


def test_batch_norm_is_the_same_in_another_order(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((4, 3, 2)), jnp.float32)
    scale, offset = parameters(rng, 3, cases.FLOAT32)
    mean, variance = moving(rng, 3, cases.FLOAT32)
    options: dict[str, Any] = {"exponential_avg_factor": 0.25, "activation": "silu", "axis": 1}
    for is_training in (True, False):
        options["is_training"] = is_training
        result = fbj.batch_norm(x, scale, offset, mean, variance, **options)
        want = fusebn.fused_batch_norm(x, scale, offset, mean, variance, **options)
        for got, expected in zip(result, want, strict=True):
            assert_same_bits(got, expected)


def test_groups_want_an_axis() -> None:
    with pytest.raises(ValueError, match="`axis_index_groups` must be None without `axis_name`"):
        fbj.batch_norm(jnp.ones((2, 3)), None, None, None, None, axis_index_groups=[[0]])


def test_parts_of_a_batch_are_one_batch(rng: np.random.Generator) -> None:
    """Of any weights; their gradients too."""
    x, dy = (rng.standard_normal((4, 5, 3)).astype("f") for _ in range(2))
    weights = rng.integers(0, 3, (4, 5)).astype("f")
    weights[1:3] = [[0] * 5, [3] * 5]
    scale, offset = parameters(rng, 3, cases.FLOAT32)

    def whole(x: Any, scale: Any, dy: Any, weights: Any, **options: Any) -> Any:
        def loss(x: Any, scale: Any) -> Any:
            result = fbj.batch_norm(
                x, scale, offset, None, None, activation="silu", weights=weights, **options
            )
            return (result.y * dy).sum(), result

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, scale)

    over_parts = jax.vmap(partial(whole, axis_name="parts"), (0, None, 0, 0), axis_name="parts")
    (_, parts), (dx, dscale) = jax.jit(over_parts)(x, scale, dy, weights)
    flat = [v.reshape(20, *v.shape[2:]) for v in (x, dy, weights)]
    (_, one), (one_dx, one_dscale) = jax.jit(whole)(flat[0], scale, *flat[1:])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(parts.y, one.y.reshape(x.shape))
    close(parts.mean, np.tile(one.mean, (4, 1)))
    close(parts.variance, np.tile(one.variance, (4, 1)))
    close(dx, one_dx.reshape(x.shape))
    close(dscale.sum(0), one_dscale)
