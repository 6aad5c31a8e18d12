"""The Triton kernels, interpreted, against the oracle: both views, all types, every policy.

The interpreter says what the kernels compute. What they compile to is in test_triton_compiled.py;
how fast they are nobody can say without a GPU.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted import fused, verbs

import cases
import fusebn
from cases import BFLOAT16, FLOAT32, FLOAT64
from conftest import assert_forward, assert_gradients, assert_moments, away_from_kinks, parameters
from devices import poisoned_memory
from fusebn import _reference as reference
from fusebn.triton._tiles import tile_at

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
         "float64": torch.float64}  # fmt: skip

# Small ones of the table, since a tile takes milliseconds: both views, folded rows, tails, several
# programs to a group.
BLOCKS = [
    (1, 1, 1), (1, 7, 1), (2, 1, 1), (1000, 1, 1), (37, 3, 1), (700, 3, 1), (33, 16, 1),
    (50, 65, 1), (9, 100, 1), (400, 64, 1), (3, 520, 1),
    (1, 1, 4097), (3, 3, 1024), (24, 7, 49), (31, 17, 4), (2, 40, 4),
]  # fmt: skip
FEW = [(400, 64, 1), (90, 3, 1), (24, 7, 49), (3, 3, 1100)]


@pytest.fixture(autouse=True)
def verb_by_verb(request, monkeypatch):
    """Leave out the kernels of test_triton_resident.py.

    Interpreted, a tile that is loaded early and lies beside the data costs as any other.
    """
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")
    if "ahead" not in request.node.name:
        monkeypatch.setattr(verbs, "_ahead", lambda *read: 1)
    with poisoned_memory():
        yield


def tensor(array):
    if array is None:
        return None
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def array(of):
    if of is None:
        return None
    return of.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if of.dtype is torch.bfloat16 \
        else of.numpy()  # fmt: skip


def nan_like(x, *shape, dtype=None):
    return x.new_full(shape or x.shape, float("nan"), dtype=dtype)


class Call:
    """forward and gradient of a block, with outputs that are NaN beforehand."""

    def __init__(
        self, x, scale=None, offset=None, mean=None, variance=None, epsilon=0.001,
        is_training=True, exponential_avg_factor=1.0, *, activation=None, residual=None,
        weights=None, correction=1.0,
    ):  # fmt: skip
        self.x, self.block = tensor(x), verbs.Block(*x.shape)
        self.stat = torch.float64 if x.dtype == FLOAT64 else torch.float32
        self.given = None if mean is None else (tensor(mean), tensor(variance))
        self.of = verbs.Normalization(
            tensor(scale), tensor(offset), tensor(residual), tensor(weights),
            activation or "identity", epsilon, is_training,
        )  # fmt: skip
        self.correction, self.factor = correction, exponential_avg_factor

    def forward(self):
        y = nan_like(self.x)
        channels = self.block.channels
        out = [nan_like(self.x, channels, dtype=self.stat) for _ in range(2)]
        given = self.given or (None, None)
        returned = verbs.Returned(*given, *out, self.correction, self.factor)
        self.statistics = fused.forward(self.x, self.block, self.of, self.given, returned, y)
        return tuple(map(array, (y, *out)))

    def gradient(self, dy, dmean=None, dvariance=None):
        residual = self.of.residual
        dx = nan_like(self.x)
        dresidual = None if residual is None else nan_like(self.x)
        dscale, doffset = (
            None if v is None else nan_like(v) for v in (self.of.scale, self.of.offset)
        )
        flowing = verbs.Flowing(tensor(dmean), tensor(dvariance), self.correction, self.factor)
        fused.gradient(
            tensor(dy), self.x, self.block, self.of, self.statistics, flowing,
            dx, dresidual, dscale, doffset, None,
        )  # fmt: skip
        return tuple(map(array, (dx, dscale, doffset, dresidual)))


def check(x, rng, dy=None, **options):
    """Assert forward and gradient of a batch, in training, against the oracle."""
    channels = x.shape[1]
    scale, offset = parameters(rng, channels, x.dtype)
    call = Call(x, scale, offset, **options)
    assert_forward(call.forward(), x, scale, offset, axis=1, **options)
    dy = rng.standard_normal(x.shape).astype(x.dtype) if dy is None else dy
    weights = options.get("weights")
    batch = reference.moments(x, (0, 2), None if weights is None else weights[:, None])
    mean, variance = batch.mean.ravel(), batch.variance().ravel()
    options.pop("correction", None)
    if options.get("activation") in ("relu", "relu6"):
        residual = options.get("residual")
        dy = away_from_kinks(dy, x, scale, offset, mean, variance, axis=1, residual=residual)
    assert_gradients(call.gradient(dy), dy, x, scale, offset, mean, variance, axis=1, **options)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_shape(block, rng):
    check(cases.make("standard_normal", block, FLOAT32), rng)


@pytest.mark.parametrize("block", [(1000, 64, 1), (24, 7, 49)], ids=str)
def test_loading_ahead(block, rng):
    x = cases.make("standard_normal", block, FLOAT32)
    check(x, rng, activation="relu", residual=rng.standard_normal(block).astype("float32"))


@pytest.mark.parametrize("block", FEW, ids=str)
def test_every_type(block, dtype, rng):
    check(cases.make("standard_normal", block, dtype), rng, activation="relu")


@pytest.mark.parametrize("name", [data.name for data in cases.DATA if FLOAT32 in data.dtypes])
@pytest.mark.parametrize("block", [(200, 20, 1), (6, 5, 150)], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is under test
def test_hard_data(name, block):
    x = cases.make(name, block, FLOAT32)
    statistics = verbs.moments(tensor(x), verbs.Block(*block), None)
    found = tuple(array(of).astype("float32") for of in statistics.batch)
    assert_moments(found, x, (0, 2))


@pytest.mark.parametrize("block", [(90, 32, 1), (6, 3, 49)], ids=str)
def test_gradients_far_from_0(block, rng):
    """Where float32 cannot hold the mean, the distances from it are still right."""
    x = (1e6 + rng.standard_normal(block)).astype("float32")
    check(x, rng, dy=np.abs(rng.standard_normal(block)).astype("float32"))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("block", FEW[1:3], ids=str)
def test_activations_with_a_residual(activation, block, rng):
    x = cases.make("standard_normal", block, FLOAT64)
    check(x, rng, activation=activation, residual=rng.standard_normal(block))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_written_for_the_residual(dtype, activation, rng):
    x = cases.make("standard_normal", (60, 32, 1), dtype)
    residual = rng.standard_normal(x.shape).astype(dtype)
    check(x, rng, activation=activation, residual=residual)


@pytest.mark.parametrize("block", [(200, 32, 1), (40, 3, 1), (8, 3, 49)], ids=str)
def test_weights_leave_out_what_they_may_not_see(block, rng):
    outer, _, inner = block
    weights = rng.choice([0, 0.5, 1, 3], (outer, inner))
    weights[0, 0] = 0
    x = np.array(cases.make("standard_normal", block, FLOAT64))
    check(x, rng, weights=weights)
    x[0, :, 0] = np.nan
    scale, offset = parameters(rng, block[1], x.dtype)
    call = Call(x, scale, offset, weights=weights)
    y, mean, variance = call.forward()
    assert np.isnan(y[0, :, 0]).all()
    assert np.isfinite(mean).all()
    assert np.isfinite(variance).all()
    dy = rng.standard_normal(block)
    dy[0, :, 0] = 0
    dx, dscale, doffset, _ = call.gradient(dy)
    assert np.isfinite(np.delete(dx.reshape(outer, -1, inner), 0, 0)).all()
    assert np.isfinite(dscale).all()
    assert np.isfinite(doffset).all()


@pytest.mark.parametrize("block", [(0, 5, 1), (0, 5, 7)], ids=str)
def test_an_empty_batch(block):
    call = Call(np.zeros(block, "float32"), *parameters(np.random.default_rng(0), 5, FLOAT32))
    y, mean, variance = call.forward()
    assert y.shape == block
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    assert float(call.statistics.count) == 0
    dx, dscale, doffset, _ = call.gradient(y)
    assert dx.shape == block
    assert (dscale == 0).all()
    assert (doffset == 0).all()


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_batch_of_which_nothing_counts(factor):
    x = np.full((6, 4, 5), np.nan, "float32")
    scale, offset = parameters(np.random.default_rng(0), 4, FLOAT32)
    old = np.arange(4, dtype="float32"), np.arange(1, 5, dtype="float32")
    call = Call(
        x, scale, offset, *old, weights=np.zeros((6, 5), "float32"), activation="relu",
        exponential_avg_factor=factor,
    )  # fmt: skip
    y, mean, variance = call.forward()
    np.testing.assert_array_equal(y, np.broadcast_to(np.maximum(offset, 0)[:, None], x.shape))
    wanted = old if factor != 1 else (np.full(4, np.nan, "float32"),) * 2
    np.testing.assert_array_equal((mean, variance), wanted)
    assert (call.gradient(np.ones_like(x))[0] == 0).all()


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0])  # 0.3 has more digits than float32
@pytest.mark.parametrize("correction", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_returned_statistics(factor, correction, dtype, rng):
    x = cases.make("standard_normal", (90, 3, 1), dtype)
    scale, offset = parameters(rng, 3, dtype)
    old = np.array([1, 2, 3], dtype), np.array([4, 5, 6], dtype)
    options = {"exponential_avg_factor": factor, "correction": correction}
    call = Call(x, scale, offset, *old, **options)
    assert_forward(call.forward(), x, scale, offset, *old, axis=1, **options)


def test_moving_statistics_are_updated_in_place(rng):
    x = cases.make("standard_normal", (90, 5, 1), FLOAT32)
    old = torch.arange(5.0), torch.arange(1.0, 6.0)
    mean, variance = (of.clone() for of in old)
    returned = verbs.Returned(mean, variance, mean, variance, 1.0, 0.5)
    statistics = verbs.moments(tensor(x), verbs.Block(*x.shape), None, returned)
    np.testing.assert_allclose(mean, (old[0] + statistics.batch[0]) / 2, rtol=1e-6)
    unbiased = statistics.batch[1] * 90 / 89
    np.testing.assert_allclose(variance, (old[1] + unbiased) / 2, rtol=1e-6)


@pytest.mark.parametrize("block", FEW, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_by_given_statistics(block, activation, rng):
    x = cases.make("standard_normal", block, FLOAT32)
    channels = block[1]
    scale, offset = parameters(rng, channels, FLOAT32)
    mean = rng.standard_normal(channels).astype("float32")
    variance = rng.uniform(0.5, 2, channels).astype("float32")
    given = scale, offset, mean, variance, 1e-3, False
    call = Call(x, *given, activation=activation)
    assert_forward(call.forward(), x, *given, axis=1, activation=activation)
    dy = away_from_kinks(
        rng.standard_normal(block).astype("float32"), x, scale, offset, mean, variance, axis=1
    )
    assert_gradients(call.gradient(dy), dy, x, *given, axis=1, activation=activation)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_gradients_through_the_returned_statistics(factor, rng):
    block = (24, 7, 5)
    x, old = cases.make("standard_normal", block, FLOAT64), rng.uniform(1, 2, (2, 7))
    scale, offset = parameters(rng, 7, FLOAT64)
    call = Call(x, scale, offset, *old, exponential_avg_factor=factor, correction=2.0)
    call.forward()
    dy, (dmean, dvariance) = rng.standard_normal(block), rng.standard_normal((2, 7))
    dgiven = torch.full((2, 7), float("nan"), dtype=torch.float64)
    dx = nan_like(call.x)
    flowing = verbs.Flowing(tensor(dmean), tensor(dvariance), 2.0, factor)
    fused.gradient(
        tensor(dy), call.x, call.block, call.of, call.statistics, flowing, dx, None, None, None,
        tuple(dgiven),
    )  # fmt: skip
    leaves = [tensor(of).requires_grad_() for of in (x, *old)]
    y, mean, variance = fusebn.fused_batch_norm(
        leaves[0], tensor(scale), tensor(offset), *leaves[1:], axis=1, correction=2,
        exponential_avg_factor=factor,
    )  # fmt: skip
    flows = (y, mean, variance), leaves, (tensor(dy), tensor(dmean), tensor(dvariance))
    wanted = torch.autograd.grad(*flows, allow_unused=True, materialize_grads=True)
    np.testing.assert_allclose(dx, wanted[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(dgiven, torch.stack(wanted[1:]), rtol=1e-12)


def test_gradients_of_given_statistics(rng):
    x, old = cases.make("standard_normal", (24, 7, 5), FLOAT64), rng.uniform(1, 2, (2, 7))
    scale, offset = parameters(rng, 7, FLOAT64)
    call = Call(x, scale, offset, *old, is_training=False)
    call.forward()
    dy = rng.standard_normal(x.shape)
    dgiven = torch.full((2, 7), float("nan"), dtype=torch.float64)
    fused.gradient(
        tensor(dy), call.x, call.block, call.of, call.statistics,
        verbs.Flowing(None, None, 1.0, 1.0), nan_like(call.x), None, None, None, tuple(dgiven),
    )  # fmt: skip
    leaves = [tensor(of).requires_grad_() for of in old]
    y = fusebn.fused_batch_norm(
        call.x, tensor(scale), tensor(offset), *leaves, axis=1, is_training=False
    ).y
    wanted = torch.autograd.grad(y, leaves, tensor(dy))
    np.testing.assert_allclose(dgiven, torch.stack(wanted), rtol=1e-11)


def test_variance_and_epsilon_zero(rng):
    x = np.full((40, 3, 1), 542.37, "float32")
    offset = np.float32([1, 2, 3])
    call = Call(x, np.float32([2, 2, 2]), offset, epsilon=0.0)
    y, _mean, variance = call.forward()
    np.testing.assert_array_equal(y[:, :, 0], np.broadcast_to(offset, (40, 3)))
    assert (variance == 0).all()
    assert (call.gradient(x)[0] == 0).all()


@pytest.mark.parametrize("block", [(400, 64, 1), (90, 3, 1), (3, 3, 1100)], ids=str)
def test_the_same_bits_whoever_finishes_last(block, monkeypatch, rng):
    """The order of programs is the device's to choose; the results may not depend on it."""
    x = cases.make("standard_normal", block, FLOAT32)
    scale, offset = parameters(rng, block[1], FLOAT32)
    dy = rng.standard_normal(block).astype("float32")

    def run():
        call = Call(x, scale, offset, activation="silu")
        return [*call.forward(), *call.gradient(dy)[:3]]

    wanted = run()
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_index = type(builder).set_grid_idx
    monkeypatch.setattr(
        type(builder),
        "set_grid_idx",
        lambda self, i, j, k: set_index(self, self.grid_dim[0] - 1 - i, j, k),
    )
    for got, one in zip(run(), wanted, strict=True):
        np.testing.assert_array_equal(got, one)


@triton.jit
def _place_of_a_tile(PLACE, number, group, width, stride, FOLD: tl.constexpr):
    base, offsets, _, _, _ = tile_at(number, group, 1, 0, width, stride, 1, 1, FOLD, 4, 16)
    tl.store(PLACE, base)
    tl.store(PLACE + 1, tl.max(offsets))


@pytest.mark.parametrize(
    ("number", "group", "width", "stride", "fold", "base"),
    [
        (0, 63, 2**26, 64 * 2**20, 0, 63 * 2**26),
        (2**10, 0, 16, 2**20, 1, 2**10 * 4 * 2**20),
        (0, 0, 16, 2**30, 1, 0),
    ],
    ids=["a plane", "a row", "within a tile"],
)
def test_places_past_what_32_bits_can_count(number, group, width, stride, fold, base):
    place = torch.zeros(2, dtype=torch.int64)
    _place_of_a_tile[(1,)](place, number, group, width, stride, fold)
    assert place.tolist() == [base, 3 * stride + 15]
