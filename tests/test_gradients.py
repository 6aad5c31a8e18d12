"""The gradients, against the oracle in every type and against finite differences in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cases
import fusebn
from conftest import (
    Array,
    assert_gradients,
    assert_same_bits,
    away_from_kinks,
    frozen,
    parameters,
    stat,
)
from fusebn import _reference as reference

SHAPE_IDS = ["x".join(map(str, shape.block)) for shape in cases.SHAPES]


def batch_statistics(x: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Return the mean and the biased variance that normalized x, as a caller has them."""
    across = (0, *range(2, x.ndim))
    spread = None if weights is None else np.expand_dims(weights, 1)
    batch = reference.moments(x, across, spread)
    of = stat(x.dtype)
    return tuple(frozen(v.squeeze(across), of) for v in (batch.mean, batch.variance()))


@pytest.mark.parametrize("block", [shape.block for shape in cases.SHAPES], ids=SHAPE_IDS)
@pytest.mark.parametrize("is_training", [True, False])
def test_gradients_of_every_shape(
    rng: np.random.Generator, block: cases.Block, is_training: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", block, dtype)
    dy = cases.make("standard_normal", block, dtype, seed=1)
    scale, offset = parameters(rng, block[1], dtype)
    arguments = dy, x, scale, offset, *batch_statistics(x)
    actual = fusebn.fused_batch_norm_grad(*arguments, is_training=is_training, axis=1)
    assert_gradients(actual, *arguments, is_training=is_training, axis=1)


# Left out: products of subnormals have no accuracy to speak of; lost channels have a test below.
GRADIENT_DATA = [n for n in cases.DATA_BY_NAME if n not in ("subnormal", "one_nan", "one_inf")]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in GRADIENT_DATA for dtype in cases.DATA_BY_NAME[name].dtypes],
    ids=str,
)
@pytest.mark.parametrize("block", [(101, 17, 1), (13, 5, 49)])
def test_gradients_of_every_kind_of_data(
    rng: np.random.Generator, name: str, dtype: np.dtype[Any], block: cases.Block
) -> None:
    x = cases.make(name, block, dtype)
    dy = cases.make("standard_normal", block, dtype, seed=1)
    scale, offset = parameters(rng, block[1], dtype)
    arguments = dy, x, scale, offset, *batch_statistics(x)
    assert_gradients(fusebn.fused_batch_norm_grad(*arguments, axis=1), *arguments, axis=1)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("block", [(60, 17, 1), (5, 3, 77)])
def test_activation_residual_and_weights(
    rng: np.random.Generator,
    activation: str | None,
    with_residual: bool,
    weighted: bool,
    is_training: bool,
    block: cases.Block,
    dtype: np.dtype[Any],
) -> None:
    outer, channels, inner = block
    x = cases.make("standard_normal", block, dtype)
    scale, offset = (frozen(3 * v) for v in parameters(rng, channels, dtype))
    residual = frozen(3 * rng.standard_normal(block), dtype) if with_residual else None
    weights = frozen(rng.integers(0, 4, (outer, inner)) / 2) if weighted else None
    statistics = batch_statistics(x, weights)
    dy = away_from_kinks(
        cases.make("standard_normal", block, dtype, seed=1),
        x, scale, offset, *statistics, axis=1, residual=residual,
    )  # fmt: skip
    arguments = dy, x, scale, offset, *statistics
    options = {
        "is_training": is_training, "axis": 1, "activation": activation, "residual": residual,
        "weights": weights,
    }  # fmt: skip
    assert_gradients(fusebn.fused_batch_norm_grad(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_scale_and_offset_are_optional(
    rng: np.random.Generator, with_scale: bool, with_offset: bool, activation: str | None
) -> None:
    x = cases.make("standard_normal", (33, 17, 2), cases.FLOAT32)
    dy = cases.make("standard_normal", (33, 17, 2), cases.FLOAT32, seed=1)
    scale, offset = parameters(rng, 17, x.dtype)
    given = scale if with_scale else None, offset if with_offset else None
    statistics = batch_statistics(x)
    arguments = away_from_kinks(dy, x, *given, *statistics, axis=1), x, *given, *statistics
    options = {"axis": 1, "activation": activation}
    assert_gradients(fusebn.fused_batch_norm_grad(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("which", ["dmean", "dvariance", "both"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [(60, 17, 1), (5, 3, 77)])
def test_gradients_into_the_statistics(
    rng: np.random.Generator, which: str, weighted: bool, block: cases.Block, dtype: np.dtype[Any]
) -> None:
    outer, channels, inner = block
    x = cases.make("standard_normal", block, dtype)
    dy = cases.make("standard_normal", block, dtype, seed=1)
    scale, offset = parameters(rng, channels, dtype)
    weights = frozen(rng.integers(0, 4, (outer, inner))) if weighted else None
    options: dict[str, Any] = {"axis": 1, "weights": weights}
    for name in ("dmean", "dvariance"):
        if which in (name, "both"):
            options[name] = frozen(50 * rng.standard_normal(channels), stat(dtype))
    arguments = dy, x, scale, offset, *batch_statistics(x, weights)
    assert_gradients(fusebn.fused_batch_norm_grad(*arguments, **options), *arguments, **options)


@pytest.mark.parametrize("data_format", cases.FORMATS)
def test_data_formats(rng: np.random.Generator, data_format: str) -> None:
    x, dy = (frozen(rng.standard_normal(cases.FORMATS[data_format])) for _ in range(2))
    scale, offset = parameters(rng, 5, x.dtype)
    axis = data_format.index("C")
    mean, variance = fusebn.moments(x, [i for i in range(x.ndim) if i != axis])
    arguments = dy, x, scale, offset, mean, variance
    actual = fusebn.fused_batch_norm_grad(*arguments, data_format=data_format)
    assert_gradients(actual, *arguments, axis=axis)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_finite_differences_of_the_public_function(
    rng: np.random.Generator, activation: str | None, is_training: bool, weighted: bool
) -> None:
    """Forward and backward of the library agree with one another, the oracle aside."""
    shape = (4, 3, 2)
    given = {
        "x": rng.standard_normal(shape),
        "scale": np.array([1.5, -1.0, 2.0]),
        "offset": np.array([0.3, 5.5, -0.4]),
        "residual": rng.standard_normal(shape),
    }
    fixed: dict[str, Any] = {
        "epsilon": 0.01, "is_training": is_training, "axis": 1, "activation": activation,
        "weights": rng.integers(0, 4, (4, 2)) if weighted else None,
    }  # fmt: skip
    moving = {} if is_training else {"mean": rng.standard_normal(3), "variance": rng.random(3)}
    dy, dmean, dvariance = (rng.standard_normal(s) for s in (shape, 3, 3))
    options = {"dmean": dmean, "dvariance": dvariance} if is_training else {}

    def loss(**changed: Array) -> float:
        y, mean, variance = fusebn.fused_batch_norm(
            **(given | changed), **moving, **fixed, correction=0
        )
        extra = (dmean * mean + dvariance * variance).sum() if is_training else 0.0
        return float((dy * y).sum() + extra)

    seen = fusebn.fused_batch_norm(**given, **moving, **(fixed | {"activation": None})).y
    assert min(np.abs(seen).min(), np.abs(seen - 6).min()) > 1e-4, "a kink too near"
    _, mean, variance = fusebn.fused_batch_norm(**given, **moving, **fixed, correction=0)
    statistics = {"mean": mean, "variance": variance}
    gradients = fusebn.fused_batch_norm_grad(dy, **given, **statistics, **fixed, **options)
    h = 1e-5
    for (name, value), gradient in zip(given.items(), gradients, strict=True):
        assert gradient.shape == value.shape
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = h
            difference = (loss(**{name: value + step}) - loss(**{name: value - step})) / (2 * h)
            assert difference == pytest.approx(gradient[index], rel=1e-6, abs=1e-7)


def test_gradients_by_hand(dtype: np.dtype[Any]) -> None:
    # x = -1, 1 with mean 0, variance 1, epsilon 0: xhat = x. dy = 1, 0 and scale 2 give
    # doffset = 1, dscale = -1, dx = 2 * (dy - 1/2 - x * -1/2) = 0: two values have no freedom left.
    x, dy = frozen([[-1.0], [1.0]], dtype), frozen([[1.0], [0.0]], dtype)
    two, zero, one = np.array([2.0]), np.zeros(1), np.ones(1)
    dx, dscale, doffset, dresidual = fusebn.fused_batch_norm_grad(
        dy, x, two, zero, zero, one, 0.0, "NC"
    )
    assert (dx[:, 0].tolist(), dscale.tolist(), doffset.tolist()) == ([0, 0], [-1], [1])
    assert dresidual is None
    dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
        dy, x, two, zero, zero, one, 0.0, "NC", False
    )
    assert (dx[:, 0].tolist(), dscale.tolist(), doffset.tolist()) == ([2, 0], [-1], [1])
    assert dx.dtype == dtype
    assert dscale.dtype == doffset.dtype == stat(dtype)


def test_kinks_have_the_derivative_of_their_left() -> None:
    # In inference with mean 0 and variance 1, the activation sees x itself.
    x = frozen([[0.0], [-0.0], [6.0], [3.0], [-1.0], [7.0]], np.float32)
    dy, zero, one = np.ones_like(x), np.zeros(1), np.ones(1)

    def slopes(activation: str) -> list[float]:
        return fusebn.fused_batch_norm_grad(
            dy, x, None, None, zero, one, 0.0, "NC", False, activation=activation
        ).dx[:, 0].tolist()  # fmt: skip

    assert slopes("relu") == [0, 0, 1, 1, 0, 1]
    assert slopes("relu6")[:2] == [0, 0]
    assert slopes("relu6")[3:] == [1, 0, 0]
    assert slopes("leaky_relu")[2:] == pytest.approx([1, 1, 0.01, 1])


def test_zero_in_zero_out(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (9, 4, 3), dtype)
    scale, offset = parameters(rng, 4, dtype)
    grads = fusebn.fused_batch_norm_grad(
        np.zeros_like(x), x, scale, offset, *batch_statistics(x), axis=1, residual=x
    )
    for gradient in grads:
        assert not np.any(gradient)


def test_dx_is_orthogonal_to_what_normalization_removes(rng: np.random.Generator) -> None:
    # y does not change under x + c, nor (epsilon 0) under c * x: dx can have no part along either.
    x = frozen(rng.standard_normal((50, 7, 3)) * 5 + 3)
    dy = rng.standard_normal(x.shape)
    scale, offset = parameters(rng, 7, x.dtype)
    dx = fusebn.fused_batch_norm_grad(dy, x, scale, offset, *batch_statistics(x), 0.0, axis=1).dx
    size = np.abs(dx).sum((0, 2))
    assert (np.abs(dx.sum((0, 2))) < 1e-13 * size).all()
    assert (np.abs((dx * x).sum((0, 2))) < 1e-12 * size).all()


def test_integer_weights_repeat_positions(rng: np.random.Generator) -> None:
    # A position of weight k is k equal rows: its dx is the sum of theirs, if dy is shared out.
    x, dy = (frozen(rng.standard_normal((30, 6))) for _ in range(2))
    weights = rng.integers(1, 5, 30)
    scale, offset = parameters(rng, 6, x.dtype)
    statistics = batch_statistics(x, weights)
    options: dict[str, Any] = {"axis": 1, "activation": "silu"}
    weighted = fusebn.fused_batch_norm_grad(
        dy, x, scale, offset, *statistics, weights=weights, **options
    )
    rows = np.repeat(np.arange(30), weights)
    repeated = fusebn.fused_batch_norm_grad(
        dy[rows] / weights[rows, None], x[rows], scale, offset, *statistics, **options
    )
    dx = np.zeros_like(x)
    np.add.at(dx, rows, repeated.dx)
    assert weighted.dx == pytest.approx(dx, rel=1e-10, abs=1e-12)
    assert weighted.dscale == pytest.approx(repeated.dscale, rel=1e-10)
    assert weighted.doffset == pytest.approx(repeated.doffset, rel=1e-10)


@pytest.mark.parametrize("block", [shape.block for shape in cases.EMPTY_SHAPES])
@pytest.mark.parametrize("is_training", [True, False])
def test_gradients_of_nothing(block: cases.Block, is_training: bool, dtype: np.dtype[Any]) -> None:
    x, one = np.zeros(block, dtype), np.ones(block[1])
    dx, dscale, doffset, dresidual = fusebn.fused_batch_norm_grad(
        x, x, one, one, one, one, is_training=is_training, axis=1, residual=x
    )
    assert dx.shape == dresidual.shape == block
    assert dscale.tolist() == doffset.tolist() == [0] * block[1]


@pytest.mark.parametrize("data", ["standard_normal", "one_nan", "one_inf"])
def test_gradients_of_weight_zero_in_all(data: str, dtype: np.dtype[Any]) -> None:
    # y = activation(offset) there, whatever x: only the offset has a gradient.
    x = cases.make(data, (5, 3, 1), dtype)[:, :, 0]
    dy, scale, offset = np.ones_like(x), np.full(3, 2.0), np.array([1.0, -1.0, 3.0])
    weights = np.zeros(5)
    _, mean, variance = fusebn.fused_batch_norm(
        x, scale, offset, axis=1, weights=weights, activation="relu", correction=0
    )
    dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
        dy, x, scale, offset, mean, variance, axis=1, weights=weights, activation="relu"
    )
    assert not dx.any()
    assert dscale.tolist() == [0, 0, 0]
    assert doffset.tolist() == [5, 0, 5]


def test_one_element_batches_pass_no_gradient(
    rng: np.random.Generator, dtype: np.dtype[Any]
) -> None:
    x = frozen(rng.standard_normal((1, 5)), dtype)
    scale, offset = parameters(rng, 5, dtype)
    dy = frozen(rng.standard_normal((1, 5)), dtype)
    dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
        dy, x, scale, offset, x[0].astype(stat(dtype)), np.zeros(5), axis=1
    )
    assert not dx.any()
    assert not dscale.any()
    assert_same_bits(doffset, dy[0].astype(stat(dtype)))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_a_residual_changes_no_bit_of_what_goes_to_x(
    rng: np.random.Generator, activation: str | None, dtype: np.dtype[Any]
) -> None:
    """Its gradient is rounded to its type, and may stand for dy only where that is exact."""
    block = (60, 17, 1)
    x, dy = (cases.make("standard_normal", block, dtype, seed) for seed in range(2))
    scale, offset = parameters(rng, 17, dtype)
    given = dy, x, scale, offset, *batch_statistics(x)
    nothing = frozen(np.zeros(block), dtype)
    alone = fusebn.fused_batch_norm_grad(*given, axis=1, activation=activation)
    beside = fusebn.fused_batch_norm_grad(*given, axis=1, activation=activation, residual=nothing)
    assert_same_bits(beside.dx, alone.dx)


def test_zero_variance_and_zero_epsilon_stop_the_gradient(dtype: np.dtype[Any]) -> None:
    x, dy = frozen(np.full((4, 2), 3.0), dtype), frozen(np.ones((4, 2)), dtype)
    for is_training in (True, False):
        dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
            dy, x, np.ones(2), np.zeros(2), np.full(2, 3.0), np.zeros(2), 0.0, "NC", is_training
        )
        assert not dx.any()
        assert dscale.tolist() == [0, 0]
        assert doffset.tolist() == [4, 4]


def test_a_lost_channel_stays_alone(dtype: np.dtype[Any]) -> None:
    x = np.array(cases.make("standard_normal", (40, 3, 5), dtype))
    dy = cases.make("standard_normal", (40, 3, 5), dtype, seed=1)
    clean = fusebn.fused_batch_norm_grad(
        dy, frozen(x), np.ones(3), np.ones(3), *batch_statistics(x), axis=1
    )
    x[4, 1, 2] = np.nan
    lost = fusebn.fused_batch_norm_grad(
        dy, frozen(x), np.ones(3), np.ones(3), *batch_statistics(x), axis=1
    )
    assert np.isnan(lost.dx[:, 1]).all()
    assert np.isnan(lost.dscale[1])
    for channel in (0, 2):
        assert_same_bits(lost.dx[:, channel], clean.dx[:, channel])
        assert lost.dscale[channel] == clean.dscale[channel]
        assert lost.doffset[channel] == clean.doffset[channel]


def test_a_masked_position_may_hold_nan_if_no_gradient_comes_from_it() -> None:
    x = np.array(cases.make("standard_normal", (20, 4, 1), cases.FLOAT32)[:, :, 0])
    dy = np.array(cases.make("standard_normal", (20, 4, 1), cases.FLOAT32, seed=1)[:, :, 0])
    weights = np.ones(20)
    x[[3, 11]], dy[[3, 11]], weights[[3, 11]] = np.nan, 0, 0
    kept = weights > 0
    statistics = batch_statistics(x, weights)
    for activation in (None, "relu", "gelu"):
        options: dict[str, Any] = {"axis": 1, "activation": activation}
        masked = fusebn.fused_batch_norm_grad(
            frozen(dy), frozen(x), np.ones(4), np.ones(4), *statistics, weights=weights, **options
        )
        alone = fusebn.fused_batch_norm_grad(
            dy[kept], x[kept], np.ones(4), np.ones(4), *statistics, **options
        )
        assert masked.dx[kept] == pytest.approx(alone.dx, rel=1e-4, abs=1e-6)
        assert masked.dscale == pytest.approx(alone.dscale, rel=1e-4)
        assert masked.doffset == pytest.approx(alone.doffset, rel=1e-4)


def test_gradients_past_two_to_the_31() -> None:
    # Zeros that nobody wrote to are free; dx is not.
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if available < 8 << 20:
        pytest.skip(f"needs 8 GiB of free memory for a dx of 2^31 elements; {available >> 20} here")
    n = 2**30 + 3
    x, dy = np.zeros((n, 2), np.float16), np.zeros((n, 2), np.float16)
    x[-1], dy[-1] = [2, 3], [4, 5]
    dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
        dy, x, np.ones(2), np.ones(2), np.zeros(2), np.ones(2), 0.0, "NC", False
    )
    assert (dscale.tolist(), doffset.tolist()) == ([8, 15], [4, 5])
    assert dx[-2:].tolist() == [[0, 0], [4, 5]]
    assert dx[:2].tolist() == [[0, 0], [0, 0]]
