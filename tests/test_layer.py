"""`BatchNorm`: its two switches, its state, its policies and its gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import cases
import fusebn
from conftest import (
    ULPS,
    Array,
    assert_close,
    assert_forward,
    assert_gradients,
    assert_same_bits,
    away_from_kinks,
    frozen,
    parameters,
)
from fusebn import BatchNorm
from fusebn import _reference as reference

NAMES = ("scale", "offset", "moving_mean", "moving_variance")


def snapshot(layer: BatchNorm) -> dict[str, bytes]:
    """Return the state to the last bit."""
    return {key: value.tobytes() for key, value in layer.state_dict().items()}


def trained(layer: BatchNorm, steps: int = 3, seed: int = 0) -> BatchNorm:
    """Give a layer parameters and moving statistics of its own."""
    rng = np.random.default_rng(seed)
    for parameter in (layer.scale, layer.offset):
        if parameter is not None:
            parameter[...] = rng.uniform(0.5, 2, layer.channels)
    shape = (8, layer.channels) if layer.axis == -1 else (8, layer.channels, 3)
    for _ in range(steps):
        layer(frozen(rng.normal(2, 3, shape), np.float32), training=True)
    return layer


# --- the start, and the averages --------------------------------------------------------------


def test_a_new_layer() -> None:
    layer = BatchNorm(5)
    assert layer.scale is not None
    assert layer.offset is not None
    assert layer.scale.tolist() == layer.moving_variance.tolist() == [1] * 5
    assert layer.offset.tolist() == layer.moving_mean.tolist() == [0] * 5
    assert {getattr(layer, name).dtype for name in NAMES} == {cases.FLOAT32}
    assert layer.num_updates == 0
    assert not layer.frozen
    bare = BatchNorm(5, center=False, scale=False, dtype=np.float64)
    assert bare.scale is None
    assert bare.offset is None
    assert bare.moving_mean.dtype == bare.moving_variance.dtype == np.float64


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_moving_averages(rng: np.random.Generator, decay: float, correction: int) -> None:
    layer = BatchNorm(4, decay=decay, correction=correction, dtype=np.float64)
    mean, variance = np.zeros(4), np.ones(4)
    for step in range(1, 21):
        x = frozen(rng.normal(3, 2, (16, 4)))
        layer(x, training=True)
        mean = decay * mean + (1 - decay) * x.mean(0)
        variance = decay * variance + (1 - decay) * x.var(0, ddof=correction)
        assert layer.num_updates == step
        assert layer.moving_mean == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert layer.moving_variance == pytest.approx(variance, rel=1e-12)


def test_moving_averages_by_hand() -> None:
    layer = BatchNorm(1, decay=0.75)
    layer(np.array([[0.0], [4.0]], np.float32), training=True)  # mean 2, variance 8
    assert (layer.moving_mean.item(), layer.moving_variance.item()) == (0.5, 0.75 + 2)
    layer(np.array([[6.0], [6.0]], np.float32), training=True)  # mean 6, variance 0
    assert (layer.moving_mean.item(), layer.moving_variance.item()) == (1.875, 2.0625)


def test_cumulative_average_is_the_plain_mean(rng: np.random.Generator) -> None:
    layer = BatchNorm(3, decay=None, dtype=np.float64)
    batches = [frozen(rng.normal(5, 2, (10, 3))) for _ in range(7)]
    for batch in batches:
        layer(batch, training=True)
    assert layer.moving_mean == pytest.approx(np.mean([b.mean(0) for b in batches], 0), rel=1e-13)
    expected = np.mean([b.var(0, ddof=1) for b in batches], 0)
    assert layer.moving_variance == pytest.approx(expected, rel=1e-13)


def test_zero_debias_forgets_the_start(rng: np.random.Generator) -> None:
    layer = BatchNorm(3, decay=0.9, zero_debias=True, dtype=np.float64)
    batches = [frozen(rng.normal(5, 2, (10, 3))) for _ in range(12)]
    for t, batch in enumerate(batches, 1):
        layer(batch, training=True)
        weights = 0.9 ** np.arange(t)[::-1]
        weights /= weights.sum()
        mean = weights @ np.array([b.mean(0) for b in batches[:t]])
        variance = weights @ np.array([b.var(0, ddof=1) for b in batches[:t]])
        assert layer.moving_mean == pytest.approx(mean, rel=1e-12)
        assert layer.moving_variance == pytest.approx(variance, rel=1e-12)


def test_decay_may_be_set_at_any_time() -> None:
    layer = BatchNorm(1, decay=1.0)
    x = np.array([[2.0], [2.0]], np.float32)
    layer(x, training=True)
    assert layer.moving_mean.item() == 0
    layer.decay = 0.5
    layer(x, training=True)
    assert layer.moving_mean.item() == 1


# --- what users ask about ---------------------------------------------------------------------


def test_the_toy_run() -> None:
    rng = np.random.default_rng(42)
    layer = BatchNorm(2, decay=0.9)
    for _ in range(100):
        layer(rng.normal([0, 100], 1, (4, 2)).astype(np.float32), training=True)
    # The average of the last ten or so batches of four: 6 of its standard errors.
    error = np.sqrt(0.1 / 1.9 / 4)
    assert np.abs(layer.moving_mean - [0, 100]).max() < 6 * error
    assert np.abs(layer.moving_variance - 1).max() < 6 * np.sqrt(0.1 / 1.9 * 2 / 3)
    before = snapshot(layer)
    for _ in range(10):
        x = frozen(rng.normal([0, 100], 1, (4, 2)), np.float32)
        y = layer(x, training=False)
        z = reference.wide(x) - layer.moving_mean
        expected = z / np.sqrt(reference.wide(layer.moving_variance) + layer.epsilon)
        assert_close(y, expected, dtype=y.dtype, magnitude=np.abs(expected), ulps=4)
        assert snapshot(layer) == before


def test_moving_statistics_become_the_population(rng: np.random.Generator) -> None:
    layer = BatchNorm(3, axis=1, decay=None)
    mean, std = np.array([-3.0, 0.0, 1000.0]), np.array([0.1, 1.0, 20.0])
    for _ in range(200):
        x = rng.normal(mean[:, None], std[:, None], (32, 3, 8)).astype(np.float32)
        layer(x, training=True)
    n = 200 * 32 * 8
    assert (np.abs(layer.moving_mean - mean) < 6 * std / np.sqrt(n) + 1e-3).all()
    assert (np.abs(layer.moving_variance / std**2 - 1) < 6 * np.sqrt(2 / n) + 1e-4).all()
    y = layer(x, training=False)
    assert np.abs(y.mean((0, 2))).max() < 0.5
    assert np.abs(y.std((0, 2)) - 1).max() < 0.3


# --- the two switches -------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("kind", [bool, np.bool_, np.array])
def test_switches(rng: np.random.Generator, training: bool, update: bool | None, kind: Any) -> None:
    layer = trained(BatchNorm(4, decay=0.5))
    before, steps = snapshot(layer), layer.num_updates
    old = layer.moving_mean.copy(), layer.moving_variance.copy()
    x = frozen(rng.standard_normal((9, 4)), np.float32)
    y = layer(x, training=kind(training), update=None if update is None else kind(update))
    given = {} if training else {"mean": old[0], "variance": old[1]}
    expected = fusebn.fused_batch_norm(
        x, layer.scale, layer.offset, **given, is_training=training, axis=-1
    )
    assert_same_bits(y, expected.y)
    if training if update is None else update:
        assert layer.num_updates == steps + 1
        assert layer.moving_mean == pytest.approx((old[0] + x.mean(0)) / 2, rel=1e-5, abs=1e-6)
        variance = (old[1] + x.var(0, ddof=1)) / 2
        assert layer.moving_variance == pytest.approx(variance, rel=1e-5)
    else:
        assert snapshot(layer) == before


def test_frozen_layers_change_nothing_whatever_is_asked(rng: np.random.Generator) -> None:
    layer = trained(BatchNorm(4))
    layer.freeze()
    assert layer.frozen
    before = snapshot(layer)
    x = frozen(rng.standard_normal((9, 4)), np.float32)
    for training in (True, False):
        for update in (None, True, False):
            y = layer(x, training=training, update=update)
            assert_forward(
                (y, layer.moving_mean, layer.moving_variance), x, layer.scale, layer.offset,
                layer.moving_mean, layer.moving_variance, is_training=False,
            )  # fmt: skip
            assert snapshot(layer) == before
    layer.unfreeze()
    assert not layer.frozen
    layer(x, training=True)
    assert snapshot(layer) != before


def test_freezing_survives_saving_the_state() -> None:
    layer = trained(BatchNorm(4))
    layer.freeze()
    other = BatchNorm(4)
    other.load_state_dict(layer.state_dict())
    assert other.frozen


# --- arguments of a call ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_a_call_is_the_function(
    rng: np.random.Generator, activation: str | None, axis: int, training: bool, dtype: Any
) -> None:
    layer = trained(BatchNorm(5, axis=axis, activation=activation, epsilon=0.01))
    shape = (7, 5, 6) if axis == 1 else (7, 6, 5)
    x, residual = (frozen(rng.standard_normal(shape), dtype) for _ in range(2))
    weights = frozen(rng.integers(0, 3, (7, 6)))
    arguments = x, layer.scale, layer.offset
    options: dict[str, Any] = {"axis": axis, "activation": activation, "residual": residual}
    statistics = layer.moving_mean.copy(), layer.moving_variance.copy()
    y = layer(x, training=training, residual=residual, weights=weights)
    if training:
        batch = fusebn.fused_batch_norm(*arguments, epsilon=0.01, weights=weights, **options)
        assert_same_bits(y, batch.y)
    else:
        expected = fusebn.fused_batch_norm(
            *arguments, *statistics, 0.01, is_training=False, **options
        )
        assert_same_bits(y, expected.y)


def test_output_may_be_given(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 4)).astype(np.float32)
    expected = BatchNorm(4)(frozen(x), training=True)
    out = np.full_like(x, np.nan)
    assert BatchNorm(4)(frozen(x), training=True, out=out) is out
    assert_same_bits(out, expected)
    assert BatchNorm(4)(x, training=True, out=x) is x
    assert_same_bits(x, expected)


def test_training_must_be_said() -> None:
    with pytest.raises(TypeError, match="training"):
        BatchNorm(2)(np.ones((3, 2), np.float32))  # type: ignore[call-arg]


# --- degenerate batches -----------------------------------------------------------------------


def test_one_element_updates_with_variance_zero() -> None:
    layer = BatchNorm(2, decay=0.5, activation="relu")
    assert layer.offset is not None
    layer.offset[...] = [3, -3]
    y = layer(np.array([[10.0, 20.0]], np.float32), training=True)
    assert y.tolist() == [[3, 0]]
    assert layer.moving_mean.tolist() == [5, 10]
    assert layer.moving_variance.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("decay", [0.9, None])
def test_nothing_updates_nothing(nonfinite: str, decay: float | None) -> None:
    layer = trained(BatchNorm(2, decay=decay, nonfinite=nonfinite))
    before = snapshot(layer)
    y = layer(np.empty((0, 2), np.float32), training=True)
    assert y.shape == (0, 2)
    assert snapshot(layer) == before
    x = np.array([[1.0, np.nan], [2.0, 3.0]], np.float32)
    y = layer(x, training=True, weights=np.zeros(2))
    assert_same_bits(y, np.broadcast_to(layer.offset, (2, 2)))
    assert snapshot(layer) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values(bad: float) -> None:
    x = np.array([[1.0, bad], [5.0, 2.0]], np.float32)
    for nonfinite in ("propagate", "skip", "raise"):
        layer = BatchNorm(2, decay=0.5, nonfinite=nonfinite, epsilon=0.0)
        before = snapshot(layer)
        if nonfinite == "raise":
            with pytest.raises(ValueError, match=r"channels? 1"):
                layer(x, training=True)
            assert snapshot(layer) == before
            continue
        y = layer(x, training=True)
        assert y[:, 0].tolist() == [-1, 1]
        assert np.isnan(y[:, 1]).all()
        assert (layer.moving_mean[0], layer.moving_variance[0]) == (1.5, 4.5)
        if nonfinite == "propagate":
            assert np.isnan(layer.moving_mean[1])
            assert np.isnan(layer.moving_variance[1])
        else:
            assert (layer.moving_mean[1], layer.moving_variance[1]) == (0, 1)


def test_raising_leaves_the_output_alone_too() -> None:
    layer = BatchNorm(1, nonfinite="raise")
    x, out = np.array([[np.nan], [1.0]], np.float32), np.full((2, 1), 7, np.float32)
    with pytest.raises(ValueError, match="finite"):
        layer(x, training=True, out=out)
    assert out.tolist() == [[7], [7]]
    # Where the statistics do not change, there is nothing to protect.
    assert np.isnan(layer(x, training=False)[0, 0])


# --- the gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_backward(
    rng: np.random.Generator, activation: str | None, training: bool, weighted: bool, dtype: Any
) -> None:
    layer = trained(BatchNorm(5, axis=1, activation=activation))
    x, dy, residual = (frozen(rng.standard_normal((7, 5, 6)), dtype) for _ in range(3))
    weights = frozen(rng.integers(0, 3, (7, 6))) if weighted else None
    layer(x, training=training, residual=residual, weights=weights)
    if training:
        spread = None if weights is None else weights[:, None]
        batch = reference.moments(x, (0, 2), spread)
        statistics = tuple(v.squeeze((0, 2)) for v in (batch.mean, batch.variance()))
    else:
        statistics = layer.moving_mean, layer.moving_variance
    arguments = x, layer.scale, layer.offset, *statistics
    dy = away_from_kinks(dy, *arguments, axis=1, residual=residual)
    gradients = layer.backward(dy)
    assert_gradients(
        gradients, dy, *arguments, is_training=training, axis=1, activation=activation,
        residual=residual, weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["million", "ten_thousand"])
@pytest.mark.parametrize("block", [(300, 17), (300, 3)])
def test_backward_under_a_large_mean(name: str, block: tuple[int, int]) -> None:
    # The layer keeps the mean in double. Rounded to float32 it would be off by 0.03 for 1e6 +- 1.
    x = cases.make(name, (*block, 1), cases.FLOAT32)[:, :, 0]
    dy = cases.make("standard_normal", (*block, 1), cases.FLOAT32, seed=1)[:, :, 0] + 1
    layer = BatchNorm(block[1])
    layer(x, training=True)
    batch = reference.moments(x, 0)
    statistics = batch.mean[0], batch.variance()[0]
    arguments = frozen(dy), x, layer.scale, layer.offset, *statistics
    assert_gradients(layer.backward(frozen(dy)), *arguments)


def test_backward_is_of_the_last_call(rng: np.random.Generator) -> None:
    layer = BatchNorm(3)
    first, second, dy = (frozen(rng.standard_normal((8, 3)), np.float32) for _ in range(3))
    layer(first, training=True)
    layer(second, training=False)
    inference = layer.backward(dy)
    expected = fusebn.fused_batch_norm_grad(
        dy, second, layer.scale, layer.offset, layer.moving_mean, layer.moving_variance,
        is_training=False, axis=-1,
    )  # fmt: skip
    for actual, wanted in zip(inference[:3], expected[:3], strict=True):
        assert_same_bits(actual, wanted)


def test_backward_uses_the_statistics_the_call_used(rng: np.random.Generator) -> None:
    # The moving averages move between an inference call with update and its gradient.
    layer = trained(BatchNorm(3, decay=0.0))
    mean, variance = layer.moving_mean.copy(), layer.moving_variance.copy()
    x, dy = (frozen(rng.standard_normal((8, 3)), np.float32) for _ in range(2))
    layer(x, training=False, update=True)
    assert not np.array_equal(layer.moving_mean, mean)
    assert_gradients(
        layer.backward(dy), dy, x, layer.scale, layer.offset, mean, variance, is_training=False
    )


def test_backward_of_a_frozen_layer_treats_statistics_as_constants(
    rng: np.random.Generator,
) -> None:
    layer = trained(BatchNorm(3))
    layer.freeze()
    x, dy = (frozen(rng.standard_normal((8, 3)), np.float32) for _ in range(2))
    layer(x, training=True)
    assert_gradients(
        layer.backward(dy), dy, x, layer.scale, layer.offset, layer.moving_mean,
        layer.moving_variance, is_training=False,
    )  # fmt: skip


def test_backward_without_parameters(rng: np.random.Generator) -> None:
    layer = BatchNorm(3, center=False, scale=False)
    x, dy = (frozen(rng.standard_normal((8, 3)), np.float32) for _ in range(2))
    layer(x, training=True)
    gradients = layer.backward(dy)
    assert gradients.dscale is gradients.doffset is gradients.dresidual is None
    batch = reference.moments(x, 0)
    assert_gradients(gradients, dy, x, None, None, batch.mean[0], batch.variance()[0])


def test_a_failed_call_does_not_disturb_backward(rng: np.random.Generator) -> None:
    layer = BatchNorm(3)
    x, dy = (frozen(rng.standard_normal((8, 3)), np.float32) for _ in range(2))
    layer(x, training=True)
    expected = layer.backward(dy)
    with pytest.raises(ValueError, match="channels"):
        layer(np.ones((8, 4), np.float32), training=True)
    assert_same_bits(layer.backward(dy).dx, expected.dx)


@pytest.mark.parametrize("training", [True, False])
def test_backward_knows_when_x_is_gone(training: bool) -> None:
    layer = BatchNorm(2)
    with pytest.raises(RuntimeError, match=r"BatchNorm\.backward: .*call the layer first"):
        layer.backward(np.ones((3, 2), np.float32))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    layer(x, training=training, out=x)
    with pytest.raises(RuntimeError, match=r"BatchNorm\.backward: .*out=x"):
        layer.backward(np.ones((3, 2), np.float32))
    layer(x, training=training)
    layer.backward(np.ones((3, 2), np.float32))


# --- the state --------------------------------------------------------------------------------

CONFIGS: list[dict[str, Any]] = [
    {},
    {"axis": 1, "decay": 0.5, "epsilon": 1e-5, "correction": 0},
    {"decay": None, "activation": "gelu", "nonfinite": "skip"},
    {"center": False, "zero_debias": True},
    {"scale": False, "dtype": np.float64, "nonfinite": "raise"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_state_goes_around(config: dict[str, Any]) -> None:
    layer = trained(BatchNorm(4, **config))
    state = layer.state_dict()
    assert all(isinstance(value, np.ndarray) for value in state.values())
    other = BatchNorm(4, **config)
    other.load_state_dict(state)
    assert snapshot(other) == snapshot(layer)
    assert other.num_updates == layer.num_updates == 3
    shape = (5, 4, 2) if layer.axis == 1 else (5, 4)
    x = frozen(np.random.default_rng(1).standard_normal(shape), np.float32)
    for training in (False, True, False):
        assert_same_bits(other(x, training=training), layer(x, training=training))
    assert snapshot(other) == snapshot(layer)


def test_the_state_carries_its_convention() -> None:
    layer = trained(BatchNorm(4, decay=0.25, epsilon=0.125, correction=0))
    state = layer.state_dict()
    assert (state["decay"], state["epsilon"], state["correction"]) == (0.25, 0.125, 0)
    assert state["num_updates"] == 3
    other = BatchNorm(4)
    other.load_state_dict(state)
    assert (other.decay, other.epsilon, other.correction) == (0.25, 0.125, 0)
    cumulative = BatchNorm(4)
    cumulative.load_state_dict(BatchNorm(4, decay=None).state_dict())
    assert cumulative.decay is None


def test_the_state_is_a_copy() -> None:
    layer = trained(BatchNorm(4))
    before = snapshot(layer)
    state = layer.state_dict()
    for value in state.values():
        value[...] = 0
    assert snapshot(layer) == before
    held: Array = layer.moving_mean
    layer.load_state_dict(BatchNorm(4).state_dict())
    state = layer.state_dict()
    trained(layer)
    assert state["moving_mean"].tolist() == [0] * 4
    assert layer.moving_mean is held


def test_layers_copy_and_pickle() -> None:
    layer = trained(BatchNorm(4, activation="relu"))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert snapshot(twin) == snapshot(layer)
        trained(twin)
        assert snapshot(twin) != snapshot(layer)


def test_repr_is_its_constructor() -> None:
    layer = BatchNorm(4, axis=1, decay=None, activation="silu")
    again = eval(repr(layer), {"BatchNorm": BatchNorm})
    assert repr(again) == repr(layer)
    assert "decay=None" in repr(layer)


# --- the layer in a network -------------------------------------------------------------------


def test_gradient_of_a_small_network_by_finite_differences() -> None:
    rng = np.random.default_rng(5)
    x, target = rng.standard_normal((12, 3)), rng.standard_normal((12, 2))
    first, second = rng.standard_normal((3, 4)), rng.standard_normal((4, 2))
    layer = BatchNorm(4, activation="gelu", dtype=np.float64, epsilon=0.01)

    def loss(first: Array) -> float:
        y = layer(x @ first, training=True, update=False) @ second
        return float(((y - target) ** 2).sum())

    residual = 2 * (layer(x @ first, training=True, update=False) @ second - target)
    analytic = x.T @ layer.backward(residual @ second.T).dx
    for index in np.ndindex(first.shape):
        step = np.zeros_like(first)
        step[index] = 1e-6
        difference = (loss(first + step) - loss(first - step)) / 2e-6
        assert difference == pytest.approx(analytic[index], rel=1e-6, abs=1e-7)


def test_parameters_of_another_type_than_x(rng: np.random.Generator) -> None:
    layer = BatchNorm(4, dtype=np.float64)
    scale, offset = parameters(rng, 4, cases.FLOAT64)
    assert layer.scale is not None
    assert layer.offset is not None
    layer.scale[...], layer.offset[...] = scale, offset
    x = frozen(rng.standard_normal((30, 4)), cases.BFLOAT16)
    y = layer(x, training=True)
    expected = reference.fused_batch_norm(x, scale, offset)
    magnitude = np.abs(expected.y) + 2 * np.abs(scale) + np.abs(offset)
    assert_close(y, expected.y, dtype=x.dtype, magnitude=magnitude, ulps=ULPS[x.dtype])
    assert layer.moving_mean.dtype == np.float64


def test_a_pickle_and_a_copy_hold_the_layer_and_not_the_batch() -> None:
    layer = fusebn.BatchNorm(4)
    layer(np.ones((100_000, 4), np.float32), training=True)
    data = pickle.dumps(layer)
    assert len(data) < 2000
    for twin in (pickle.loads(data), copy.copy(layer), copy.deepcopy(layer)):
        assert twin.num_updates == 1
        twin.moving_mean[:] = 7
        assert layer.moving_mean[0] != 7
        with pytest.raises(RuntimeError, match="call the layer first"):
            twin.backward(np.ones((1, 4), np.float32))
    assert layer.backward(np.ones((100_000, 4), np.float32)).dx.shape == (100_000, 4)
