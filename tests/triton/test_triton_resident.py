"""forward and gradient in a launch each, interpreted with all programs at once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import fused, verbs
from test_triton_verbs import Call, array, tensor

import cases
from cases import FLOAT32
from conftest import assert_forward, assert_gradients, assert_moments, away_from_kinks, parameters
from fusebn import _reference as reference
from fusebn.triton._plan import residency

BLOCKS = [(1, 64, 1), (33, 64, 1), (150, 64, 1), (300, 128, 1), (40, 192, 1)]


def resident(x, *given, **options):
    """Return y and the returned statistics, and how the block was held."""
    call = Call(x, *given, **options)
    held = verbs.residency_of(call.x, call.block, 1)
    assert held is not None
    return call.forward(), held, call


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_shape(block, rng):
    x = cases.make("standard_normal", block, FLOAT32)
    given = parameters(rng, block[1], FLOAT32)
    found, held, _ = resident(x, *given)
    assert held.strips == block[1] // 32
    assert_forward(found, x, *given, axis=1)


@pytest.mark.parametrize("dtype", [cases.FLOAT16, cases.BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_types_with_a_residual(dtype, activation, rng):
    x = cases.make("standard_normal", (90, 128, 1), dtype)
    given = parameters(rng, 128, dtype)
    residual = rng.standard_normal(x.shape).astype(dtype)
    options = {"activation": activation, "residual": residual}
    found, *_ = resident(x, *given, **options)
    assert_forward(found, x, *given, axis=1, **options)


@pytest.mark.parametrize("name", [data.name for data in cases.DATA if FLOAT32 in data.dtypes])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is under test
def test_hard_data(name):
    x = cases.make(name, (300, 32, 1), FLOAT32)
    _, held, call = resident(x)
    assert held.members > 1
    found = tuple(array(of).astype("float32") for of in call.statistics.batch)
    assert_moments(found, x, (0, 2))


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_moving_statistics_are_updated_once(factor, rng):
    x = cases.make("standard_normal", (150, 64, 1), FLOAT32)
    given = parameters(rng, 64, FLOAT32)
    old = rng.uniform(1, 2, (2, 64)).astype("float32")
    options = {"exponential_avg_factor": factor, "correction": 2.0}
    found, *_ = resident(x, *given, *old, **options)
    assert_forward(found, x, *given, *old, axis=1, **options)


def test_again_and_again_with_the_same_bits(rng):
    """The programs come in any order; a barrier that let one through early would show."""
    x = cases.make("standard_normal", (260, 128, 1), FLOAT32)
    given = parameters(rng, 128, FLOAT32)
    first, *_ = resident(x, *given)
    for _ in range(5):
        again, *_ = resident(x, *given)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("block", BLOCKS[1:], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"activation": "relu"}], ids=str)
def test_gradients(block, options, monkeypatch, rng):
    check_gradients(cases.make("standard_normal", block, FLOAT32), rng, monkeypatch, **options)


@pytest.mark.parametrize("dtype", [cases.FLOAT16, cases.BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_with_a_residual(dtype, activation, monkeypatch, rng):
    x = cases.make("standard_normal", (90, 128, 1), dtype)
    residual = rng.standard_normal(x.shape).astype(dtype)
    check_gradients(x, rng, monkeypatch, activation=activation, residual=residual)


def check_gradients(x, rng, monkeypatch, **options):
    launches = []
    launch = verbs.gradient_resident
    monkeypatch.setattr(
        verbs, "gradient_resident", lambda *given: (launches.append(1), launch(*given))
    )
    scale, offset = parameters(rng, x.shape[1], x.dtype)
    call = Call(x, scale, offset, **options)
    call.forward()
    batch = reference.moments(x, (0, 2))
    mean, variance = batch.mean.ravel(), batch.variance().ravel()
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    if options.get("activation") == "relu":
        residual = options.get("residual")
        dy = away_from_kinks(dy, x, scale, offset, mean, variance, axis=1, residual=residual)
    found = call.gradient(dy)
    assert_gradients(found, dy, x, scale, offset, mean, variance, axis=1, **options)
    assert launches == [1]


def test_a_gradient_that_16_bits_would_round_takes_two_launches(monkeypatch, rng):
    """Of a residual under an activation that is more than a mask."""
    monkeypatch.setattr(verbs, "gradient_resident", None)
    x = cases.make("standard_normal", (90, 128, 1), cases.BFLOAT16)
    scale, offset = parameters(rng, 128, x.dtype)
    residual = rng.standard_normal(x.shape).astype(x.dtype)
    call = Call(x, scale, offset, activation="silu", residual=residual)
    call.forward()
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    batch = reference.moments(x, (0, 2))
    assert_gradients(
        call.gradient(dy), dy, x, scale, offset, batch.mean.ravel(), batch.variance().ravel(),
        axis=1, activation="silu", residual=residual,
    )  # fmt: skip


def test_gradients_through_the_returned_statistics(rng):
    x = cases.make("standard_normal", (150, 64, 1), FLOAT32)
    scale, offset = parameters(rng, 64, FLOAT32)
    call = Call(x, scale, offset, correction=0.0)
    call.forward()
    dy = rng.standard_normal(x.shape).astype("float32")
    dmean, dvariance = rng.standard_normal((2, 64)).astype("float32")
    batch = reference.moments(x, (0, 2))
    assert_gradients(
        call.gradient(dy, dmean, dvariance), dy, x, scale, offset, batch.mean.ravel(),
        batch.variance().ravel(), axis=1, dmean=dmean, dvariance=dvariance,
    )  # fmt: skip


def test_two_launches_on_request(monkeypatch, rng):
    x = cases.make("standard_normal", (150, 64, 1), FLOAT32)
    given = parameters(rng, 64, FLOAT32)
    one, *_ = resident(x, *given)
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")
    monkeypatch.setattr(verbs, "forward_resident", None)
    two = Call(x, *given).forward()
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5, atol=1e-5)


def test_x_is_read_once_and_y_written_once(monkeypatch, rng):
    """What the one launch is for."""
    from triton.runtime import interpreter

    x = torch.from_numpy(cases.make("standard_normal", (150, 64, 1), FLOAT32).copy())
    y = torch.full_like(x, math.nan)
    reads, writes = np.zeros(x.numel(), int), np.zeros(x.numel(), int)
    builder = type(interpreter.interpreter_builder)

    def counted(name, tensor, counts, mask_at):
        method = getattr(builder, name)

        def counting(self, pointers, *rest):
            at = (pointers.data.astype(np.int64) - tensor.data_ptr()) // 4
            mine = (at >= 0) & (at < tensor.numel()) & rest[mask_at].data.astype(bool)
            np.add.at(counts, at[mine], 1)
            return method(self, pointers, *rest)

        monkeypatch.setattr(builder, name, counting)

    counted("create_masked_load", x, reads, 0)
    counted("create_masked_store", y, writes, 1)
    block = verbs.Block(*x.shape)
    of = verbs.Normalization(None, None, None, None, "relu", 1e-3, True)
    out = torch.empty(2, 64)
    fused.forward(x, block, of, None, verbs.Returned(None, None, *out, 1.0, 1.0), y)
    assert (reads == 1).all()
    assert (writes == 1).all()


@given(
    outer=st.integers(1, 2_000_000),
    lines=st.integers(1, 64),
    itemsize=st.sampled_from([2, 4]),
    processors=st.sampled_from([4, 78, 132]),
    arrays=st.sampled_from([1, 2]),
)
def test_a_block_is_held_whole_or_not_at_all(outer, lines, itemsize, processors, arrays):
    held = residency(outer, lines * 128 // itemsize, 1, itemsize, processors, arrays)
    tiles = -(-outer // 32)
    if held is None:
        assert tiles > 32 // arrays * processors
        return
    assert held.strips == lines
    assert held.programs <= processors
    assert held.members * held.held >= tiles
    assert held.held * arrays <= 32
    assert (held.members - 1) * held.held < tiles  # nobody has nothing
    assert 1 <= held.teams <= held.strips


@pytest.mark.parametrize("block", [(0, 64, 1), (100, 65, 1), (100, 64, 2), (10**7, 64, 1)], ids=str)
def test_what_is_not_held(block):
    assert residency(*block, 4, 132, 1) is None


def test_tensors_of_float64_are_not_held():
    assert residency(100, 64, 1, 8, 132, 1) is None
    assert tensor(np.zeros(1)).dtype is torch.float64
