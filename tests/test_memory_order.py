"""However the numbers lie in memory, they are the same numbers; and inputs are only read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
import fusebn
from conftest import (
    Array,
    assert_forward,
    assert_gradients,
    assert_moments,
    assert_same_bits,
    frozen,
    parameters,
    stat,
    unwritten,
)
from fusebn import _core
from fusebn import _reference as reference

SHAPE = (4, 3, 6, 5)


def misaligned(x: Array) -> Array:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def every_second(x: Array) -> Array:
    memory = np.zeros([2 * n for n in x.shape], x.dtype)
    view = memory[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def reversed_in_memory(x: Array) -> Array:
    backwards = (slice(None, None, -1),) * x.ndim
    return np.array(x[backwards])[backwards]


def framed(x: Array) -> Array:
    memory = np.full([n + 2 for n in x.shape], 7).astype(x.dtype)
    view = memory[(slice(1, -1),) * x.ndim]
    view[...] = x
    return view


def swapped(x: Array) -> Array:
    return x.astype(x.dtype.newbyteorder()) if x.dtype != cases.BFLOAT16 else np.array(x)


def ordered(*order: int) -> Callable[[Array], Array]:
    """Return a layout that keeps the axes in that order in memory."""
    return lambda x: np.array(x.transpose(order), order="C").transpose(np.argsort(order))


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": lambda x: np.array(x, order="C"),
    "Fortran": lambda x: np.array(x, order="F"),
    "channels last in memory": ordered(0, 2, 3, 1),
    "channels first in memory": ordered(0, 3, 1, 2),
    "outer axes swapped": ordered(2, 1, 0, 3),
    "sliced": every_second,
    "framed": framed,
    "reversed": reversed_in_memory,
    "misaligned": misaligned,
    "byte-swapped": swapped,
    "swapped and sliced": lambda x: every_second(swapped(x)),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Array], Array]:
    return LAYOUTS[request.param]


def laid(layout: Callable[[Array], Array], x: Array) -> Array:
    """Return x in a layout, read-only, after a look that it still is x."""
    array = layout(x)
    assert np.array_equal(array, x)
    array.setflags(write=False)
    return array


def test_the_layouts_are_what_they_say() -> None:
    x = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    assert LAYOUTS["Fortran"](x).flags.f_contiguous
    assert not LAYOUTS["misaligned"](x).flags.aligned
    assert not LAYOUTS["byte-swapped"](x).dtype.isnative
    for name in ("sliced", "framed", "reversed", "channels last in memory", "outer axes swapped"):
        assert not LAYOUTS[name](x).flags.c_contiguous, name
    assert LAYOUTS["reversed"](x).strides[0] < 0


@pytest.mark.parametrize("axes", [(0, 2, 3), (0, 1, 2), (1,), (0, 3), (0, 1, 2, 3)])
def test_moments(layout: Any, axes: Any, dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    x = laid(layout, frozen(rng.standard_normal(SHAPE), dtype))
    assert_moments(fusebn.moments(x, axes), np.array(x, dtype), axes)


@pytest.mark.parametrize("axes", [(0, 2, 3), (0, 1, 2), (1, 2), (0, 3)])
def test_moments_with_weights(layout: Any, axes: Any, rng: np.random.Generator) -> None:
    # Weights in C order against x in any: each position must still meet its own.
    x = frozen(rng.standard_normal(SHAPE))
    weights = rng.random([SHAPE[i] for i in axes])
    kept = [i for i in range(4) if i not in axes]
    actual = fusebn.moments(laid(layout, x), axes, weights=laid(np.asfortranarray, weights))
    assert_moments(actual, x, axes, np.expand_dims(weights, kept))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("with_out", [False, True])
def test_forward(
    layout: Any, axis: int, with_out: bool, dtype: np.dtype[Any], rng: np.random.Generator
) -> None:
    plain, plain_residual = (frozen(rng.standard_normal(SHAPE), dtype) for _ in range(2))
    positions = [n for i, n in enumerate(SHAPE) if i != axis % 4]
    weights = frozen(rng.integers(0, 3, positions))
    scale, offset = parameters(rng, SHAPE[axis], dtype)
    options: dict[str, Any] = {"axis": axis, "activation": "relu", "weights": weights}
    # The residual lies otherwise than x, and the output otherwise than both.
    residual = laid(LAYOUTS["Fortran"], plain_residual)
    out = every_second(unwritten(plain)) if with_out else None
    x = laid(layout, plain)
    actual = fusebn.fused_batch_norm(x, scale, offset, residual=residual, out=out, **options)
    if with_out:
        assert actual.y is out
    assert actual.y.dtype.isnative
    assert_forward(actual, plain, scale, offset, residual=plain_residual, **options)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_backward(layout: Any, axis: int, dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    plain, plain_dy = (frozen(rng.standard_normal(SHAPE), dtype) for _ in range(2))
    across = tuple(i for i in range(4) if i != axis % 4)
    weights = frozen(rng.integers(0, 3, [SHAPE[i] for i in across]))
    batch = reference.moments(plain, across, np.expand_dims(weights, axis))
    statistics = tuple(
        frozen(v.squeeze(across), stat(dtype)) for v in (batch.mean, batch.variance())
    )
    scale, offset = parameters(rng, SHAPE[axis], dtype)
    options: dict[str, Any] = {"axis": axis, "weights": weights}
    for x_layout, dy_layout in ((layout, LAYOUTS["Fortran"]), (LAYOUTS["C"], layout)):
        actual = fusebn.fused_batch_norm_grad(
            laid(dy_layout, plain_dy), laid(x_layout, plain), scale, offset, *statistics,
            residual=laid(LAYOUTS["sliced"], plain), **options,
        )  # fmt: skip
        assert_gradients(
            actual, plain_dy, plain, scale, offset, *statistics, residual=plain, **options
        )


def test_batch_normalization(layout: Any, rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal(SHAPE), np.float32)
    mean, scale = rng.standard_normal((3, 1, 1)), rng.standard_normal((4, 1, 1, 5))
    variance = rng.random((6, 1))
    expected = fusebn.batch_normalization(x, mean, variance, None, scale, 0.1)
    actual = fusebn.batch_normalization(
        laid(layout, x), laid(layout_of_rank(layout, 3), mean), variance, None, scale, 0.1
    )
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
    wanted = reference.normalize(x, mean, variance, scale, None, 0.1)
    assert actual == pytest.approx(wanted.astype(np.float32), rel=1e-5, abs=1e-5)


def layout_of_rank(layout: Any, rank: int) -> Any:
    """Return the layout, or one that works for any rank where it names four axes."""
    named = ("channels last in memory", "channels first in memory", "outer axes swapped")
    return LAYOUTS["Fortran"] if any(layout is LAYOUTS[name] for name in named) else layout


def test_other_statistics(layout: Any, rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal(SHAPE), np.float32)
    weights = frozen(rng.random(SHAPE), np.float32)
    actual = fusebn.weighted_moments(laid(layout, x), (0, 2), laid(layout, weights))
    assert_moments(actual, x, (0, 2), weights)
    plain = fusebn.sufficient_statistics(x, (0, 2), np.float32(0.5))
    other = fusebn.sufficient_statistics(laid(layout, x), (0, 2), np.float32(0.5))
    for a, b in zip(plain, other, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)


def test_parameters_in_any_layout(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((20, 5)), np.float32)
    vectors = [frozen(rng.random(5), np.float32) for _ in range(4)]
    options: dict[str, Any] = {"axis": 1, "exponential_avg_factor": 0.5}
    expected = fusebn.fused_batch_norm(x, *vectors, **options)
    for name in ("sliced", "framed", "reversed", "misaligned", "byte-swapped"):
        actual = fusebn.fused_batch_norm(x, *(laid(LAYOUTS[name], v) for v in vectors), **options)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


def test_moving_averages_in_any_layout(rng: np.random.Generator) -> None:
    value = frozen(rng.standard_normal(SHAPE), np.float32)
    expected = np.zeros(SHAPE, np.float32)
    fusebn.assign_moving_average(expected, value, 0.5)
    for name, layout in LAYOUTS.items():
        variable = layout(np.zeros(SHAPE, np.float32))
        assert fusebn.assign_moving_average(variable, laid(layout, value), 0.5) is variable, name
        assert np.array_equal(variable, expected), name


# --- out= and in place ------------------------------------------------------------------------

# y has the byte order of the machine, so a byte-swapped x cannot take it.
IN_PLACE = [name for name in LAYOUTS if name not in ("byte-swapped", "swapped and sliced")]


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("is_training", [True, False])
def test_in_place(
    name: str, axis: int, is_training: bool, dtype: np.dtype[Any], rng: np.random.Generator
) -> None:
    plain = frozen(rng.standard_normal(SHAPE), dtype)
    scale, offset = parameters(rng, SHAPE[axis], dtype)
    given = {} if is_training else {"mean": offset, "variance": np.abs(scale)}
    x = LAYOUTS[name](plain)
    options: dict[str, Any] = {**given, "is_training": is_training, "axis": axis}
    actual = fusebn.fused_batch_norm(x, scale, offset, out=x, **options)
    assert actual.y is x
    assert_forward(actual, plain, scale, offset, **options)


@pytest.mark.parametrize("block", [shape.block for shape in cases.SHAPES[-8:]])
def test_in_place_on_every_walk(block: cases.Block, dtype: np.dtype[Any]) -> None:
    # Large enough for several tasks, each of which must have read what another overwrites.
    plain = cases.make("standard_normal", block, dtype)
    expected = fusebn.fused_batch_norm(plain, None, None, axis=1)
    x = np.array(plain)
    actual = fusebn.fused_batch_norm(x, None, None, axis=1, out=x)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def test_an_output_changes_nothing_around_it(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((6, 5, 7)), np.float32)
    memory = np.full((8, 7, 9), 7, np.float32)
    out = memory[1:-1, 1:-1, 1:-1]
    fusebn.fused_batch_norm(x, None, None, axis=1, out=out)
    assert_same_bits(np.array(out), fusebn.fused_batch_norm(x, None, None, axis=1).y)
    out[...] = 7
    assert (memory == 7).all()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 33, 1000, 4099])
def test_nothing_is_written_past_the_end(size: int, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (size, 3, 1), dtype)[:, :, 0]
    memory = np.full(size * 3 + 64, 7).astype(dtype)
    fusebn.fused_batch_norm(x, None, None, axis=1, out=memory[32:-32].reshape(size, 3))
    assert (memory[:32] == 7).all()
    assert (memory[-32:] == 7).all()


# --- streamed stores --------------------------------------------------------------------------
#
# Past the last-level cache, outputs are written around it, by instructions that want aligned
# addresses. That must not be visible: not at the edges, and not in one bit.


@pytest.fixture
def always_streaming() -> None:
    """Stream however small the output is."""
    _core.set_streaming_bytes(0)
    assert _core.streaming_bytes() == 0


STREAMED = [(67, 3, 1), (19, 17, 1), (9, 128, 1), (3, 5, 49), (2, 3, 130), (40_009, 5, 1)]


@pytest.mark.parametrize("block", STREAMED, ids=str)
@pytest.mark.parametrize("shift", [0, 1, 3, 8, 16, 31])
def test_streaming_forward(
    always_streaming: None, block: cases.Block, shift: int, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", block, dtype)
    options: dict[str, Any] = {"axis": 1, "activation": "relu", "residual": x}
    _core.set_streaming_bytes(1 << 60)
    expected = fusebn.fused_batch_norm(x, None, None, **options)
    _core.set_streaming_bytes(0)
    memory = np.full(x.size + 128, 7).astype(dtype)
    out = memory[shift : shift + x.size].reshape(block)
    actual = fusebn.fused_batch_norm(x, None, None, out=out, **options)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(np.array(a), b)
    out[...] = 7
    assert (memory == 7).all()
    # In place, where each vector must be read before it is written around the cache.
    out[...] = x
    fusebn.fused_batch_norm(out, None, None, out=out, axis=1)
    _core.set_streaming_bytes(1 << 60)
    assert_same_bits(np.array(out), fusebn.fused_batch_norm(x, None, None, axis=1).y)


@pytest.mark.parametrize("block", STREAMED, ids=str)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_streaming_backward(
    always_streaming: None,
    block: cases.Block,
    is_training: bool,
    weighted: bool,
    activation: str,
    dtype: np.dtype[Any],
) -> None:
    x, dy, residual = (cases.make("standard_normal", block, dtype, seed) for seed in range(3))
    weights = frozen(np.arange(block[0] * block[2]).reshape(block[0], -1) % 3) if weighted else None
    one = np.ones(block[1])
    results = []
    for least in (0, 1 << 60):
        _core.set_streaming_bytes(least)
        results.append(
            fusebn.fused_batch_norm_grad(
                dy, x, one, one, one, one, is_training=is_training, axis=1, activation=activation,
                residual=residual, weights=weights,
            )
        )  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert np.isfinite(results[0].dx.astype(float)).all()


def test_streaming_begins_at_a_share_of_the_cache() -> None:
    caches = fusebn.info()["caches"]
    share = min(max(caches.values(), default=0) // 3, (4 << 20) * len(os.sched_getaffinity(0)))
    assert _core.streaming_bytes() == (share or 8 << 20)


# --- whose memory is whose --------------------------------------------------------------------


def test_a_disjoint_view_of_the_same_memory_is_a_fine_output() -> None:
    memory = np.arange(48, dtype=np.float32).reshape(6, 8)
    left, right = memory[:, :4], memory[:, 4:]
    expected = fusebn.fused_batch_norm(left.copy(), None, None, axis=1).y
    fusebn.fused_batch_norm(left, None, None, axis=1, out=right)
    assert_same_bits(np.array(right), expected)


@pytest.mark.parametrize(
    "out",
    [
        lambda m: m[1:7, :],
        lambda m: m[0:6, :][::-1],
        lambda m: m.reshape(-1)[1:25].reshape(6, 4),
        lambda m: m.reshape(-1)[:24].reshape(4, 6).T,
    ],
    ids=["one row on", "backwards", "one element on", "transposed"],
)
def test_an_overlap_that_cannot_work_is_refused(out: Any) -> None:
    memory = np.arange(32, dtype=np.float32).reshape(8, 4)
    before = memory.copy()
    with pytest.raises(ValueError, match=r"fused_batch_norm: `out` must be x itself"):
        fusebn.fused_batch_norm(memory[:6], None, None, axis=1, out=out(memory))
    assert_same_bits(memory, before)


def test_an_overlap_that_is_too_hard_to_exclude_is_refused() -> None:
    # Strides by which NumPy would search for long before it knew whether an element is shared.
    memory = np.arange(10_000, dtype=np.float32)
    x, out = (
        np.lib.stride_tricks.as_strided(memory[start:], (5, 5, 5, 5, 4), [4 * n for n in steps])
        for start, steps in ((0, (253, 318, 390, 719, 757)), (31, (261, 319, 391, 725, 760)))
    )
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(x, out, max_work=1000)
    with pytest.raises(ValueError, match=r"fused_batch_norm: `out` must be x itself"):
        fusebn.fused_batch_norm(x, None, None, axis=1, out=out)


def test_an_output_that_overlaps_the_residual_is_refused() -> None:
    x = cases.make("standard_normal", (6, 4, 1), cases.FLOAT32)[:, :, 0]
    memory = np.zeros((8, 4), np.float32)
    for out in (memory[:6], memory[1:7]):
        with pytest.raises(ValueError, match=r"`out` must share no memory with residual"):
            fusebn.fused_batch_norm(x, None, None, axis=1, residual=memory[:6], out=out)
    assert not memory.any()


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_x_may_be_its_own_residual(activation: Any, dtype: np.dtype[Any]) -> None:
    x = cases.make("standard_normal", (40, 5, 3), dtype)
    options: dict[str, Any] = {"axis": 1, "activation": activation, "residual": x}
    actual = fusebn.fused_batch_norm(x, None, None, **options)
    assert_forward(actual, x, None, None, **options)


def test_fresh_outputs_are_the_callers_own() -> None:
    x = cases.make("standard_normal", (200, 64, 1), cases.FLOAT32)[:, :, 0]
    first = fusebn.fused_batch_norm(x, None, None, axis=1).y
    kept = first.copy()
    second = fusebn.fused_batch_norm(frozen(2 * x + 1), None, None, epsilon=1.0, axis=1).y
    assert not np.shares_memory(first, second)
    assert_same_bits(first, kept)
    first[...] = 0
    assert second.any()


def test_results_keep_the_memory_order_of_x(rng: np.random.Generator) -> None:
    # A copy into another order would cost more than the normalization.
    x = LAYOUTS["channels last in memory"](rng.standard_normal(SHAPE))
    result = fusebn.fused_batch_norm(x, None, None, axis=1).y
    assert result.strides == x.strides


class Tagged(np.ndarray[Any, Any]):
    """A subclass of an array, as libraries make them."""


def test_memory_maps_subclasses_and_scalars(tmp_path: Path) -> None:
    x = cases.make("standard_normal", (6, 4, 1), cases.FLOAT32)[:, :, 0]
    expected = fusebn.fused_batch_norm(x, None, None, axis=1)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(6, 4))
    for other in (mapped, np.array(x).view(Tagged)):
        actual = fusebn.fused_batch_norm(other, None, None, axis=1)
        for a, b in zip(actual, expected, strict=True):
            assert type(a) is np.ndarray
            assert_same_bits(a, b)
    mean, variance = fusebn.moments(np.float32(3), ())
    assert (mean, variance) == (3, 0)
