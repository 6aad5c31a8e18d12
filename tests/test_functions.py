"""The values of every public function, against the oracle and against hand arithmetic."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cases
import fusebn
from conftest import (
    ULPS,
    Array,
    assert_close,
    assert_forward,
    assert_moments,
    assert_same_bits,
    frozen,
    parameters,
    stat,
    unwritten,
)
from fusebn import _core
from fusebn import _reference as reference

SHAPE_IDS = ["x".join(map(str, shape.block)) for shape in cases.SHAPES]
DATA_DTYPES = [
    pytest.param(data.name, dtype, id=f"{data.name}-{dtype.name}")
    for data in cases.DATA
    for dtype in data.dtypes
]


# --- moments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [shape.block for shape in cases.SHAPES], ids=SHAPE_IDS)
def test_moments_of_every_shape(block: cases.Block, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", block, dtype)
    assert_moments(fusebn.moments(x, (0, 2)), x, (0, 2))


@pytest.mark.parametrize("block", [(301, 17, 1), (13, 5, 49), (7, 1, 9001)])
@pytest.mark.parametrize(("name", "dtype"), DATA_DTYPES)
def test_moments_of_every_kind_of_data(name: str, dtype: np.dtype[Any], block: cases.Block) -> None:
    x = cases.make(name, block, dtype)
    assert_moments(fusebn.moments(x, (0, 2)), x, (0, 2))


@pytest.mark.parametrize(
    "axes",
    [0, 1, 2, 3, -1, -4, (0, 1), [0, 2], (1, 3), (-1, 0), (0, 1, 2), (0, 2, 3), (1, 2, 3),
     (0, 1, 2, 3), range(1, 3), np.array([0, 3]), np.int64(2), (), None],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("keepdims", [False, True])
def test_moments_over_any_axes(axes: Any, keepdims: bool, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (3, 4, 30), dtype).reshape(3, 4, 5, 6)
    mean, variance = fusebn.moments(x, axes, keepdims=keepdims)
    reduced = tuple(range(4)) if axes is None else tuple(np.atleast_1d(np.array(axes, int)) % 4)
    if keepdims:
        expected = tuple(1 if i in reduced else n for i, n in enumerate(x.shape))
        assert mean.shape == variance.shape == expected
        mean, variance = mean.squeeze(reduced), variance.squeeze(reduced)
    assert_moments((mean, variance), x, reduced)


def test_moments_shapes_that_users_ask_about() -> None:
    x = np.random.default_rng(0).standard_normal((128, 32, 32, 64), dtype=np.float32)
    mean, variance = fusebn.moments(x, [0, 1, 2])
    assert mean.shape == variance.shape == (64,)
    # Of 131072 standard normal values: 6 standard errors of either statistic.
    assert np.abs(mean).max() < 6 / np.sqrt(131072)
    assert np.abs(variance - 1).max() < 6 * np.sqrt(2 / 131072)


def test_moments_by_hand(dtype: np.dtype[Any]) -> None:
    x = frozen([[1, 10, -3], [3, 10, 5], [8, 10, 1]], dtype)
    mean, variance = fusebn.moments(x, 0)
    assert mean.tolist() == [4, 10, 1]
    assert variance.tolist() == pytest.approx([26 / 3, 0, 32 / 3], rel=1e-6)
    assert variance[1] == 0


@pytest.mark.parametrize("block", [shape.block for shape in cases.SHAPES], ids=SHAPE_IDS)
def test_exact_data_has_exact_moments(block: cases.Block, dtype: np.dtype[Any]) -> None:
    x, mean, variance = cases.exact_pairs(block)
    actual = fusebn.moments(frozen(x, dtype), (0, 2))
    if block[0] * block[2] % 2 == 0:
        assert_same_bits(actual[0], mean.astype(stat(dtype)))
        # The sums of squares are integers below 2^24 quarters of a power of two.
        assert_same_bits(actual[1], variance.astype(stat(dtype)))
    else:
        assert_moments(actual, frozen(x, dtype), (0, 2))


@pytest.mark.parametrize("value", [542.37, -1e-3, 0.1, 1e6, 3e4, 65504.0])
@pytest.mark.parametrize("block", [(1000, 1, 1), (1, 1, 5000), (999, 17, 1), (7, 3, 333)])
def test_a_constant_has_no_variance(value: float, block: cases.Block, dtype: np.dtype[Any]) -> None:
    value = min(value, 65504.0)
    x = frozen(np.full(block, value), dtype)
    mean, variance = fusebn.moments(x, (0, 2))
    assert_same_bits(mean, x[0, :, 0].astype(stat(dtype)))
    assert_same_bits(variance, np.zeros(block[1], stat(dtype)))


def test_float16_variance_past_its_own_range() -> None:
    x = frozen([60000.0, -60000.0] * 50, cases.FLOAT16)
    x_mean, x_variance = fusebn.moments(x, 0)
    value = float(np.float16(60000.0))
    assert float(x_mean) == 0
    assert float(x_variance) == pytest.approx(value**2, rel=2e-7)  # an ulp or two of float32


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("block", [(4096, 3, 1), (64, 3, 64), (20_000, 1, 1)])
def test_variance_under_a_large_mean(ratio: float, block: cases.Block) -> None:
    rng = np.random.default_rng(7)
    x = frozen(ratio * (1 + rng.random(block[1]))[:, None] + rng.standard_normal(block), np.float32)
    _, variance = fusebn.moments(x, (0, 2))
    exact = reference.moments(x, (0, 2)).variance().squeeze()
    assert np.max(np.abs(variance - exact) / exact) < 1e-6
    # The formula that this rules out fails by more than a thousand times as much.
    squares = (x.astype(np.float32) ** 2).mean((0, 2), dtype=np.float32)
    naive = squares - x.mean((0, 2), dtype=np.float32) ** 2
    if ratio >= 1e4:
        assert np.max(np.abs(naive - exact) / exact) > 1e-3


@pytest.mark.parametrize("block", [(11, 5, 3), (200, 17, 1), (50, 1, 40)])
@pytest.mark.parametrize("kind", ["integers", "fractions", "mask", "mostly zero"])
def test_moments_with_weights(
    rng: np.random.Generator, block: cases.Block, kind: str, dtype: np.dtype[Any]
) -> None:
    outer, _, inner = block
    weights = {
        "integers": lambda: rng.integers(0, 5, (outer, inner)),
        "fractions": lambda: rng.random((outer, inner)).astype(stat(dtype)),
        "mask": lambda: rng.random((outer, inner)) < 0.5,
        "mostly zero": lambda: (np.arange(outer * inner) == 4).reshape(outer, inner) * 0.25,
    }[kind]()
    x = cases.make("standard_normal", block, dtype)
    actual = fusebn.moments(x, (0, 2), weights=frozen(weights))
    assert_moments(actual, x, (0, 2), np.expand_dims(weights, 1).astype(stat(dtype)))


def test_weights_count_repetitions(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (40, 7, 1), dtype)[:, :, 0]
    weights = rng.integers(0, 6, 40)
    actual = fusebn.moments(x, 0, weights=weights)
    assert_moments(actual, np.repeat(x, weights, axis=0), 0)


def test_weight_zero_ignores_whatever_is_there(dtype: np.dtype[Any]) -> None:
    x = np.array(cases.make("standard_normal", (30, 5, 1), dtype)[:, :, 0])
    weights = np.ones(30)
    clean = fusebn.moments(frozen(np.delete(x, [0, 7, 29], axis=0)), 0)
    for row, bad in ((0, np.nan), (7, np.inf), (29, -np.inf)):
        x[row], weights[row] = bad, 0
    mean, variance = fusebn.moments(frozen(x), 0, weights=weights)
    assert np.isfinite(mean).all()
    assert mean == pytest.approx(clean[0], rel=1e-5, abs=1e-6)
    assert variance == pytest.approx(clean[1], rel=1e-5)


@pytest.mark.parametrize("block", [shape.block for shape in cases.EMPTY_SHAPES])
def test_moments_of_nothing(block: cases.Block, dtype: np.dtype[Any]) -> None:
    x = np.zeros(block, dtype)
    mean, variance = fusebn.moments(x, (0, 2))
    assert mean.dtype == variance.dtype == stat(dtype)
    assert mean.shape == variance.shape == (block[1],)
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()


def test_moments_of_weight_zero_in_all(dtype: np.dtype[Any]) -> None:
    mean, variance = fusebn.moments(np.ones((4, 3), dtype), 0, weights=np.zeros(4))
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [(500, 17, 1), (5, 17, 100), (9, 1, 999)])
@pytest.mark.parametrize("place", [0, -1, 3])
def test_one_bad_value_loses_one_channel(
    bad: float, block: cases.Block, place: int, dtype: np.dtype[Any]
) -> None:
    x = np.array(cases.make("standard_normal", block, dtype))
    channel = block[1] // 2
    x[place, channel, -1] = bad
    mean, variance = fusebn.moments(frozen(x), (0, 2))
    lost = np.arange(block[1]) == channel
    assert np.array_equal(np.isnan(mean), lost)
    assert np.array_equal(np.isnan(variance), lost)
    assert_moments((mean, variance), x, (0, 2))


# --- the other statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("axes", [0, (0, 2), (1,), (0, 1, 2)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("weight_shape", [(6, 5, 4), (6, 1, 1), (6, 1, 4), (4,), (5, 1), ()])
def test_weighted_moments(
    rng: np.random.Generator, axes: Any, keepdims: bool, weight_shape: Any, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", (6, 5, 4), dtype)
    weights = frozen(rng.integers(1, 5, weight_shape) / 4, stat(dtype))
    mean, variance = fusebn.weighted_moments(x, axes, weights, keepdims=keepdims)
    expected = reference.moments(x, axes, weights)
    if keepdims:
        assert mean.shape == variance.shape == expected.mean.shape
        mean, variance = mean.squeeze(axes), variance.squeeze(axes)
    assert_moments((mean, variance), x, axes, weights)


def test_weighted_moments_by_hand() -> None:
    x = np.array([[1.0, 1.0], [5.0, 3.0]], np.float32)
    mean, variance = fusebn.weighted_moments(x, 0, np.array([[3.0, 1.0], [1.0, 0.0]]))
    assert mean.tolist() == [2, 1]
    assert variance.tolist() == [3, 0]
    x[1, 1] = np.nan
    assert fusebn.weighted_moments(x, 0, np.array([[3.0, 1.0], [1.0, 0.0]]))[0].tolist() == [2, 1]
    mean, variance = fusebn.weighted_moments(x, 0, np.array([[3.0, 0.0], [1.0, 0.0]]))
    assert mean[0] == 2
    assert np.isnan([mean[1], variance[1]]).all()


@pytest.mark.parametrize("axes", [0, (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_sufficient_statistics(
    axes: Any, keepdims: bool, shifted: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("negative_mean", (20, 3, 4), dtype)
    shift = frozen(-3e3, stat(dtype)) if shifted else None
    count, mean_ss, variance_ss, same = fusebn.sufficient_statistics(x, axes, shift, keepdims)
    distance = reference.wide(x) + (3000 if shifted else 0)
    # In float64 the mean has no wider type to be kept in, and errs by units of itself.
    rounded = np.abs(distance) + (3000 if dtype == cases.FLOAT64 else 0)
    for actual, terms, size in (
        (mean_ss, distance, rounded),
        (variance_ss, distance**2, rounded * np.abs(distance)),
    ):
        assert_close(
            actual,
            terms.sum(axes, keepdims=keepdims),
            dtype=stat(dtype),
            magnitude=size.sum(axes, keepdims=keepdims),
            ulps=8,
        )
    assert count == x.size / np.prod(mean_ss.shape)
    assert same is None if shift is None else same == shift
    mean, variance = fusebn.normalize_moments(count, mean_ss, variance_ss, same)
    assert mean.shape == mean_ss.shape
    if shifted:
        assert mean == pytest.approx(np.asarray(x, float).mean(axes, keepdims=keepdims), rel=1e-5)
        expected = np.asarray(x, float).var(axes, keepdims=keepdims)
        assert variance == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_sufficient_statistics_by_hand() -> None:
    x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    count, mean_ss, variance_ss, shift = fusebn.sufficient_statistics(x, [0], np.float32(1))
    assert (float(count), mean_ss.tolist(), variance_ss.tolist()) == (2, [2, 6], [4, 26])
    assert shift == 1
    mean, variance = fusebn.normalize_moments(count, mean_ss, variance_ss, shift)
    assert (mean.tolist(), variance.tolist()) == ([2, 4], [1, 4])
    assert mean.dtype == variance.dtype == np.float32
    mean, variance = fusebn.normalize_moments(
        np.float32(4), np.array([8.0]), np.array([16.0]), None
    )
    assert (mean.tolist(), variance.tolist()) == ([2], [0])


def test_normalize_moments_is_never_negative() -> None:
    # Rounded sums that no data has: 9.999 / 10 - 1 is below 0.
    _, variance = fusebn.normalize_moments(
        np.float32(10), np.array([10.0], np.float32), np.array([9.999], np.float32), None
    )
    assert variance.tolist() == [0]


# --- normalization ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [shape.block for shape in cases.SHAPES], ids=SHAPE_IDS)
@pytest.mark.parametrize("is_training", [True, False])
def test_fused_batch_norm_of_every_shape(
    rng: np.random.Generator, block: cases.Block, is_training: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", block, dtype)
    scale, offset = parameters(rng, block[1], dtype)
    given = {}
    if not is_training:
        mean, variance = rng.standard_normal(block[1]), rng.uniform(0.1, 3, block[1])
        given = {"mean": frozen(mean, stat(dtype)), "variance": frozen(variance, stat(dtype))}
    actual = fusebn.fused_batch_norm(
        x, scale, offset, **given, is_training=is_training, axis=1, out=(y := unwritten(x))
    )
    assert actual.y is y
    assert_forward(actual, x, scale, offset, **given, is_training=is_training, axis=1)


@pytest.mark.parametrize("block", [(301, 17, 1), (13, 5, 49)])
@pytest.mark.parametrize(("name", "dtype"), DATA_DTYPES)
def test_fused_batch_norm_of_every_kind_of_data(
    rng: np.random.Generator, name: str, dtype: np.dtype[Any], block: cases.Block
) -> None:
    x = cases.make(name, block, dtype)
    scale, offset = parameters(rng, block[1], dtype)
    actual = fusebn.fused_batch_norm(x, scale, offset, axis=1)
    assert_forward(actual, x, scale, offset, axis=1)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("block", [(60, 17, 1), (5, 3, 77)])
@pytest.mark.parametrize("is_training", [True, False])
def test_activation_and_residual(
    rng: np.random.Generator,
    activation: str | None,
    with_residual: bool,
    block: cases.Block,
    is_training: bool,
    dtype: np.dtype[Any],
) -> None:
    x = cases.make("standard_normal", block, dtype)
    # Wide enough to reach past 6, and far into the tails of silu and gelu.
    scale, offset = (frozen(4 * v) for v in parameters(rng, block[1], dtype))
    residual = frozen(4 * rng.standard_normal(block), dtype) if with_residual else None
    given = {}
    if not is_training:
        given = {"mean": frozen(np.zeros(block[1])), "variance": frozen(np.ones(block[1]))}
    options = {
        **given, "is_training": is_training, "activation": activation, "residual": residual,
        "axis": 1,
    }  # fmt: skip
    actual = fusebn.fused_batch_norm(x, scale, offset, **options)
    assert_forward(actual, x, scale, offset, **options)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_over_their_whole_range(activation: str, dtype: np.dtype[Any]) -> None:
    z = frozen(np.concatenate([np.linspace(-120, 120, 7001), [0, 1e-3, -1e-3, 6e4, -6e4]]), dtype)
    x = z[:, None]
    zero, one = np.zeros(1), np.ones(1)
    y = fusebn.fused_batch_norm(
        x, None, None, zero, one, 0.0, is_training=False, axis=1, activation=activation
    ).y
    expected = reference.ACTIVATIONS[activation][0](reference.wide(x))
    assert_close(
        y,
        expected,
        dtype=dtype,
        magnitude=np.minimum(np.abs(expected) + 1, np.abs(reference.wide(x))),
        ulps=ULPS[dtype],
    )


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("block", [(33, 17, 1), (5, 3, 77)])
def test_scale_and_offset_are_optional(
    rng: np.random.Generator,
    with_scale: bool,
    with_offset: bool,
    block: cases.Block,
    dtype: np.dtype[Any],
) -> None:
    x = cases.make("standard_normal", block, dtype)
    scale, offset = parameters(rng, block[1], dtype)
    given = scale if with_scale else None, offset if with_offset else None
    assert_forward(fusebn.fused_batch_norm(x, *given, axis=1), x, *given, axis=1)


@pytest.mark.parametrize("data_format", cases.FORMATS)
def test_data_formats(rng: np.random.Generator, data_format: str, dtype: np.dtype[Any]) -> None:
    shape = cases.FORMATS[data_format]
    x = frozen(rng.standard_normal(shape), dtype)
    scale, offset = parameters(rng, 5, dtype)
    actual = fusebn.fused_batch_norm(x, scale, offset, data_format=data_format)
    axis = data_format.index("C")
    assert_forward(actual, x, scale, offset, axis=axis)
    assert_same_bits(actual.y, fusebn.fused_batch_norm(x, scale, offset, axis=axis).y)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 7])
def test_any_axis_of_any_rank(rng: np.random.Generator, rank: int) -> None:
    shape = (3, 2, 4, 1, 5, 2, 3)[:rank]
    x = frozen(rng.standard_normal(shape), np.float32)
    for axis in range(-rank, rank):
        scale, offset = parameters(rng, shape[axis], x.dtype)
        actual = fusebn.fused_batch_norm(x, scale, offset, axis=axis)
        assert_forward(actual, x, scale, offset, axis=axis)


def test_fused_batch_norm_by_hand(dtype: np.dtype[Any]) -> None:
    # mean 3, variance 3; with epsilon 1 the divisor is 2; the unbiased variance is 4 / 3 * 3.
    x = frozen([[1.5], [4.5], [1.5], [4.5]], dtype)
    x = frozen([[6.0], [2.0], [2.0], [2.0]], dtype)
    y, mean, variance = fusebn.fused_batch_norm(
        x, np.array([10.0]), np.array([-1.0]), epsilon=1.0, data_format="NC"
    )
    assert mean.tolist() == [3]
    assert variance.tolist() == [4]
    assert y[:, 0].tolist() == [14, -6, -6, -6]


@pytest.mark.parametrize("is_training", [True, np.True_, np.array(True), False, np.array(False)])
def test_is_training_may_be_a_run_time_value(is_training: Any) -> None:
    x = np.array([[1.0], [3.0]], np.float32)
    y = fusebn.fused_batch_norm(
        x, None, None, np.array([1.0]), np.array([4.0]), 0.0, "NC", is_training
    ).y
    assert y[:, 0].tolist() == ([-1, 1] if is_training else [0, 1])


@pytest.mark.parametrize("factor", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_mixing_into_given_statistics(
    rng: np.random.Generator, factor: float, correction: float, dtype: np.dtype[Any]
) -> None:
    x = cases.make("negative_mean", (50, 5, 1), dtype)[:, :, 0]
    mean = frozen(rng.standard_normal(5) - 3000, stat(dtype))
    variance = frozen(rng.uniform(1, 20, 5), stat(dtype))
    options: dict[str, Any] = {"exponential_avg_factor": factor, "correction": correction}
    actual = fusebn.fused_batch_norm(x, None, None, mean, variance, axis=1, **options)
    assert_forward(actual, x, None, None, mean, variance, axis=1, **options)
    if factor == 0:
        assert_same_bits(actual.mean, mean)
        assert_same_bits(actual.variance, variance)


def test_given_statistics_are_ignored_when_nothing_is_mixed() -> None:
    x = np.array([[1.0], [3.0]], np.float32)
    lost = np.array([np.nan], np.float32)
    y, mean, variance = fusebn.fused_batch_norm(x, None, None, lost, lost, 0.0, "NC")
    assert (y[:, 0].tolist(), mean.tolist(), variance.tolist()) == ([-1, 1], [2], [2])


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("correction", [0, 1, 2, 5])
def test_a_divisor_that_would_not_be_positive_is_n(n: int, correction: int) -> None:
    x = np.arange(n, dtype=np.float64)[:, None]
    m2 = float(((x - x.mean()) ** 2).sum())
    _, _, variance = fusebn.fused_batch_norm(x, None, None, data_format="NC", correction=correction)
    assert variance.tolist() == [m2 / (n - correction if n > correction else n)]


@pytest.mark.parametrize("block", [(11, 5, 3), (200, 17, 1)])
@pytest.mark.parametrize("with_nan", [False, True])
def test_fused_batch_norm_with_weights(
    rng: np.random.Generator, block: cases.Block, with_nan: bool, dtype: np.dtype[Any]
) -> None:
    outer, channels, inner = block
    x = np.array(cases.make("standard_normal", block, dtype))
    weights = rng.integers(0, 4, (outer, inner)) / 2
    if with_nan:
        x[np.moveaxis(np.broadcast_to(weights == 0, (channels, outer, inner)), 0, 1)] = np.nan
    scale, offset = parameters(rng, channels, dtype)
    actual = fusebn.fused_batch_norm(frozen(x), scale, offset, axis=1, weights=frozen(weights))
    assert_forward(actual, x, scale, offset, axis=1, weights=weights)
    assert np.isfinite(actual.mean).all()
    assert np.array_equal(np.isnan(actual.y), np.isnan(x))


def test_weights_may_broadcast(dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (6, 3, 20), dtype).reshape(6, 3, 4, 5)
    for weights in (np.arange(5.0), np.arange(4.0)[:, None], np.arange(6.0)[:, None, None], 2.0):
        actual = fusebn.fused_batch_norm(x, None, None, data_format="NCHW", weights=weights)
        assert_forward(actual, x, None, None, axis=1, weights=weights)


@pytest.mark.parametrize("block", [shape.block for shape in cases.EMPTY_SHAPES])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_fused_batch_norm_of_nothing(
    rng: np.random.Generator, block: cases.Block, factor: float, dtype: np.dtype[Any]
) -> None:
    x = np.zeros(block, dtype)
    scale, offset = parameters(rng, block[1], dtype)
    given = [frozen(rng.random(block[1]), stat(dtype)) for _ in range(2)]
    y, mean, variance = fusebn.fused_batch_norm(
        x, scale, offset, *given, axis=1, exponential_avg_factor=factor
    )
    assert y.shape == block
    assert y.dtype == dtype
    if factor == 1:
        assert mean.shape == variance.shape == (block[1],)
        assert np.isnan(mean).all()
        assert np.isnan(variance).all()
    else:
        assert_same_bits(mean, given[0])
        assert_same_bits(variance, given[1])
    inference = fusebn.fused_batch_norm(x, scale, offset, *given, axis=1, is_training=False)
    assert inference.y.shape == block
    assert_same_bits(inference.mean, given[0])


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_all_weights_zero(factor: float, dtype: np.dtype[Any]) -> None:
    x = np.array([[1.0, 2.0], [np.nan, 4.0], [5.0, np.inf]]).astype(dtype)
    residual = frozen([[0, 1], [2, 3], [4, -9]], dtype)
    offset = frozen([3.0, -1.0], stat(dtype))
    given = frozen([7.0, 8.0], stat(dtype)), frozen([2.0, 3.0], stat(dtype))
    y, mean, variance = fusebn.fused_batch_norm(
        frozen(x), None, offset, *given, axis=1, exponential_avg_factor=factor,
        weights=np.zeros(3), activation="relu", residual=residual,
    )  # fmt: skip
    assert y.astype(float).tolist() == [[3, 0], [5, 2], [7, 0]]
    if factor == 1:
        assert np.isnan(mean).all()
        assert np.isnan(variance).all()
    else:
        assert_same_bits(mean, given[0])
        assert_same_bits(variance, given[1])


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1)])
def test_one_element_batches(
    rng: np.random.Generator, shape: Any, activation: str | None, dtype: np.dtype[Any]
) -> None:
    x = frozen(1000 * rng.standard_normal(shape), dtype)
    scale, offset = parameters(rng, 5, dtype)
    y, mean, variance = fusebn.fused_batch_norm(x, scale, offset, axis=1, activation=activation)
    expected = reference.ACTIVATIONS[activation][0](reference.wide(offset)).reshape(shape)
    magnitude = np.abs(reference.wide(offset)).reshape(shape)
    assert_close(y, expected, dtype=dtype, magnitude=magnitude, ulps=ULPS[dtype])
    assert_same_bits(mean, x.reshape(5).astype(stat(dtype)))
    assert_same_bits(variance, np.zeros(5, stat(dtype)))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("block", [(77, 17, 1), (3, 3, 33)])
def test_a_constant_channel_becomes_the_offset(
    rng: np.random.Generator, epsilon: float, block: cases.Block, dtype: np.dtype[Any]
) -> None:
    x = cases.make("constant", block, dtype)
    scale, offset = parameters(rng, block[1], dtype)
    y, _, variance = fusebn.fused_batch_norm(x, scale, offset, epsilon=epsilon, axis=1)
    assert_same_bits(y, np.broadcast_to(offset[:, None], block).astype(dtype))
    assert_same_bits(variance, np.zeros(block[1], stat(dtype)))


def test_no_cancellation_of_a_large_mean_against_the_offset() -> None:
    # Mean 2^20 and variance 1 are exact here, so y must be offset +- scale, rounded at most twice.
    # x * a + b with b = offset - mean * a would be wrong from the second digit of the offset on.
    side = np.where(np.arange(64) % 2 == 0, 1.0, -1.0)
    x = frozen((2.0**20 + side)[:, None], np.float32)
    scale, offset = frozen([1 / 3], np.float32), frozen([1e-3], np.float32)
    y, mean, variance = fusebn.fused_batch_norm(x, scale, offset, epsilon=0.0, axis=1, correction=0)
    assert (mean.item(), variance.item()) == (2.0**20, 1)
    expected = side[:, None] * reference.wide(scale) + reference.wide(offset)
    assert_close(y, expected, dtype=np.dtype(np.float32), magnitude=expected, ulps=1)
    y = fusebn.fused_batch_norm(x, scale, offset, mean, variance, 0.0, is_training=False, axis=1).y
    assert_close(y, expected, dtype=np.dtype(np.float32), magnitude=expected, ulps=1)


def test_a_lost_channel_stays_alone(dtype: np.dtype[Any]) -> None:
    x = np.array(cases.make("standard_normal", (40, 5, 3), dtype))
    x[7, 2, 1] = np.nan
    x[9, 4, 0] = -np.inf
    for activation in cases.ACTIVATIONS:
        y, mean, variance = fusebn.fused_batch_norm(
            frozen(x), None, None, axis=1, activation=activation
        )
        lost = np.array([False, False, True, False, True])
        assert np.array_equal(np.isnan(mean), lost)
        assert np.array_equal(np.isnan(variance), lost)
        assert np.isnan(y[:, lost]).all(), activation
        assert np.isfinite(y[:, ~lost]).all(), activation


def test_inference_propagates_nan_where_it_is(dtype: np.dtype[Any]) -> None:
    x = np.zeros((4, 3)).astype(dtype)
    x[2, 1] = np.nan
    for activation in cases.ACTIVATIONS:
        y = fusebn.fused_batch_norm(
            frozen(x), None, None, np.zeros(3), np.ones(3), is_training=False, axis=1,
            activation=activation,
        ).y  # fmt: skip
        assert np.array_equal(np.isnan(y), np.isnan(x)), activation


def test_zero_variance_and_zero_epsilon_in_inference(dtype: np.dtype[Any]) -> None:
    x = frozen([[5.0, -5.0], [1e3, 0.5]], dtype)
    offset = frozen([1.5, -2.0], stat(dtype))
    y = fusebn.fused_batch_norm(
        x, None, offset, np.zeros(2), np.zeros(2), 0.0, is_training=False, axis=1
    ).y
    assert y.astype(float).tolist() == [[1.5, -2], [1.5, -2]]


def test_half_results_past_the_range_become_infinite() -> None:
    x = frozen([[-1.0], [1.0]], cases.FLOAT16)
    y = fusebn.fused_batch_norm(x, np.array([1e6]), None, epsilon=0.0, axis=1).y
    assert y[:, 0].tolist() == [-np.inf, np.inf]


def test_half_results_are_rounded_to_nearest_even() -> None:
    # With mean 0 and variance 1, y is scale itself, rounded: every tie and its neighbours.
    for dtype, bits in ((cases.FLOAT16, 11), (cases.BFLOAT16, 8)):
        base = 1 + np.arange(2 ** (bits - 1)) / 2 ** (bits - 1)
        tie = np.concatenate(
            [base + d for d in (2.0**-bits, 2.0**-bits - 2**-20, 2.0**-bits + 2**-20)]
        )
        tie = np.concatenate([tie, tie * 2.0**-14, -tie, tie * 2.0**-24]).astype(np.float32)
        x = np.ones((1, tie.size), dtype)
        zero, one = np.zeros(tie.size), np.ones(tie.size)
        y = fusebn.fused_batch_norm(x, tie, None, zero, one, 0.0, is_training=False, axis=1).y
        assert_same_bits(y[0], tie.astype(dtype))


def test_parameters_of_other_float_types() -> None:
    x = cases.make("standard_normal", (20, 4, 1), np.dtype(np.float32))
    scale = np.array([1, 2, 0.5, -1])
    expected = fusebn.fused_batch_norm(x, scale.astype(np.float32), None, axis=1).y
    for other in (np.float64, np.float16, cases.BFLOAT16):
        y = fusebn.fused_batch_norm(x, scale.astype(other), None, axis=1).y
        assert_same_bits(y, expected)


# --- normalization by given statistics --------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [
        ("channels last", (4, 5, 6), (6,), (6,), (6,), (6,)),
        ("as moments keeps dims", (4, 5, 6), (1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 5, 1)),
        ("layer norm", (4, 5, 6), (4, 1, 1), (4, 1, 1), (5, 6), (5, 6)),
        ("instance norm", (4, 5, 6), (4, 5, 1), (4, 5, 1), (5, 1), (5, 1)),
        ("outer and inner kept", (4, 5, 6), (4, 1, 6), (4, 1, 6), (6,), (6,)),
        ("all different", (4, 5, 6), (), (4, 1, 1), (5, 1), (6,)),
        ("elementwise", (4, 5, 6), (4, 5, 6), (4, 5, 6), (4, 5, 6), (4, 5, 6)),
        ("x broadcasts too", (5, 1), (6,), (6,), (4, 1, 1), ()),
        ("rank zero", (), (), (), (), ()),
        ("nothing", (0, 6), (6,), (6,), (6,), (6,)),
        ("a vector", (7,), (), (), (7,), ()),
    ],
    ids=lambda shapes: shapes[0],
)
@pytest.mark.parametrize("with_both", [True, False])
def test_batch_normalization_broadcasts(
    rng: np.random.Generator, shapes: Any, with_both: bool, dtype: np.dtype[Any]
) -> None:
    x = frozen(rng.standard_normal(shapes[1]), dtype)
    mean, offset, scale = (frozen(rng.standard_normal(shapes[i]), stat(dtype)) for i in (2, 4, 5))
    variance = frozen(rng.uniform(0.2, 3, shapes[3]), stat(dtype))
    if not with_both:
        offset = scale = None
    y = fusebn.batch_normalization(x, mean, variance, offset, scale, 0.01)
    expected = reference.normalize(x, mean, variance, scale, offset, 0.01)
    xhat = np.abs(reference.normalize(x, mean, variance, None, None, 0.01))
    magnitude = (xhat + 1) * np.abs(1 if scale is None else scale) + np.abs(
        0 if offset is None else offset
    )
    magnitude = np.broadcast_to(magnitude, expected.shape)
    assert_close(y, expected, dtype=dtype, magnitude=magnitude, ulps=ULPS[dtype])


def test_batch_normalization_by_hand() -> None:
    y = fusebn.batch_normalization(
        np.array([[7.0, 3.0]]), np.array([3.0, 3.0]), np.array([3.0, 3.0]), np.array(1.0), 10.0, 1.0
    )
    assert y.tolist() == [[21, 1]]


@pytest.mark.parametrize("scale_after_normalization", [True, False])
def test_batch_norm_with_global_normalization(
    rng: np.random.Generator, scale_after_normalization: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", (30, 5, 1), dtype).reshape(2, 3, 5, 5)
    gamma, beta = parameters(rng, 5, dtype)
    mean = frozen(rng.standard_normal(5), stat(dtype))
    variance = frozen(rng.uniform(0.2, 3, 5), stat(dtype))
    y = fusebn.batch_norm_with_global_normalization(
        x, mean, variance, beta, gamma, 0.01, scale_after_normalization
    )
    scale = gamma if scale_after_normalization else None
    options = {"is_training": False, "axis": -1}
    assert_forward((y, mean, variance), x, scale, beta, mean, variance, 0.01, **options)


# --- moving averages --------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0, 0.1, 0.5, 0.999, 1])
def test_assign_moving_average(
    rng: np.random.Generator, decay: float, dtype: np.dtype[Any]
) -> None:
    old, value = (
        rng.standard_normal((3, 4)).astype(dtype),
        frozen(rng.standard_normal((3, 4)), dtype),
    )
    variable = old.copy()
    assert fusebn.assign_moving_average(variable, value, decay) is variable
    expected = reference.wide(old) * decay + reference.wide(value) * (1 - decay)
    magnitude = np.abs(reference.wide(old)) + np.abs(reference.wide(value))
    assert_close(variable, expected, dtype=dtype, magnitude=magnitude, ulps=1)
    if decay in (0, 1):
        assert_same_bits(variable, value if decay == 0 else old)


def test_assign_moving_average_by_hand() -> None:
    variable = np.array([8.0, -4.0])
    fusebn.assign_moving_average(variable, np.array([0.0, 4.0]), 0.75)
    assert variable.tolist() == [6, -2]
    fusebn.assign_moving_average(variable, np.array([2.0, 2.0]), 0.5)
    assert variable.tolist() == [4, 0]


def test_assign_moving_average_without_the_bias_of_the_start(rng: np.random.Generator) -> None:
    # Zero-debiased, the average after t values is the weighted mean of those values alone.
    variable = np.full(3, 100.0)
    values = rng.standard_normal((20, 3))
    for t, value in enumerate(values, 1):
        fusebn.assign_moving_average(variable, value, 0.9, zero_debias=True)
        weights = 0.9 ** np.arange(t)[::-1]
        assert variable == pytest.approx((weights / weights.sum()) @ values[:t], rel=1e-12)
    other = np.zeros(3)
    fusebn.assign_moving_average(other, values[0], 0.9, zero_debias=True)
    assert other == pytest.approx(values[0])


# --- sizes past 2^31 --------------------------------------------------------------------------

PAST = 2**31


def test_moments_past_two_to_the_31() -> None:
    # Pages of zeros that nobody wrote to cost no memory.
    for shape, axes in (((PAST + 6,), 0), (((PAST + 6) // 2, 2), 0), ((2, PAST // 2 + 3), 1)):
        x = np.zeros(shape, np.float16)
        flat = x.reshape(-1)
        flat[-2:] = [1024, 1024]
        x.setflags(write=False)
        n = x.size // (1 if x.ndim == 1 else 2)
        mean, variance = fusebn.moments(x, axes)
        batch = fusebn.Moments.of(x, axes)
        assert batch.count == n
        share = {1: [2], 2: [1, 1]}[x.ndim] if axes == 0 else [0, 2]
        for m, v, k in zip(np.atleast_1d(mean), np.atleast_1d(variance), share, strict=True):
            assert m == pytest.approx(1024 * k / n, rel=1e-5)
            assert v == pytest.approx(1024**2 * k / n * (1 - k / n), rel=1e-5)


def _recycled(elements: int) -> tuple[Array, Callable[[], None]]:
    """Return a float16 array whose pages are one 64 MB file over and over, but for the last.

    It can be written from end to end without needing the memory; only the last page keeps its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page = mmap.PAGESIZE
    size = -(-elements * 2 // page) * page
    no_access, fixed, anonymous, chunk = 0, 0x10, 0x20, 1 << 26
    base = libc.mmap(None, size, no_access, mmap.MAP_PRIVATE | anonymous, -1, 0)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), chunk)
        for start in range(0, size - page, chunk):
            length = min(chunk, size - page - start)
            at = libc.mmap(base + start, length, access, mmap.MAP_SHARED | fixed, file.fileno(), 0)
            assert at == base + start
    at = libc.mmap(base + size - page, page, access, mmap.MAP_PRIVATE | anonymous | fixed, -1, 0)
    assert at == base + size - page
    buffer = (ctypes.c_uint16 * elements).from_address(base)
    return np.frombuffer(buffer, np.float16), lambda: libc.munmap(base, size)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalize_past_two_to_the_31(channels_last: bool) -> None:
    shape = (PAST // 2 + 3, 2) if channels_last else (1, 2, PAST // 2 + 3)
    x = np.zeros(shape, np.float16)
    x.reshape(-1)[-2:] = [3, 5]
    x.setflags(write=False)
    flat, release = _recycled(x.size)
    try:
        out = flat.reshape(shape)
        out.reshape(-1)[:] = np.nan
        fusebn.fused_batch_norm(
            x, None, np.array([10.0, 20.0]), np.zeros(2), np.ones(2), 0.0, is_training=False,
            axis=1, out=out,
        )  # fmt: skip
        if channels_last:
            assert flat[:4].tolist() == [10, 20, 10, 20]
            assert flat[-4:].tolist() == [10, 20, 13, 25]
        else:
            assert flat[-4:].tolist() == [20, 20, 23, 25]
        assert not np.isnan(flat[: 1 << 25]).any()
        del out
    finally:
        del flat
        release()


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_a_nan_of_any_bits_is_one_in_bfloat16(bits: int, instruction_set: str) -> None:
    _core.set_instruction_set(instruction_set)
    one = int(np.float32(1).view(np.uint32))
    x, scale = np.ones((4, 3), cases.BFLOAT16), np.array([one, bits, one], np.uint32).view("f4")
    for name in ("mean", "scale", "offset"):
        given = {"mean": np.zeros(3), "scale": np.ones(3), "offset": np.zeros(3)} | {name: scale}
        y = fusebn.fused_batch_norm(
            x, given["scale"], given["offset"], given["mean"], np.ones(3), data_format="NC",
            is_training=False,
        ).y  # fmt: skip
        assert np.isnan(y).tolist() == [[False, True, False]] * 4
    dx = fusebn.fused_batch_norm_grad(
        x, x, scale, None, np.zeros(3), np.ones(3), data_format="NC", is_training=False,
        activation="silu",
    ).dx  # fmt: skip
    assert np.isnan(dx).tolist() == [[False, True, False]] * 4


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_silu_and_gelu_vanish_far_below_zero(instruction_set: str) -> None:
    _core.set_instruction_set(instruction_set)
    z = np.array([[-1e38], [-200.0], [-90.0], [90.0], [1e38]], np.float32)
    for activation in ("silu", "gelu"):
        y = fusebn.fused_batch_norm(
            z, None, None, np.zeros(1), np.ones(1), 0, "NC", False, activation=activation
        ).y
        assert y[:3].ravel().tolist() == [0, 0, 0]
        assert y[3:].ravel().tolist() == z[3:].ravel().tolist()


def test_weights_too_large_for_the_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`weights` must be finite and not negative; got 1e\+300"):
        fusebn.moments(np.ones((4, 1), np.float32), 0, weights=np.full(4, 1e300))


@pytest.mark.parametrize("axis", [1, -1])
def test_weights_may_keep_the_channel_axis(axis: int) -> None:
    rng = np.random.default_rng(0)
    x = frozen(rng.standard_normal((3, 4, 5, 6)), np.float32)
    weights = (rng.random((3, 4, 5, 6)) > 0.5).take([0], axis)
    kept = fusebn.fused_batch_norm(x, None, None, axis=axis, weights=weights)
    plain = fusebn.fused_batch_norm(x, None, None, axis=axis, weights=weights.squeeze(axis))
    for a, b in zip(kept, plain, strict=True):
        assert a.tobytes() == b.tobytes()
