"""What must hold for any data at all: laws, tried by hypothesis."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

import cases
import fusebn
from conftest import ULPS, Array, assert_close, assert_same_bits, frozen, stat
from fusebn import Moments
from fusebn import _reference as reference

DTYPES = st.sampled_from(cases.DTYPES)
WIDE = st.sampled_from(cases.WIDE)


@st.composite
def blocks(draw: st.DrawFn, dtypes: Any = DTYPES, least: int = 1) -> Array:
    """Draw a block: ordinary values, then a spread and a mean that differ by channel."""
    dtype = draw(dtypes)
    outer = draw(st.integers(least, 70))
    channels = draw(st.integers(1, 40))
    inner = draw(st.sampled_from([1, 1, 1, 2, 3, 16, 17, 49]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = 2.0 ** draw(st.integers(-6, 6))
    mean = draw(st.sampled_from([0.0, 0.0, 1.0, -30.0, 1e3, 1e4])) * rng.random((channels, 1))
    return frozen(rng.standard_normal((outer, channels, inner)) * spread + mean, dtype)


@st.composite
def any_arrays(draw: st.DrawFn) -> Array:
    """Draw what a person would not think of: whatever bits hypothesis likes."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = draw(arrays.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=6))
    return frozen(draw(arrays.arrays(dtype, shape)))


def statistics_differ_by(
    actual: tuple[Array, Array], mean: Array, variance: Array, dtype: Any, extra: Any = 0
) -> None:
    """Assert that two ways to the same statistics end within rounding of one another."""
    of = stat(dtype)
    magnitude = np.abs(mean) + np.sqrt(np.abs(variance)) + extra
    assert_close(actual[0], mean, dtype=of, magnitude=magnitude, ulps=2 * ULPS[of])
    # Two results that each may err by 1e-6 in float32.
    ulps = 128 if of == cases.FLOAT64 else 2e-6 / np.finfo(np.float32).eps
    assert_close(actual[1], variance, dtype=of, magnitude=variance, ulps=ulps)


@given(any_arrays())
def test_the_oracle_agrees_whatever_the_bits(x: Array) -> None:
    with np.errstate(all="ignore"):
        largest = np.abs(x.astype(float)).max(initial=0, where=np.isfinite(x))
    # Beyond, squares overflow the type of the statistics: nothing finite is right.
    assume(largest <= 1e15)
    mean, variance = fusebn.moments(x, (0, 2))
    expected = reference.moments(x, (0, 2))
    statistics = (v.squeeze((0, 2)) for v in (expected.mean, expected.variance()))
    wanted_mean, wanted_variance = statistics
    of = stat(x.dtype)
    std = np.sqrt(wanted_variance)
    # Squares near the smallest subnormal have an absolute accuracy only.
    tiny = float(np.finfo(of).smallest_normal) / float(np.finfo(of).eps)
    assert_close(mean, wanted_mean, dtype=of, magnitude=np.abs(wanted_mean) + std, ulps=ULPS[of])
    ulps = 64 if of == cases.FLOAT64 else 1e-6 / np.finfo(np.float32).eps
    magnitude = wanted_variance + tiny
    assert_close(variance, wanted_variance, dtype=of, magnitude=magnitude, ulps=ulps)
    assert not (variance < 0).any()


@given(blocks())
def test_variance_is_never_negative_and_statistics_lie_in_range(x: Array) -> None:
    mean, variance = fusebn.moments(x, (0, 2))
    wide = x.astype(np.float64)
    least, most = wide.min((0, 2)), wide.max((0, 2))
    slack = 4 * np.finfo(mean.dtype).eps * (np.abs(least) + np.abs(most))
    assert (mean >= least - slack).all()
    assert (mean <= most + slack).all()
    assert (variance >= 0).all()
    # Popoviciu: no variance exceeds a quarter of the squared range.
    assert (variance <= (most - least) ** 2 / 4 * (1 + 2e-6)).all()


@given(blocks(WIDE), st.integers(-30, 30))
def test_scaling_by_a_power_of_two_is_exact(x: Array, power: int) -> None:
    mean, variance = fusebn.moments(x, (0, 2))
    scaled = fusebn.moments(frozen(np.ldexp(x, power)), (0, 2))
    assert_same_bits(scaled[0], np.ldexp(mean, power))
    assert_same_bits(scaled[1], np.ldexp(variance, 2 * power))


@given(blocks())
def test_mirror_images_have_mirrored_statistics(x: Array) -> None:
    mean, variance = fusebn.moments(x, (0, 2))
    mirrored = fusebn.moments(frozen(-x), (0, 2))
    assert_same_bits(mirrored[0] + 0, -mean + 0)  # adding 0 makes -0 and 0 one
    assert_same_bits(mirrored[1], variance)


@given(blocks(WIDE), st.sampled_from([-4096.0, -1.0, 0.5, 100.0, 2048.0]))
def test_shifting_moves_the_mean_alone(x: Array, shift: float) -> None:
    # Multiples of 1/64 below 2^18 stay exact when shifted, in float32 too.
    x = frozen(np.round(np.clip(x, -(2.0**17), 2.0**17) * 64) / 64, x.dtype)
    mean, variance = fusebn.moments(x, (0, 2))
    assert np.array_equal((x.astype(float) + shift).astype(x.dtype), x.astype(float) + shift)
    shifted = fusebn.moments(frozen(x + x.dtype.type(shift)), (0, 2))
    statistics_differ_by(shifted, mean + mean.dtype.type(shift), variance, x.dtype, abs(shift))


@given(blocks(), st.randoms(use_true_random=False))
def test_order_does_not_matter(x: Array, random: Any) -> None:
    outer, channels, _ = x.shape
    mean, variance = fusebn.moments(x, (0, 2))
    rows, columns = list(range(outer)), list(range(channels))
    random.shuffle(rows)
    random.shuffle(columns)
    statistics_differ_by(fusebn.moments(frozen(x[rows]), (0, 2)), mean, variance, x.dtype)
    permuted = fusebn.moments(frozen(x[:, columns]), (0, 2))
    statistics_differ_by(permuted, mean[columns], variance[columns], x.dtype)


@given(blocks(least=2), st.data())
def test_a_batch_split_anywhere_merges_to_itself(x: Array, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, x.shape[0]), max_size=5)))
    whole = Moments.of(x, (0, 2))
    merged = Moments().merge(*(Moments.of(part, (0, 2)) for part in np.split(x, cuts)))
    assert merged.count == whole.count
    of = stat(x.dtype)
    pair = merged.mean.astype(of), merged.variance().astype(of)
    wanted = whole.mean.astype(of), whole.variance().astype(of)
    if of == cases.FLOAT32:
        statistics_differ_by(pair, *wanted, x.dtype)
    else:
        # The means are doubles: they limit the merge where |mean| >> std.
        assert_close(pair[0], wanted[0], dtype=of, magnitude=np.abs(wanted[0]) + 1, ulps=32)
        magnitude = wanted[1] + np.abs(wanted[0]) * np.sqrt(wanted[1])
        assert_close(pair[1], wanted[1], dtype=of, magnitude=magnitude, ulps=128)


@given(blocks(WIDE), st.data())
def test_merging_is_commutative_and_associative(x: Array, data: st.DataObject) -> None:
    first, second = sorted(data.draw(st.integers(0, x.shape[0])) for _ in range(2))
    a, b, c = (Moments.of(part, (0, 2)) for part in np.split(x, [first, second]))
    for one, other in ((a + b, b + a), ((a + b) + c, a + (b + c))):
        assert one.count == other.count
        std = np.sqrt(np.nan_to_num(one.variance()))
        size = np.nan_to_num(np.abs(one.mean)) + std
        double = cases.FLOAT64
        assert_close(one.mean, other.mean, dtype=double, magnitude=size, ulps=8)
        assert_close(one.m2, other.m2, dtype=double, magnitude=one.count * size * std, ulps=64)


@given(blocks(), st.data())
def test_weights_are_repetitions(x: Array, data: st.DataObject) -> None:
    outer, _, inner = x.shape
    shape = (outer, inner)
    weights = data.draw(arrays.arrays(np.int64, shape, elements=st.integers(0, 3), fill=st.just(1)))
    assume(weights.sum() > 0)
    weighted = fusebn.moments(x, (0, 2), weights=weights)
    # The positions of the block, in one row, each as often as its weight says.
    flat = np.moveaxis(np.asarray(x), 1, 0).reshape(x.shape[1], -1)
    repeated = fusebn.moments(frozen(np.repeat(flat, weights.reshape(-1), axis=1)), 1)
    statistics_differ_by(weighted, *repeated, x.dtype)


@given(blocks(WIDE), st.integers(-20, 20))
def test_weights_matter_by_their_ratios_alone(x: Array, power: int) -> None:
    rng = np.random.default_rng(x.size)
    weights = frozen(rng.integers(1, 8, (x.shape[0], x.shape[2])), x.dtype)
    mean, variance = fusebn.moments(x, (0, 2), weights=weights)
    scaled = fusebn.moments(x, (0, 2), weights=frozen(np.ldexp(weights, power)))
    assert_same_bits(scaled[0], mean)
    assert_same_bits(scaled[1], variance)


@given(blocks())
def test_layouts_of_the_same_numbers_agree(x: Array) -> None:
    first = fusebn.fused_batch_norm(x, None, None, axis=1)
    last = fusebn.fused_batch_norm(frozen(np.moveaxis(x, 1, 2)), None, None, axis=2)
    statistics_differ_by(last[1:], first.mean, first.variance, x.dtype)
    moved = np.moveaxis(last.y, 2, 1)
    batch = reference.moments(x, (0, 2))
    magnitude = np.abs(first.y.astype(np.longdouble)) + 2
    if x.dtype == cases.FLOAT64:
        magnitude = magnitude + np.abs(batch.mean) * reference.rstd(batch.variance(), 0.001)
    assert_close(moved, first.y, dtype=x.dtype, magnitude=magnitude, ulps=2 * ULPS[x.dtype])


@given(blocks(least=2), st.sampled_from(cases.ACTIVATIONS), st.integers(1, 7))
@example(frozen(np.zeros((64, 3, 1)), np.float32), "relu", 3)
def test_bits_do_not_depend_on_threads(x: Array, activation: Any, threads: int) -> None:
    def everything() -> list[Array]:
        y, mean, variance = fusebn.fused_batch_norm(x, None, None, axis=1, activation=activation)
        dx = fusebn.fused_batch_norm_grad(
            x, x, None, None, mean, variance, axis=1, activation=activation
        ).dx
        return [y, mean, variance, dx]

    fusebn.set_num_threads(1)
    alone = everything()
    fusebn.set_num_threads(threads)
    for one, many in zip(alone, everything(), strict=True):
        assert_same_bits(many, one)


@given(blocks(least=8))
def test_y_has_mean_offset_and_variance_scale(x: Array) -> None:
    batch = reference.moments(x, (0, 2))
    assume((batch.variance() > 1e-3).all())
    y, _, _ = fusebn.fused_batch_norm(
        x, np.full(x.shape[1], 2.0), np.full(x.shape[1], 0.5), epsilon=0.0, axis=1
    )
    after = reference.moments(y, (0, 2))
    eps = 3e-2 if x.dtype.itemsize == 2 else 1e-5
    assert (np.abs(after.mean - 0.5) < eps).all()
    assert (np.abs(after.variance() / 4 - 1) < eps).all()


@given(blocks(WIDE, least=4), st.sampled_from([0.25, 3.0, -2.0]), st.sampled_from([0.0, -5.0]))
def test_affine_maps_of_x_do_not_change_y(x: Array, factor: float, shift: float) -> None:
    batch = reference.moments(x, (0, 2))
    std = np.sqrt(batch.variance())
    assume((std > 1e-2).all())
    y = fusebn.fused_batch_norm(x, None, None, epsilon=0.0, axis=1).y
    mapped = frozen(x * x.dtype.type(factor) + x.dtype.type(shift))
    other = fusebn.fused_batch_norm(mapped, None, None, epsilon=0.0, axis=1).y
    # The map itself is rounded: x by units of x and of the shift.
    rounding = (np.abs(x) + abs(shift / factor) + np.abs(batch.mean)) / std
    magnitude = np.abs(y) + 1 + rounding
    assert_close(
        np.sign(factor).astype(x.dtype) * other, y, dtype=x.dtype, magnitude=magnitude, ulps=32
    )


@given(blocks(WIDE, least=2), st.integers(0, 2**32 - 1))
def test_the_gradient_is_linear_in_dy(x: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dy = frozen(rng.standard_normal(x.shape), x.dtype)
    batch = reference.moments(x, (0, 2))
    mean, variance = (v.squeeze((0, 2)).astype(x.dtype) for v in (batch.mean, batch.variance()))
    ones = np.ones(x.shape[1])
    once = fusebn.fused_batch_norm_grad(dy, x, ones, ones, mean, variance, axis=1)
    for power in (-3, 5):
        scaled = frozen(np.ldexp(dy, power))
        more = fusebn.fused_batch_norm_grad(scaled, x, ones, ones, mean, variance, axis=1)
        for a, b in zip(once[:3], more[:3], strict=True):
            assert_same_bits(b, np.ldexp(a, power))


@given(blocks(least=2))
def test_inference_with_the_batch_statistics_is_training(x: Array) -> None:
    training = fusebn.fused_batch_norm(x, None, None, axis=1, correction=0)
    again = fusebn.fused_batch_norm(
        x, None, None, training.mean, training.variance, is_training=False, axis=1
    )
    # But for the mean, which was rounded on its way through the caller.
    batch = reference.moments(x, (0, 2))
    inverse = reference.rstd(batch.variance(), 0.001)
    rounding = np.abs(batch.mean) * inverse * float(np.finfo(stat(x.dtype)).eps)
    eps = float(np.finfo(np.float32 if x.dtype.itemsize < 4 else x.dtype).eps)
    own = {2: 2**-10 if x.dtype == cases.FLOAT16 else 2**-7, 4: 8 * eps, 8: 8 * eps}
    y = training.y.astype(np.longdouble)
    error = np.abs(again.y.astype(np.longdouble) - y)
    assert (error <= own[x.dtype.itemsize] * (np.abs(y) + 1) + 2 * rounding).all()


@given(blocks(), st.sampled_from(cases.ACTIVATIONS))
def test_a_channel_does_not_see_the_others(x: Array, activation: Any) -> None:
    y, mean, variance = fusebn.fused_batch_norm(x, None, None, axis=1, activation=activation)
    changed = np.array(x)
    changed[:, 0] = np.nan
    other = fusebn.fused_batch_norm(frozen(changed), None, None, axis=1, activation=activation)
    assert_same_bits(other.y[:, 1:], y[:, 1:])
    assert_same_bits(other.mean[1:], mean[1:])
    assert_same_bits(other.variance[1:], variance[1:])
