"""`Moments`: the one statistic and its merge."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest

import cases
from conftest import Array, assert_close, assert_same_bits, frozen
from fusebn import Moments
from fusebn import _reference as reference


def assert_like_oracle(actual: Moments, x: Array, axes: Any, weights: Any = None) -> None:
    expected = reference.moments(x, axes, weights)
    assert actual.mean.dtype == actual.m2.dtype == np.float64
    assert actual.count == expected.count.flat[0]
    mean, m2 = expected.mean.squeeze(axes), expected.m2.squeeze(axes)
    # Elements up to float32 are summed in float32 within a run; 8 units are 1e-6. In float64 it is
    # the means, rounded to doubles, that limit the merge.
    eps = np.finfo(np.float64 if x.dtype == np.float64 else np.float32).eps / np.finfo(float).eps
    magnitude = np.abs(mean) + np.sqrt(m2 / expected.count.flat[0])
    double = cases.FLOAT64
    assert_close(actual.mean, mean, dtype=double, magnitude=magnitude, ulps=8 * eps)
    if x.dtype == double:
        m2_magnitude = m2 + np.abs(mean) * np.sqrt(m2 * expected.count.flat[0])
        assert_close(actual.m2, m2, dtype=double, magnitude=m2_magnitude, ulps=64)
    else:
        assert_close(actual.m2, m2, dtype=double, magnitude=m2, ulps=1e-6 / np.finfo(float).eps)


@pytest.mark.parametrize("axes", [0, 2, (0, 1), (0, 2), (0, 1, 2), (1, -1)])
def test_of_any_axes(axes: Any, dtype: np.dtype[Any]) -> None:
    x = cases.make("ten_thousand", (40, 5, 6), dtype)
    assert_like_oracle(Moments.of(x, axes), x, axes)
    everything = Moments.of(x, None)
    assert everything.count == x.size
    assert np.shape(everything.mean) == ()


@pytest.mark.parametrize("cuts", [[20], [1], [39], [1, 2, 3], [10, 10, 30], range(1, 40)])
@pytest.mark.parametrize("name", ["standard_normal", "ten_thousand", "outlier_first", "sorted"])
def test_merging_parts_gives_the_whole(cuts: Any, name: str, dtype: np.dtype[Any]) -> None:
    x = cases.make(name, (40, 5, 6), dtype)
    parts = [Moments.of(part, (0, 2)) for part in np.split(x, cuts)]
    for merged in (
        reduce(lambda a, b: a + b, parts),
        Moments().merge(*parts),
        sum(parts, Moments()),
    ):
        assert_like_oracle(merged, x, (0, 2))
    assert_like_oracle(parts[0].merge(*parts[1:]), x, (0, 2))


def test_merge_is_exact_where_doubles_are() -> None:
    # 1, 2, 6 | 4, 12: the textbook's own numbers, all of them binary fractions.
    whole = Moments(2, [1.5], [0.5]) + Moments(2, [5.5], [12.5])
    assert (whole.count, whole.mean.tolist(), whole.m2.tolist()) == (4, [3.5], [0.5 + 12.5 + 16])


def test_merge_against_rational_arithmetic() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(400) * 0.1 + 1e6
    merged = Moments().merge(*(Moments.of(part, 0) for part in np.split(x, [7, 150, 151, 380])))
    exact = [Fraction(v) for v in x.tolist()]
    mean = sum(exact) / 400
    m2 = sum((v - mean) ** 2 for v in exact)
    assert abs(Fraction(float(merged.mean)) - mean) < Fraction(4e-16) * mean
    # The means are doubles near 1e6, so their differences are good to 1e-10, 1e-9 of 0.1.
    assert abs(Fraction(float(merged.m2)) - m2) < Fraction(1e-9) * m2


def test_empty_is_the_identity(rng: np.random.Generator) -> None:
    batch = Moments.of(rng.standard_normal((10, 3)), 0)
    for empty in (
        Moments(),
        Moments.of(np.empty((0, 3)), 0),
        Moments.of(np.ones((4, 3)), 0, np.zeros(4)),
    ):
        assert empty.count == 0
        assert np.isnan(empty.mean).all()
        assert np.isnan(empty.variance()).all()
        assert np.isnan(empty.std()).all()
        assert not np.any(empty.m2)
        for merged in (empty + batch, batch + empty, batch.merge(empty), empty.merge(batch, empty)):
            assert merged.count == batch.count
            assert_same_bits(merged.mean, batch.mean)
            assert_same_bits(merged.m2, batch.m2)
    assert (Moments() + Moments()).count == 0
    assert Moments().merge().count == 0


def test_variance_and_std() -> None:
    batch = Moments.of(np.array([[1.0, 4.0], [3.0, 4.0], [8.0, 4.0]]), 0)
    assert (batch.count, batch.mean.tolist(), batch.m2.tolist()) == (3, [4, 4], [26, 0])
    assert batch.variance().tolist() == [26 / 3, 0]
    assert batch.variance(1).tolist() == [13, 0]
    assert batch.variance(correction=1.5).tolist() == [26 / 1.5, 0]
    # Where no more than the correction is there, the divisor is the count.
    assert batch.variance(3).tolist() == batch.variance(7).tolist() == [26 / 3, 0]
    assert batch.std(1) == pytest.approx(np.sqrt([13, 0]))
    assert Moments.of(np.array([7.0]), 0).variance(1) == 0


def test_weights(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((30, 4)))
    weights = rng.integers(0, 4, 30)
    weighted = Moments.of(x, 0, weights=weights)
    assert weighted.count == weights.sum()
    assert_like_oracle(weighted, x, 0, weights[:, None])
    assert_like_oracle(weighted, np.repeat(x, weights, axis=0), 0)
    parts = Moments.of(x[:9], 0, weights[:9]) + Moments.of(x[9:], 0, weights[9:])
    assert parts.count == weighted.count
    assert parts.mean == pytest.approx(weighted.mean, rel=1e-13, abs=1e-15)
    assert parts.m2 == pytest.approx(weighted.m2, rel=1e-13)


def test_nan_is_lost_for_good_in_its_channel_alone() -> None:
    x = np.ones((6, 3))
    x[2, 1] = np.nan
    for batch in (Moments.of(x, 0), Moments.of(x[:3], 0) + Moments.of(x[3:], 0)):
        assert np.isnan(batch.mean).tolist() == [False, True, False]
        assert np.isnan(batch.m2).tolist() == [False, True, False]
        assert batch.variance()[[0, 2]].tolist() == [0, 0]


def test_a_merge_changes_no_operand(rng: np.random.Generator) -> None:
    a, b = (Moments.of(rng.standard_normal((5, 3)), 0) for _ in range(2))
    before = [v.copy() for m in (a, b) for v in (m.mean, m.m2)]
    merged = a + b
    try:
        merged.mean[...] = 0
    except ValueError:
        assert not merged.mean.flags.writeable
    for value, old in zip([v for m in (a, b) for v in (m.mean, m.m2)], before, strict=True):
        assert_same_bits(value, old)


def test_the_count_is_not_an_int32() -> None:
    many = Moments(2.0**40, [1.0], [0.0]) + Moments(2.0**40, [3.0], [0.0])
    assert many.count == 2.0**41
    assert many.mean.tolist() == [2]
    assert many.variance().tolist() == [1]


def test_equality() -> None:
    batch = Moments.of(np.array([[1.0, np.nan], [3.0, 4.0]]), 0)
    assert batch == Moments(2, [2.0, np.nan], [2.0, np.nan])
    for other in (
        Moments(3, [2.0, np.nan], [2.0, np.nan]),
        Moments(2, [2.5, np.nan], [2.0, np.nan]),
        Moments(2, [2.0, np.nan], [2.5, np.nan]),
        Moments(),
        "text",
    ):
        assert batch != other


def test_repr_tells_the_numbers() -> None:
    text = repr(Moments.of(np.array([1.0, 3.0]), 0))
    assert text.startswith("Moments(")
    assert "2" in text
