"""What the tests share: element types, the one comparison, and arrays as a caller may hand them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

import cases
from devices import (  # noqa: F401  # for pytest, which looks for them here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_ignore_collect,
)
from fusebn import _core
from fusebn import _reference as reference

Array = NDArray[Any]

# The same examples every time: a failure that nobody can repeat helps nobody.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, max_examples=60
)
hypothesis.settings.load_profile("repeatable")


def stat(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of statistics and parameters for elements of dtype."""
    return cases.FLOAT64 if dtype == cases.FLOAT64 else cases.FLOAT32


def assert_close(
    actual: ArrayLike,
    expected: ArrayLike,
    *,
    dtype: np.dtype[Any],
    magnitude: ArrayLike,
    ulps: float,
) -> None:
    """Assert |actual - expected| <= ulps * eps(dtype) * magnitude, elementwise.

    The magnitude is that of the terms the result was made from: what a rounding error is
    proportional to. One smallest subnormal is always allowed. NaN must meet NaN, and an infinity
    its like; an expected value past the range of dtype may be an infinity or the greatest number.
    """
    actual = np.asarray(actual)
    assert actual.dtype == dtype, f"dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == np.shape(expected), f"{actual.shape}, expected {np.shape(expected)}"
    info = ml_dtypes.finfo(dtype)
    got, want = actual.astype(np.longdouble), np.asarray(expected).astype(np.longdouble)
    want = np.where(np.abs(want) > float(info.max), np.copysign(np.inf, want), want)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        tolerance = ulps * float(info.eps) * np.abs(np.asarray(magnitude, np.longdouble))
        error = np.abs(got - want)
        edge = np.isinf(want) & (got == np.copysign(float(info.max), want))
        fine = (got == want) | (np.isnan(got) & np.isnan(want)) | edge
        fine |= error <= tolerance + 2 * float(info.smallest_subnormal)
    if not fine.all():
        with np.errstate(all="ignore"):
            badness = np.where(fine, -1, np.nan_to_num(error / tolerance, nan=np.inf))
        worst = np.unravel_index(np.argmax(badness), fine.shape)
        allowed = np.broadcast_to(tolerance, fine.shape)[worst]
        raise AssertionError(
            f"{np.count_nonzero(~fine)} of {fine.size} differ; worst at {tuple(map(int, worst))}: "
            f"got {got[worst]}, expected {want[worst]}, error {error[worst]:.3g}, "
            f"allowed {allowed:.3g}"
        )


def assert_same_bits(actual: ArrayLike, expected: ArrayLike) -> None:
    """Assert equality to the last bit, the sign of zero and NaN included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def frozen(array: ArrayLike, dtype: np.dtype[Any] | None = None) -> Array:
    """Return a read-only copy: a test that hands it out knows it comes back unchanged."""
    copy = np.array(array, dtype=dtype)
    copy.setflags(write=False)
    return copy


def unwritten(like: Array) -> Array:
    """Return an output full of NaN: an element the core forgets cannot pass for an answer."""
    return np.full(like.shape, np.nan).astype(like.dtype)


# How many units in the last place each type may err by, on the magnitudes stated below. Half
# types are computed in float32, so one unit is their own rounding with room to spare.
ULPS = {cases.FLOAT16: 1, cases.BFLOAT16: 1, cases.FLOAT32: 8, cases.FLOAT64: 32}


def parameters(
    rng: np.random.Generator, channels: int, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """Return a scale and an offset: of either sign, and around 1."""
    scale = rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)
    return frozen(scale, stat(dtype)), frozen(rng.standard_normal(channels), stat(dtype))


def assert_moments(
    actual: tuple[Array, Array], x: Array, axes: Any, weights: Any = None, *, correction: float = 0
) -> None:
    """Assert mean and variance, shaped as the kept axes, against the oracle.

    The mean errs by units of |mean| + std; the variance by 1e-6 of itself in float32, whatever
    the mean, and is never below 0.
    """
    batch = reference.moments(x, axes, weights)
    mean, variance = (v.squeeze(axes) for v in (batch.mean, batch.variance(correction)))
    of = stat(x.dtype)
    ulps = 64 if of == cases.FLOAT64 else 1e-6 / np.finfo(np.float32).eps
    magnitude = np.abs(mean) + np.sqrt(variance)
    if of == cases.FLOAT64:
        # Nothing is wider, so distances from the first value are rounded like that value.
        magnitude = magnitude + np.max(np.abs(x), axis=axes, initial=0, where=np.isfinite(x))
    assert_close(actual[0], mean, dtype=of, magnitude=magnitude, ulps=ULPS[of])
    assert_close(actual[1], variance, dtype=of, magnitude=variance, ulps=ulps)
    assert not (actual[1] < 0).any()


def assert_forward(
    actual: tuple[Array, Array, Array],
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array | None = None,
    variance: Array | None = None,
    epsilon: float = 0.001,
    is_training: bool = True,
    exponential_avg_factor: float = 1.0,
    *,
    axis: int = -1,
    **options: Any,
) -> None:
    """Assert what fused_batch_norm returned against the oracle.

    y errs by units of the terms it adds up, |scale| * (|xhat| + 1) + |offset| + |residual|: the 1
    is the error of the mean, in units of std. It is not proportional to the mean, but in float64,
    where the mean has no wider type to be kept in.
    """
    want = reference.fused_batch_norm(
        x, scale, offset, mean, variance, epsilon, is_training, exponential_avg_factor, axis=axis,
        **options,
    )  # fmt: skip
    batch = reference.fused_batch_norm(
        x, None, None, mean, variance, epsilon, is_training, axis=axis,
        weights=options.get("weights"), correction=0,
    )  # fmt: skip
    across = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    magnitude = np.abs(batch.y) + 1
    if x.dtype == cases.FLOAT64 and is_training:
        seen = np.nan_to_num(np.abs(batch.mean) * reference.rstd(batch.variance, epsilon))
        magnitude = magnitude + np.expand_dims(seen, across)
    if scale is not None:
        magnitude = magnitude * np.abs(np.expand_dims(scale, across))
    if offset is not None:
        magnitude = magnitude + np.abs(np.expand_dims(offset, across))
    if options.get("residual") is not None:
        magnitude = magnitude + np.abs(reference.wide(options["residual"]))
    assert_close(actual[0], want.y, dtype=x.dtype, magnitude=magnitude, ulps=ULPS[x.dtype])

    of = stat(x.dtype)
    if not is_training or (exponential_avg_factor != 1 and np.size(x) == 0):
        assert_same_bits(actual[1], np.asarray(mean, of))
        assert_same_bits(actual[2], np.asarray(variance, of))
        return
    old_mean, old_variance = (0 if exponential_avg_factor == 1 else v for v in (mean, variance))
    magnitude = np.abs(batch.mean) + np.sqrt(batch.variance) + np.abs(old_mean)
    assert_close(actual[1], want.mean, dtype=of, magnitude=magnitude, ulps=ULPS[of])
    magnitude = np.abs(want.variance) + np.abs(old_variance)
    ulps = 64 if of == cases.FLOAT64 else 1e-6 / np.finfo(np.float32).eps
    assert_close(actual[2], want.variance, dtype=of, magnitude=magnitude, ulps=ulps)
    assert not (actual[2] < 0).any()


def away_from_kinks(
    dy: Array,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    epsilon: float = 0.001,
    *,
    axis: int = -1,
    residual: Array | None = None,
) -> Array:
    """Return dy with 0 wherever rounding may decide on which side of 0 or of 6 an activation is.

    There the derivative jumps, and any backend's answer is as good as the oracle's.
    """
    across = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    spread = [
        None if v is None else np.expand_dims(v, across) for v in (mean, variance, scale, offset)
    ]
    z = reference.preactivation(x, *spread, epsilon, residual)
    near = 1e-5 * (1 + np.abs(z))
    kept = (np.abs(z) > near) & (np.abs(z - 6) > near)
    return frozen(np.where(kept, dy, np.zeros_like(dy)))


def assert_gradients(
    actual: tuple[Array, Array | None, Array | None, Array | None],
    dy: Array,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    epsilon: float = 0.001,
    is_training: bool = True,
    *,
    axis: int = -1,
    **options: Any,
) -> None:
    """Assert what fused_batch_norm_grad returned against the oracle.

    Sums err by units of the sums of magnitudes; dx by units of the terms it adds up.
    """
    want = reference.fused_batch_norm_grad(
        dy, x, scale, offset, mean, variance, epsilon, is_training, axis=axis, **options
    )
    residual, weights = options.get("residual"), options.get("weights")
    across = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean, variance, dmean, dvariance, scale_, offset_ = (
        reference.wide(0 if v is None else np.expand_dims(v, across))
        for v in (mean, variance, options.get("dmean"), options.get("dvariance"), scale, offset)
    )
    scale_ = np.abs(scale_) if scale is not None else reference.wide(1)
    inverse, of = reference.rstd(variance, epsilon), stat(x.dtype)
    centred = np.abs(reference.wide(x) - mean)
    g = np.abs(reference.wide(dy))
    if options.get("activation") in ("silu", "gelu"):
        # Their derivatives bend: an error in what the activation saw becomes one of the same size.
        seen = centred * inverse * scale_ + np.abs(offset_)
        g = g * (1.13 + seen + (0 if residual is None else np.abs(reference.wide(residual))))
    sum_g, sum_g_x = g.sum(across, keepdims=True), (g * centred).sum(across, keepdims=True)
    magnitude = scale_ * inverse * g
    if is_training:
        n = np.prod([x.shape[i] for i in across])
        w = reference.wide(1)
        if weights is not None:
            w = np.expand_dims(np.broadcast_to(weights, [x.shape[i] for i in across]), axis)
            n = max(float(np.sum(w, dtype=np.float64)), 1e-300)
        through = scale_ * inverse * (sum_g + centred * inverse**2 * sum_g_x)
        magnitude = magnitude + w / n * (through + np.abs(dmean) + 2 * centred * np.abs(dvariance))
    assert_close(actual[0], want.dx, dtype=x.dtype, magnitude=magnitude, ulps=ULPS[x.dtype])
    if scale is None:
        assert actual[1] is None
    else:
        magnitude = (inverse * sum_g_x).squeeze(across)
        assert_close(actual[1], want.dscale, dtype=of, magnitude=magnitude, ulps=ULPS[of])
    if offset is None:
        assert actual[2] is None
    else:
        magnitude = sum_g.squeeze(across)
        assert_close(actual[2], want.doffset, dtype=of, magnitude=magnitude, ulps=ULPS[of])
    if residual is None:
        assert actual[3] is None
    else:
        assert_close(actual[3], want.dresidual, dtype=x.dtype, magnitude=g, ulps=ULPS[x.dtype])


@pytest.fixture(params=cases.DTYPES, ids=lambda dtype: dtype.name)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a generator seeded by the test's own name: no order of tests changes its numbers."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(autouse=True)
def untouched_settings() -> Iterator[None]:
    """Put the process-wide settings back, whatever a test did to them."""
    threads, instruction_set = _core.get_num_threads(), _core.instruction_set()
    streaming = _core.streaming_bytes()
    yield
    _core.set_streaming_bytes(streaming)
    _core.set_num_threads(threads)
    _core.set_instruction_set(instruction_set)
