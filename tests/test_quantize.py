"""`FakeQuantize` against a search over all the values that its bits can say."""

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusebn
from fusebn.quantize import FakeQuantize, Transform

VALUES = np.array(
    [0, -0.0, 1, -1, 0.5, -0.5, 2.5, 3.75, -7.1, 1e-3, -1e-3, 9.99, 1e-30, 6.02, -3.3], "float32"
)


def nearest(x, bits, symmetric, low, high):
    """The value nearest to x, found by looking at all: ties to the even q."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step, zero, codes = max(-low, high) / most, 0, range(-most, most + 1)
    else:
        step, codes = (high - low) / (2**bits - 1), range(2**bits)
        zero = round(-low / step)
    x = min(
        max(x, 2 * low - high), 2 * high - low
    )  # as far out as anything: doubles would be equal
    return min(((q - zero) * step for q in codes), key=lambda value: abs(value - x)), step


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_takes_the_nearest_value(bits, symmetric):
    for limits in ("minmax", (-3.0, 4.0), (1.0, 2.0), (-5.0, -1.0), (-1e-20, 1.3e-20)):
        low, high = (VALUES.min(), VALUES.max()) if limits == "minmax" else limits
        y = FakeQuantize(bits, symmetric=symmetric, limits=limits)(VALUES)
        assert y.dtype == np.float32
        for x, got in zip(VALUES, y, strict=True):
            x, got = float(x), float(got)
            wanted, step = nearest(x, bits, symmetric, float(low), float(high))
            if abs(got - wanted) > 1e-5 * max(abs(wanted), step):
                # Halfway between two float32 may take either.
                assert abs(x / step - np.floor(x / step) - 0.5) < 1e-4
                assert abs(abs(got - wanted) - step) < 1e-4 * step


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_ties_go_to_the_even_code(bits):
    most = 2.0 ** (bits - 1) - 1
    quantize = FakeQuantize(bits, symmetric=True, limits=(-most, most))  # a step of 1
    assert quantize(np.array([0.5, 1.5, -0.5, 0.75], "float32")).tolist() == [
        0,
        min(2, most),
        0,
        1,
    ]


@given(
    x=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
)
def test_laws(x, bits, symmetric):
    x = np.array(x, "float32")
    x[np.abs(x) < 1e-30] = 0
    quantize = FakeQuantize(bits, symmetric=symmetric)
    y = quantize(x)
    largest = float(np.abs(x).max())
    levels = 2 ** (bits - symmetric) - 1
    step = (max(x.max(), 0) - min(x.min(), 0)) / levels if not symmetric else largest / levels
    # Half a step, and as much again at the ends, where a rounded zero moves them.
    assert (np.abs(y - x) <= step * (1 + 1e-3) + 1e-6 * largest).all()
    assert (y[x == 0] == 0).all()
    order = np.argsort(x)
    assert (np.diff(y[order]) >= 0).all()
    assert len(np.unique(y)) <= 2**bits
    again = FakeQuantize(bits, symmetric=symmetric, limits=(-1e6, 1.5e6))
    assert (again(again(x)) == again(x)).all()


def test_nan_stays_and_infinities_are_clipped():
    quantize = FakeQuantize(8, symmetric=True, limits=(-127.0, 127.0))
    x = np.array([np.nan, np.inf, -np.inf, 3.2], "float32")
    np.testing.assert_array_equal(quantize(x), np.array([np.nan, 127, -127, 3], "float32"))


def test_what_is_not_finite_stays_in_its_place():
    x = np.array([np.nan, 1.0, np.inf, -2.0, 0.5, -np.inf], "float32")
    finite = np.array([0.0, 1.0, 1.0, -2.0, 0.5, -2.0], "float32")
    for quantize in (FakeQuantize(8), FakeQuantize(8, limits="moving")):
        y = quantize(x)
        assert np.isnan(y[0])
        np.testing.assert_array_equal(y[1:], quantize(finite)[1:])
        assert (quantize.gradient(x, np.full_like(x, 3))[[1, 3, 4]] == 3).all()


def test_nothing_but_zeros_and_less_than_a_normal_number():
    zeros = np.zeros(3, "float32")
    for symmetric in (False, True):
        assert (FakeQuantize(4, symmetric=symmetric)(zeros) == 0).all()
        tiny = np.array([1e-44, -1e-44], "float32")
        assert (FakeQuantize(4, symmetric=symmetric)(tiny) == 0).all()


def test_limits_far_apart_do_not_overflow():
    x = np.array([-3e38, 0, 3e38], "float32")
    y = FakeQuantize(8)(x)
    assert np.isfinite(y).all()
    assert np.abs(y / 3e38 - x / 3e38).max() < 1 / 127


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_each_dtype_is_computed_in_its_own_or_float32(dtype):
    x = np.linspace(-2, 3, 41).astype(dtype)
    y = FakeQuantize(5)(x)
    assert y.dtype == dtype
    wide = x if dtype == "float64" else x.astype("float32")
    np.testing.assert_array_equal(y, FakeQuantize(5)(wide).astype(dtype))


def test_each_index_of_an_axis_has_its_limits():
    x = np.array([[1.0, -2.0, 0.3], [100.0, 50.0, -7.0]], "float32")
    y = FakeQuantize(4, axis=0)(x)
    for row, wanted in zip(y, x, strict=True):
        np.testing.assert_array_equal(row, FakeQuantize(4)(wanted))
    columns = FakeQuantize(4, axis=-1)(x)
    np.testing.assert_array_equal(columns[:, 1], FakeQuantize(4)(x[:, 1]))


def test_moving_limits_and_what_they_forget():
    quantize = FakeQuantize(8, limits="moving", decay=0.75)
    assert quantize.low is None
    quantize(np.array([-1.0, 5.0], "float32"), training=True)
    assert (quantize.low, quantize.high, quantize.steps) == (-1, 5, 1)
    quantize(np.array([-3.0, 9.0], "float32"), training=True)
    assert (quantize.low, quantize.high, quantize.steps) == (-1.5, 6, 2)
    quantize(np.array([np.nan, 1.0], "float32"), training=True)
    assert (quantize.low, quantize.high, quantize.steps) == (-1.5, 6, 3)
    x = np.array([-3.0, 0.1, 9.0], "float32")
    y = quantize(x)
    assert (quantize.low, quantize.high, quantize.steps) == (-1.5, 6, 3)
    np.testing.assert_array_equal(y, FakeQuantize(8, limits=(-1.5, 6.0))(x))


def test_delay_observes_and_waits():
    quantize = FakeQuantize(2, limits="moving", delay=2, decay=0.5)
    x = np.array([-1.0, 0.4, 2.0], "float32")
    for _ in range(2):
        np.testing.assert_array_equal(quantize(x, training=True), x)
        np.testing.assert_array_equal(quantize.gradient(x, x), x)
    assert (quantize(x, training=True) == [-1, 0, 2]).all()
    assert (quantize(x) == [-1, 0, 2]).all()
    assert quantize.steps == 3


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_passes_where_nothing_is_clipped(symmetric):
    quantize = FakeQuantize(3, symmetric=symmetric, limits=(-1.0, 3.0))
    x, dy = np.linspace(-5, 5, 101).astype("float32"), np.arange(1, 102, dtype="float32")
    y, dx = quantize(x), quantize.gradient(x, dy)
    inside = (y > y.min()) & (y < y.max())
    assert (dx[inside] == dy[inside]).all()
    step = np.diff(np.unique(y)).min()
    outside = (x > y.max() + 0.51 * step) | (x < y.min() - 0.51 * step)
    assert outside.any()
    assert (dx[outside] == 0).all()
    edge = ~inside & (x < y.max() + 0.49 * step) & (x > y.min() - 0.49 * step)
    assert edge.any()
    assert (dx[edge] == dy[edge]).all()


def test_state_and_config():
    quantize = FakeQuantize(5, symmetric=True, axis=0, limits="moving", decay=0.5, delay=1)
    x = np.array([[1.0, -2.0], [3.0, 0.5]], "float32")
    empty = FakeQuantize(**quantize.config())
    empty.load_state_dict(quantize.state_dict())
    assert empty.low is None
    quantize(x, training=True)
    other = FakeQuantize(**quantize.config())
    other.load_state_dict(quantize.state_dict())
    for _ in range(2):
        np.testing.assert_array_equal(quantize(2 * x, training=True), other(2 * x, training=True))
    assert other.state_dict().keys() == {"low", "high", "steps"}
    assert repr(other) == (
        "FakeQuantize(5, symmetric=True, axis=0, limits='moving', decay=0.5, delay=1)"
    )
    with pytest.raises(ValueError, match=r"`x` must have a shape whose limits are those seen"):
        quantize(np.zeros((3, 2), "float32"))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"bits": 1}, ValueError, "`bits` must lie in [2, 16]; got 1"),
        ({"bits": 17}, ValueError, "`bits` must lie in [2, 16]; got 17"),
        ({"bits": 4.5}, TypeError, "`bits`"),
        ({"limits": (1.0, 1.0)}, ValueError, "low < high; got (1.0, 1.0)"),
        ({"limits": (2.0, 1.0)}, ValueError, "low < high"),
        ({"limits": (0.0, np.nan)}, ValueError, "low < high"),
        ({"limits": (0.0, np.inf)}, ValueError, "two finite numbers"),
        ({"limits": 3}, TypeError, "`limits` must be 'minmax', 'moving', or two"),
        ({"limits": "max"}, ValueError, "one of 'minmax', 'moving'"),
        ({"decay": 1.5}, ValueError, "`decay`"),
        ({"delay": -1}, ValueError, "`delay` must not be negative"),
        ({"delay": 0.5}, TypeError, "`delay`"),
        ({"symmetric": 2}, TypeError, "`symmetric`"),
        ({"axis": 0.5}, TypeError, "`axis`"),
    ],
)
def test_errors(arguments, kind, text):
    with pytest.raises(kind) as caught:
        FakeQuantize(**arguments)
    assert str(caught.value).startswith("FakeQuantize: ")
    assert text in str(caught.value)


def test_errors_of_calls_and_states():
    with pytest.raises(ValueError, match="axis"):
        FakeQuantize(axis=2)(np.zeros(3, "float32"))
    with pytest.raises(TypeError, match="`x` must be a NumPy array"):
        FakeQuantize()([1.0, 2.0])
    with pytest.raises(TypeError, match="`x` must be an array of float16"):
        FakeQuantize()(np.array([1, 2]))
    quantize = FakeQuantize(limits="moving")
    for state, text in (
        ({}, "have the keys steps"),
        ({"steps": 1, "low": 0.0}, "have the keys steps"),
        ({"steps": -1}, "`steps` must not be negative"),
        ({"steps": 1, "low": np.zeros(2), "high": np.zeros(3)}, "`low`"),
    ):
        with pytest.raises(ValueError, match="load_state_dict") as caught:
            quantize.load_state_dict(state)
        assert text in str(caught.value)
    assert quantize.state_dict().keys() == {"steps"}


def test_is_a_transform():
    assert isinstance(FakeQuantize(), Transform)
    assert fusebn.quantize.FakeQuantize is FakeQuantize
