"""What the layer does that Keras's does not, against the oracle."""

from __future__ import annotations

import doctest
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from steps import BACKEND, chosen, numpy, step

import cases
from conftest import Array, assert_forward, assert_gradients, away_from_kinks, frozen
from fusebn import _reference as reference
from fusebn.keras import BatchNormalization, _fold, _fuse, _quantize, layers

IMAGES = (6, 4, 3, 5)


def built(shape: Any, rng: np.random.Generator | None = None, **options: Any) -> Any:
    """Return a layer that has its weights; with a generator, at values of their own."""
    layer = BatchNormalization(**{"momentum": 0.75, **options})
    layer.build(shape)
    for weight in layer.weights if rng is not None else ():
        weight.assign(rng.uniform(0.5, 2, weight.shape))
    return layer


def averages(layer: Any) -> list[Array]:
    return [numpy(weight) for weight in layer.non_trainable_weights]


def assert_unchanged(layer: Any, before: list[Array]) -> None:
    for now, then in zip(averages(layer), before, strict=True):
        np.testing.assert_array_equal(now, then)


def batch(rng: np.random.Generator, shape: Any = IMAGES) -> Array:
    return frozen(rng.normal(3, 2, shape), np.float32)


# ---- fused ----


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", chosen(cases.ACTIVATIONS, None, "leaky_relu", "gelu"))
def test_activation_and_residual(
    activation: str | None, residual: bool, rng: np.random.Generator
) -> None:
    x, dy = batch(rng), frozen(rng.normal(size=IMAGES), np.float32)
    r = batch(rng) if residual else None
    layer = built(IMAGES, rng, activation=activation)
    gamma, beta, mean, variance = (numpy(weight) for weight in layer.weights)
    statistics = reference.fused_batch_norm(x, None, None, correction=0)
    dy = away_from_kinks(dy, x, gamma, beta, statistics.mean, statistics.variance, residual=r)
    found = step(layer, x, dy, r, training=True)
    options: dict[str, Any] = {"activation": activation, "residual": r}
    assert_forward(
        (found.y, *averages(layer)), x, gamma, beta, mean, variance, 0.001, True, 0.25,
        correction=0, **options,
    )  # fmt: skip
    assert_gradients(
        (found.dx, *found.dparameters, found.dresidual), dy, x, gamma, beta,
        statistics.mean, statistics.variance, **options,
    )  # fmt: skip
    after = averages(layer)
    inference = numpy(layer(x, training=False, residual=r))
    assert_forward((inference, *after), x, gamma, beta, *after, is_training=False, **options)


@pytest.mark.parametrize("correction", [1, 0.5])
def test_correction(correction: float, rng: np.random.Generator) -> None:
    x, layer = batch(rng), built(IMAGES, correction=correction)
    y = numpy(layer(x, training=True))
    options = {"correction": correction}
    zeros, ones = np.zeros(5, "float32"), np.ones(5, "float32")
    assert_forward((y, *averages(layer)), x, ones, zeros, zeros, ones, 0.001, True, 0.25, **options)


# ---- hard data ----


def test_a_constant_yields_beta() -> None:
    x = np.full((8, 16, 16, 3), 542.37, "float32")
    layer = built(x.shape, beta_initializer=keras.initializers.Constant(0.5))
    np.testing.assert_array_equal(numpy(layer(x, training=True)), np.full(x.shape, 0.5, "float32"))
    np.testing.assert_array_equal(averages(layer)[1], np.full(3, 0.75, "float32"))


def test_a_mean_far_from_0(rng: np.random.Generator) -> None:
    x, layer = frozen(rng.normal(1e4, 1, (64, 8, 8, 3)), np.float32), built((64, 8, 8, 3))
    y = numpy(layer(x, training=True))
    zeros, ones = np.zeros(3, "float32"), np.ones(3, "float32")
    assert_forward(
        (y, *averages(layer)), x, ones, zeros, zeros, ones, 0.001, True, 0.25, correction=0
    )


def test_one_value_a_channel() -> None:
    layer = built((1, 3), beta_initializer="ones")
    y = layer(np.full((1, 3), 7.0, "float32"), training=True)
    np.testing.assert_array_equal(numpy(y), np.ones((1, 3), "float32"))
    np.testing.assert_array_equal(averages(layer), np.float32([[7 / 4] * 3, [0.75] * 3]))


@pytest.mark.parametrize("momentum", [0.75, 0.0])
@pytest.mark.parametrize("renorm", [False, True])
def test_an_empty_batch(momentum: float, renorm: bool, rng: np.random.Generator) -> None:
    layer = built((None, 4, 3), rng, momentum=momentum, renorm=renorm)
    before = averages(layer)
    assert numpy(layer(np.zeros((0, 4, 3), "float32"), training=True)).shape == (0, 4, 3)
    assert_unchanged(layer, before)


# ---- masks ----


@pytest.mark.parametrize(("axis", "shape"), [(1, (6, 5, 4, 3)), (-1, (6, 4, 3, 1)), (-1, (6, 1))])
def test_a_mask(axis: int, shape: Any, rng: np.random.Generator) -> None:
    x, dy = np.array(batch(rng, shape)), frozen(rng.normal(size=shape), np.float32)
    mask = rng.random(np.delete(shape, axis)) < 0.6
    mask.flat[0], mask.flat[1] = True, False
    np.moveaxis(x, axis, -1)[~mask] = 1e30  # nothing that is masked is seen
    layer = built(shape, rng, axis=axis)
    gamma, beta, mean, variance = (numpy(weight) for weight in layer.weights)
    found = step(layer, x, dy, training=True, mask=mask)
    options: dict[str, Any] = {"axis": axis, "weights": mask}
    assert_forward(
        (found.y, *averages(layer)), x, gamma, beta, mean, variance, 0.001, True, 0.25,
        correction=0, **options,
    )  # fmt: skip
    dy, kept = np.array(dy), np.broadcast_to(np.expand_dims(mask, axis), shape)
    x, dy = np.where(kept, x, 0).astype("float32"), np.where(kept, dy, 0).astype("float32")
    found = step(layer, x, dy, training=True, mask=mask)
    statistics = reference.fused_batch_norm(x, None, None, correction=0, **options)
    assert_gradients(
        (found.dx, *found.dparameters, None), dy, x, gamma, beta, statistics.mean,
        statistics.variance, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"renorm": True}], ids=str)
def test_nothing_but_masked(options: Any, rng: np.random.Generator) -> None:
    x, layer = np.full((4, 3), np.nan, "float32"), built((4, 3), rng, activation="relu", **options)
    before = averages(layer)
    y = numpy(layer(x, training=True, mask=np.zeros(4, "bool")))
    np.testing.assert_array_equal(y, np.broadcast_to(numpy(layer.beta), (4, 3)))
    assert_unchanged(layer, before)


def test_a_mask_comes_by_itself_with_a_residual_too(rng: np.random.Generator) -> None:
    x = np.array(batch(rng, (5, 7, 3)))
    x[:, 4:] = 0
    masked, layer = keras.layers.Masking()(x), built((5, 7, 3))
    y = layer(masked, training=True, residual=masked)
    assert averages(layer)[0] == pytest.approx(x[:, :4].mean((0, 1)) / 4, rel=1e-5)
    assert ops.any(y._keras_mask)


# ---- training as a tensor, freezing ----


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}], ids=str)
def test_training_is_read_when_it_runs(options: Any, rng: np.random.Generator) -> None:
    x = batch(rng)
    layer, twin = (built(IMAGES, **options) for _ in range(2))
    call, traces = _compiled(layer)
    for training in (True, False, True):
        y = call(x, training)
        np.testing.assert_allclose(numpy(y), numpy(twin(x, training=training)), atol=1e-5)
        for ours, other in zip(averages(layer), averages(twin), strict=True):
            np.testing.assert_allclose(ours, other, rtol=1e-5)
    assert len(traces) == (3 if BACKEND == "torch" else 1)


def _compiled(layer: Any) -> tuple[Any, list[Any]]:
    """Return a call of a layer, compiled where there is a compiler, and a list of its traces."""
    traces: list[Any] = []

    def traced(x: Any, training: Any, **options: Any) -> Any:
        traces.append(training)
        return layer(x, training=training)

    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(traced)
        return lambda x, training: function(x, tf.constant(training)), traces
    if BACKEND == "torch":
        import torch

        return lambda x, training: traced(x, torch.tensor(training)), traces
    import jax

    @jax.jit
    def stateless(state: Any, x: Any, training: Any) -> Any:
        traces.append(training)
        parameters = [variable.value for variable in layer.trainable_variables]
        return layer.stateless_call(parameters, state, x, training=training)

    def call(x: Any, training: bool) -> Any:
        state = layer.non_trainable_variables
        y, new = stateless([variable.value for variable in state], x, np.bool_(training))
        for variable, value in zip(state, new, strict=True):
            variable.assign(value)
        return y

    return call, traces


def test_training_must_be_a_scalar() -> None:
    with pytest.raises(TypeError, match="`training` must be a bool, or a boolean scalar; got a"):
        built((2, 3))(np.ones((2, 3)), training=ops.convert_to_tensor([True, False]))


def test_not_trainable_is_inference(rng: np.random.Generator) -> None:
    x, layer = batch(rng), built(IMAGES, rng, activation="relu")
    layer.trainable = False
    before = [numpy(weight) for weight in layer.weights]
    y = numpy(layer(x, training=ops.convert_to_tensor(True)))
    assert_forward((y, *before[2:]), x, *before, is_training=False, activation="relu")
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


# ---- virtual batches, renormalization, several axes ----


@pytest.mark.parametrize("axis", [-1, 1, [1, 3]], ids=str)
def test_virtual_batches(axis: Any, rng: np.random.Generator) -> None:
    x, r = batch(rng), batch(rng)
    layer = built(IMAGES, rng, axis=axis, virtual_batch_size=2, activation="silu")
    twins = [built(IMAGES, axis=axis, activation="silu") for _ in range(3)]
    for twin in twins:
        twin.set_weights(layer.get_weights())
    y = numpy(layer(x, training=True, residual=r))
    for j, twin in enumerate(twins):
        expected = numpy(twin(x[j::3], training=True, residual=r[j::3]))
        np.testing.assert_allclose(y[j::3], expected, rtol=1e-5, atol=1e-5)
    for mine, *others in zip(averages(layer), *map(averages, twins), strict=True):
        np.testing.assert_allclose(mine, np.mean(others, 0), rtol=1e-5)
    five = numpy(layer(x[:5], training=False))  # only training cuts
    np.testing.assert_allclose(five, numpy(layer(x, training=False))[:5], rtol=1e-6)


def test_renormalization_against_its_formula(rng: np.random.Generator) -> None:
    clipping = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
    layer = built(
        IMAGES, rng, renorm=True, renorm_clipping=clipping, renorm_momentum=0.5, correction=1
    )
    x, n = batch(rng), 6 * 4 * 3
    gamma, beta, mean, _, stddev, renorm_mean, renorm_stddev = map(numpy, layer.weights)
    y = numpy(layer(x, training=True))
    m, v = x.mean((0, 1, 2), "float64"), x.var((0, 1, 2), "float64")
    s = np.sqrt(v + 0.001)
    r, d = np.clip(s / renorm_stddev, 0.5, 2), np.clip((m - renorm_mean) / renorm_stddev, -1, 1)
    np.testing.assert_allclose(y, ((x - m) / s * r + d) * gamma + beta, rtol=1e-4, atol=1e-4)
    new = 0.75 * stddev + 0.25 * np.sqrt(v * n / (n - 1) + 0.001)
    expected = [
        0.75 * mean + 0.25 * m, new**2 - 0.001, new,
        (renorm_mean + m) / 2, (renorm_stddev + s) / 2,
    ]  # fmt: skip
    np.testing.assert_allclose(averages(layer), expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [[1, 3], [3, 2], (-1,), [1, 2, 3]], ids=str)
def test_several_axes(axis: Any, rng: np.random.Generator) -> None:
    x, dy = batch(rng), frozen(rng.normal(size=IMAGES), np.float32)
    layer = built(IMAGES, rng, axis=axis)
    axes = sorted(i % 4 for i in axis)
    assert layer.gamma.shape == tuple(IMAGES[i] for i in axes)
    others = [i for i in range(4) if i not in axes]
    mask = rng.random([IMAGES[i] for i in others]) < 0.7
    mask.flat[0] = True
    flat = x.transpose(others + axes).reshape(-1, int(np.prod(layer.gamma.shape)))
    weights = np.ascontiguousarray(mask.reshape(-1))
    gamma, beta, mean, _ = (numpy(weight).reshape(-1) for weight in layer.weights)
    found = step(layer, x, dy, training=True, mask=mask)
    back = [(others + axes).index(i) for i in range(4)]
    want = reference.fused_batch_norm(flat, gamma, beta, axis=-1, weights=weights, correction=0)
    shaped = np.asarray(want.y).reshape([IMAGES[i] for i in others + axes]).transpose(back)
    np.testing.assert_allclose(found.y, shaped.astype("float64"), rtol=1e-4, atol=1e-4)
    assert averages(layer)[0].reshape(-1) == pytest.approx(0.75 * mean + 0.25 * want.mean, rel=1e-4)
    assert found.dparameters[0].shape == layer.gamma.shape


# ---- what is not finite ----


def spoilt(rng: np.random.Generator) -> Array:
    x = np.array(batch(rng))
    x[2, 1, 1, 3] = np.inf
    return x


def test_nonfinite_skips_one_channel(rng: np.random.Generator) -> None:
    x = spoilt(rng)
    skipping, plain = built(IMAGES, nonfinite="skip"), built(IMAGES)
    before = averages(skipping)
    for layer in (skipping, plain):
        layer(x, training=True)
    for mine, old, other in zip(averages(skipping), before, averages(plain), strict=True):
        np.testing.assert_array_equal(mine[3], old[3])
        np.testing.assert_array_equal(np.delete(mine, 3), np.delete(other, 3))
        assert np.isnan(other[3])


def test_nonfinite_raises_before_anything_changes(rng: np.random.Generator) -> None:
    layer = built(IMAGES, nonfinite="raise")
    before = averages(layer)
    with pytest.raises(ValueError, match="got NaN or Inf in channels 3"):
        layer(spoilt(rng), training=True)
    assert_unchanged(layer, before)
    layer(batch(rng), training=True)
    assert averages(layer)[0].all()


# ---- configuration ----


def test_the_extras_survive_their_configuration() -> None:
    options = {"axis": [1, 2], "activation": "gelu", "correction": 1.0, "virtual_batch_size": 4,
               "nonfinite": "skip"}  # fmt: skip
    layer = BatchNormalization(**options)
    config = layer.get_config()
    assert {name: config[name] for name in options} == options
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is BatchNormalization
    assert again.get_config() == config
    assert keras.saving.get_registered_name(BatchNormalization) == "fusebn>BatchNormalization"


def test_symbolic_calls() -> None:
    x = keras.Input((4, 4, 3), dtype="float16")
    y = BatchNormalization(activation="relu", dtype="mixed_float16")(x, residual=x)
    assert (y.shape, y.dtype) == ((None, 4, 4, 3), "float16")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"activation": "tanh"}, ValueError, "`activation` must be one of None, 'relu'"),
        ({"activation": len}, TypeError, "Apply any other function to y yourself"),
        ({"correction": -1}, ValueError, "`correction` must be finite and not negative; got -1"),
        ({"momentum": 1.5}, ValueError, r"`momentum` must lie in \[0, 1\]; got 1.5"),
        ({"epsilon": -1}, ValueError, "`epsilon` must be finite and not negative"),
        ({"nonfinite": "ignore"}, ValueError, "`nonfinite` must be one of 'propagate', 'skip'"),
        ({"virtual_batch_size": 0}, ValueError, "`virtual_batch_size` must be at least 1; got 0"),
        (
            {"virtual_batch_size": 2, "synchronized": True},
            ValueError,
            "`virtual_batch_size` must be None with synchronized=True; got 2",
        ),
        ({"axis": [1.5]}, TypeError, "`axis` must be an integer; got 1.5"),
    ],
)
def test_bad_constructors(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=f"^BatchNormalization: .*{match}|{match}"):
        BatchNormalization(**options)


@pytest.mark.parametrize(
    ("options", "call", "error", "match"),
    [
        ({"axis": [1, -3]}, {}, ValueError, "`axis` must name each axis once, and one at least"),
        ({"axis": []}, {}, ValueError, "`axis` must name each axis once, and one at least"),
        ({"axis": [1, 5]}, {}, ValueError, r"`axis` must lie in \[-4, 4\); got 5"),
        ({}, {"residual": (6, 4, 3, 1)}, ValueError, "`residual` must have the shape of inputs"),
        ({}, {"mask": (6, 4, 7)}, ValueError, r"`mask` must broadcast to \(6, 4, 3\)"),
        ({"axis": [1, 3]}, {"mask": (6, 4, 3)}, ValueError, "`mask` must have the shape of inputs"),
        ({"virtual_batch_size": 4}, {}, ValueError, "divide the size of the batch in training, 6"),
        ({"virtual_batch_size": 2}, {"mask": (6, 4, 3)}, ValueError, "`mask` must be None with"),
        ({"virtual_batch_size": 2, "axis": 0}, {}, ValueError, "`axis` must leave out axis 0"),
    ],
)  # fmt: skip
def test_bad_calls(options: Any, call: Any, error: Any, match: str) -> None:
    given = {name: np.ones(shape, "float32") for name, shape in call.items()}
    layer = BatchNormalization(**options)
    with pytest.raises(error, match=match):
        layer(np.ones(IMAGES, "float32"), training=True, **given)


def test_a_residual_is_checked_while_a_model_is_built() -> None:
    x, other = keras.Input((4, 3)), keras.Input((5, 3))
    with pytest.raises(ValueError, match="`residual` must have the shape of inputs"):
        BatchNormalization()(x, residual=other)


@pytest.mark.parametrize(
    "module", [layers, _fold, _fuse, _quantize], ids=lambda module: module.__name__
)
def test_examples(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
