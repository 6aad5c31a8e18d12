"""The oracle against hand arithmetic, the standard library and finite differences."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import cases
from conftest import Array
from fusebn import _reference as reference

EPS = np.finfo(np.longdouble).eps


def test_moments_by_hand() -> None:
    x = [[1, 10], [2, 10], [6, 10]]
    count, mean, m2 = reference.moments(x, 0)
    assert count.tolist() == [[3, 3]]
    assert mean.tolist() == [[3, 10]]
    assert m2.tolist() == [[14, 0]]
    assert reference.moments(x, 0).variance(1).tolist() == [[7, 0]]


def test_moments_by_rational_arithmetic(rng: np.random.Generator) -> None:
    x = rng.standard_normal(1000) + 1e6
    exact = [Fraction(v) for v in x.tolist()]
    mean = sum(exact) / len(exact)
    variance = sum((v - mean) ** 2 for v in exact) / len(exact)
    batch = reference.moments(x, 0)
    assert (
        abs(Fraction(*batch.mean[0].as_integer_ratio()) - mean) <= 4 * Fraction(float(EPS)) * mean
    )
    error = abs(Fraction(*batch.variance()[0].as_integer_ratio()) - variance)
    assert error <= 1000 * Fraction(float(EPS)) * variance


def test_weights_repeat_positions() -> None:
    weighted = reference.moments([1.0, 5.0, 9.0], 0, weights=[2, 0, 1])
    repeated = reference.moments([1.0, 1.0, 9.0], 0)
    assert all(a == b for a, b in zip(weighted, repeated, strict=True))
    assert reference.moments([1.0, np.nan], 0, weights=[3, 0]).mean == 1


def test_the_undefined_batch() -> None:
    for x, weights in ((np.empty((0, 2)), None), (np.ones((3, 2)), np.zeros((3, 1)))):
        batch = reference.moments(x, 0, weights)
        assert batch.count.tolist() == [[0, 0]]
        assert np.isnan(batch.mean).all()
        assert np.isnan(batch.variance()).all()
        assert batch.m2.tolist() == [[0, 0]]
    out = reference.fused_batch_norm([[np.nan], [3.0]], [2.0], [-1.0], weights=[0, 0])
    assert out.y.tolist() == [[-1], [-1]]
    assert np.isnan(out.mean).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_lost_channel(bad: float) -> None:
    out = reference.fused_batch_norm([[1.0, 1.0], [bad, 3.0]], epsilon=0)
    assert np.isnan(out.mean[0])
    assert np.isnan(out.variance[0])
    assert np.isnan(out.y[:, 0]).all()
    assert out.y[:, 1].tolist() == [-1, 1]


def test_normalize_by_hand() -> None:
    # (x - mean) / sqrt(variance + epsilon) = (7 - 3) / sqrt(3 + 1) = 2
    y = reference.normalize(7, 3, 3, 10, -25, 1, residual=1)
    assert y == 2 * 10 - 25 + 1
    assert reference.normalize(7, 3, 3, 10, -25, 1, "relu", 1) == 0
    assert reference.normalize(7, 3, 3, 10, -12, 1, "relu6", 1) == 6
    assert reference.normalize(7, 3, 0, 10, -25, 0) == -25


def test_erf_agrees_with_the_standard_library() -> None:
    z = np.concatenate([np.linspace(-8, 8, 4001), [0, 1e-300, -1e-18, np.inf, -np.inf]])
    expected = np.array([math.erf(v) for v in z])
    # Half a unit in the last place of a double is all that math.erf's own rounding can explain.
    tolerance = 1.5 * np.spacing(np.abs(expected))
    assert (np.abs(reference.erf(z) - expected) <= tolerance).all()
    assert np.isnan(reference.erf([np.nan])).all()


def test_erf_to_twenty_digits() -> None:
    # Abramowitz and Stegun, table 7.1, and DLMF 7.6.1 summed with integers.
    for z in (Fraction(1, 8), Fraction(1, 2), Fraction(1), Fraction(3), Fraction(5)):
        series = sum(
            (-1) ** n * z ** (2 * n + 1) / (math.factorial(n) * (2 * n + 1)) for n in range(150)
        )
        exact = (
            np.longdouble(series.numerator * 10**40 // series.denominator) / np.longdouble(10) ** 40
        )
        exact = exact * 2 / np.sqrt(reference.PI)
        assert abs(reference.erf(float(z)) - exact) <= 8 * EPS


KINKS = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0]}


@pytest.mark.parametrize("name", cases.ACTIVATIONS)
def test_activation_derivatives(name: str | None) -> None:
    f, derivative = reference.ACTIVATIONS[name]
    z, h = reference.wide(np.linspace(-9, 9, 1801)), np.longdouble(1e-5)
    z = z[
        np.all([np.abs(z - kink) > 2 * h for kink in KINKS.get(name or "", [])] or [True], axis=0)
    ]
    z = z.reshape(-1)
    # Error h^2 / 6 * |f'''|, and |f'''| < 1.5 for every one of them.
    assert (np.abs((f(z + h) - f(z - h)) / (2 * h) - derivative(z)) < 5e-11).all()


def test_activations_by_hand() -> None:
    f = {name: pair[0] for name, pair in reference.ACTIVATIONS.items()}
    z = reference.wide([-2, 0, 3, 8])
    assert f["relu"](z).tolist() == [0, 0, 3, 8]
    assert f["relu6"](z).tolist() == [0, 0, 3, 6]
    assert np.abs(f["leaky_relu"](z) - [-0.02, 0, 3, 8]).max() < 1e-17
    assert np.allclose(f["silu"](z).astype(float), [-0.2384058440, 0, 2.8577223804, 7.9973171])
    assert np.allclose(f["gelu"](z).astype(float), [-0.0455002639, 0, 2.9959503059, 8])
    for name, (function, _) in reference.ACTIVATIONS.items():
        assert np.isnan(function(reference.wide([np.nan]))).all(), name


def test_derivatives_at_the_kinks() -> None:
    derivative = {name: pair[1] for name, pair in reference.ACTIVATIONS.items()}
    z = reference.wide([0, 6, np.nan])
    assert derivative["relu"](z).tolist() == [0, 1, 0]
    assert derivative["relu6"](z).tolist() == [0, 0, 0]
    assert derivative["leaky_relu"](z).tolist() == [reference.SLOPE, 1, reference.SLOPE]


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_by_finite_differences(
    rng: np.random.Generator, activation: str | None, is_training: bool, weighted: bool
) -> None:
    shape = (4, 3, 2)
    # Preactivations of about 1.5 each way around 3 and -3: on both sides of every kink.
    args = {
        "x": reference.wide(rng.standard_normal(shape)),
        "scale": reference.wide([1.5, -1, 2]),
        "offset": reference.wide([0.3, 5.5, -0.4]),
        "residual": reference.wide(rng.standard_normal(shape)),
    }
    weights = rng.integers(0, 4, (4, 2)) if weighted else None
    given = {} if is_training else {"mean": rng.standard_normal(3), "variance": rng.random(3)}
    dy, dmean, dvariance = (rng.standard_normal(s) for s in (shape, 3, 3))
    if not is_training:
        dmean = dvariance = np.zeros(3)

    def forward(**changed: Array) -> reference.FusedBatchNorm:
        return reference.fused_batch_norm(
            **(args | changed), **given, is_training=is_training, axis=1, activation=activation,
            weights=weights, correction=0, epsilon=0.01,
        )  # fmt: skip

    def loss(**changed: Array) -> Array:
        y, mean, variance = forward(**changed)
        return (dy * y).sum() + (dmean * mean).sum() + (dvariance * variance).sum()

    _, mean, variance = forward()
    z = reference.fused_batch_norm(
        **args, **given, is_training=is_training, axis=1, weights=weights, epsilon=0.01
    ).y
    assert min(np.abs(z).min(), np.abs(z - 6).min()) > 1e-4, "a kink too near for differences"
    gradients = reference.fused_batch_norm_grad(
        dy, args["x"], args["scale"], args["offset"], mean, variance, 0.01, is_training, axis=1,
        activation=activation, residual=args["residual"], weights=weights, dmean=dmean,
        dvariance=dvariance,
    )  # fmt: skip
    h = np.longdouble(1e-6)
    for name, gradient in zip(args, gradients, strict=True):
        assert gradient.shape == args[name].shape
        for index in np.ndindex(args[name].shape):
            step = np.zeros_like(args[name])
            step[index] = h
            up, down = loss(**{name: args[name] + step}), loss(**{name: args[name] - step})
            assert abs((up - down) / (2 * h) - gradient[index]) < 1e-9


def test_the_moving_mix_and_the_divisor() -> None:
    x = [[0.0], [4.0]]
    out = reference.fused_batch_norm(x, None, None, [10.0], [1.0], exponential_avg_factor=0.25)
    assert (out.mean.item(), out.variance.item()) == (0.75 * 10 + 0.25 * 2, 0.75 + 0.25 * 8)
    empty = reference.fused_batch_norm(
        np.empty((0, 1)), None, None, [10.0], [1.0], exponential_avg_factor=0.25
    )
    assert (empty.mean.item(), empty.variance.item()) == (10, 1)
    assert reference.fused_batch_norm([[3.0]]).variance.item() == 0
    inference = reference.fused_batch_norm(x, None, None, [2.0], [3.0], 1.0, is_training=False)
    assert inference.y.tolist() == [[-1], [1]]
    assert (inference.mean.item(), inference.variance.item()) == (2, 3)
