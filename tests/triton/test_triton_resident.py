"""forward and gradient in a launch each, interpreted with all programs at once."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from interpreted import verbs
from test_triton_verbs import Call, array, tensor

import cases
from cases import FLOAT32
from conftest import assert_forward, assert_gradients, assert_moments, away_from_kinks, parameters
from devices import poisoned_memory
from fusebn import _reference as reference
from fusebn.triton._held import place_of
from fusebn.triton._plan import residency

BLOCKS = [(1, 64, 1), (33, 64, 1), (150, 64, 1), (300, 128, 1), (40, 192, 1)]


@pytest.fixture(autouse=True)
def poisoned():
    with poisoned_memory():
        yield


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is under test
def test_past_what_float32_can_square_everything_is_nan():
    """Not y alone, and not the statistics alone: who looks at either sees it."""
    x = np.float32(1e30) * np.resize([-1, 1], (90, 64, 1)).astype("float32")
    x[::2] *= -1
    for of in resident(x)[0]:
        assert np.isnan(of).all()


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


def test_gradients_far_from_0(monkeypatch, rng):
    """Where float32 cannot hold the mean, the distances from it are still right."""
    x = (1e6 + rng.standard_normal((90, 64, 1))).astype("float32")
    check_gradients(x, rng, monkeypatch, dy=np.abs(rng.standard_normal(x.shape)).astype("f4"))


def check_gradients(x, rng, monkeypatch, dy=None, **options):
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
    dy = rng.standard_normal(x.shape).astype(x.dtype) if dy is None else dy
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


@pytest.mark.parametrize("dtype", [cases.BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is under test
def test_where_dy_is_0_x_adds_nothing_to_the_sums(dtype, activation, rng):
    """Whatever it holds: the channel has no statistics, but what it is scaled by has a gradient."""
    x = np.array(cases.make("standard_normal", (90, 64, 1), dtype))
    x[5] = np.inf
    scale, offset = parameters(rng, 64, dtype)
    call = Call(x, scale, offset, activation=activation)
    y, mean, variance = call.forward()
    for of in (y, mean, variance):
        assert np.isnan(of.astype("float32")).all()
    found = np.zeros(64), np.ones(64)
    call.statistics = verbs.Statistics(call.statistics.count, torch.from_numpy(np.stack(found)))
    dy = np.array(rng.standard_normal(x.shape).astype(dtype))
    dy[5] = 0
    _, dscale, doffset, _ = call.gradient(dy)
    assert np.isfinite(dscale).all()
    assert np.isfinite(doffset).all()


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


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_a_view_is_held_where_16_bytes_can_be_loaded_at_once(shift, monkeypatch, rng):
    """On a GPU a word that begins anywhere is an error, and ends the process."""
    x = cases.make("standard_normal", (90, 64, 1), cases.BFLOAT16)
    scale, offset = parameters(rng, 64, x.dtype)
    launched = []
    for name in ("forward_resident", "gradient_resident"):
        launch = getattr(verbs, name)
        monkeypatch.setattr(
            verbs, name, lambda *given, launch=launch: (launched.append(1), launch(*given))[1]
        )
    call = Call(x, scale, offset)
    memory = torch.zeros(x.size + shift, dtype=torch.bfloat16)
    call.x = memory[shift:].view(x.shape).copy_(call.x)
    assert call.x.data_ptr() % 16 == 2 * shift % 16
    assert_forward(call.forward(), x, scale, offset, axis=1)
    batch = reference.moments(x, (0, 2))
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    mean, variance = batch.mean.ravel(), batch.variance().ravel()
    assert_gradients(call.gradient(dy), dy, x, scale, offset, mean, variance, axis=1)
    assert len(launched) == (2 if shift == 8 else 0)


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


@triton.jit
def _last_place(PLACE, member, words):
    base, offsets = place_of(3, member, words, 4, 16, 2)
    tl.store(PLACE, tl.max(base + offsets))


def test_places_past_what_32_bits_can_count():
    place = torch.zeros(1, dtype=torch.int64)
    _last_place[(1,)](place, 1000, 2**28)
    assert place.tolist() == [(1000 * 2 * 4 + 3) * 2**28 + 3 * 16 + 15]
