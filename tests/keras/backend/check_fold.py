"""`fold` and `explain_fold`: a model without batch norms that predicts the same."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from networks import NETWORKS, data, mobilenet, resnet
from steps import BACKEND, chosen, numpy

from fusebn.keras import BatchNormalization, FakeQuantize, explain_fold, fold, fuse

# JAX has no float64, unless asked; on PyTorch, Keras multiplies matrices of it in float32.
DTYPE, TOLERANCE = ("float64", 1e-12) if BACKEND == "tensorflow" else ("float32", 1e-5)
LAYERS: dict[str, tuple[tuple[int, ...], Any]] = {
    "Dense": ((5,), lambda **k: layers.Dense(4, **k)),
    "Dense of images": ((6, 5, 4), lambda **k: layers.Dense(3, **k)),
    "Conv1D": ((9, 4), lambda **k: layers.Conv1D(6, 3, padding="causal", **k)),
    "Conv2D": ((7, 8, 4), lambda **k: layers.Conv2D(6, (3, 2), 2, padding="same", **k)),
    "Conv2D, groups": ((7, 8, 4), lambda **k: layers.Conv2D(6, 3, groups=2, **k)),
    "Conv2D, dilated": ((7, 8, 4), lambda **k: layers.Conv2D(6, 3, dilation_rate=2, **k)),
    "Conv3D": ((5, 4, 5, 2), lambda **k: layers.Conv3D(3, 2, **k)),
    "DepthwiseConv1D": ((8, 4), lambda **k: layers.DepthwiseConv1D(3, depth_multiplier=2, **k)),
    "DepthwiseConv2D": ((7, 7, 4), lambda **k: layers.DepthwiseConv2D(3, depth_multiplier=2, **k)),
    "SeparableConv1D": ((8, 4), lambda **k: layers.SeparableConv1D(5, 3, **k)),
    "SeparableConv2D": ((7, 7, 4), lambda **k: layers.SeparableConv2D(5, 3, **k)),
    "Conv1DTranspose": ((5, 4), lambda **k: layers.Conv1DTranspose(3, 3, 2, **k)),
    "Conv2DTranspose": ((5, 6, 4), lambda **k: layers.Conv2DTranspose(3, 3, 2, **k)),
    "Conv3DTranspose": ((3, 4, 3, 2), lambda **k: layers.Conv3DTranspose(3, 2, 2, **k)),
}
BEFORE = [
    name for name in LAYERS if "Transpose" not in name and "Separable" not in name
]  # fmt: skip


def randomized(model: Any) -> Any:
    """Give all weights values of their own, variances positive; the first scale is 0."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.uniform(0.2, 1, weight.shape))
    for layer in model.layers:
        if isinstance(layer, layers_of_norms) and layer.gamma is not None:
            values = numpy(layer.gamma).copy()
            values[0] = 0
            layer.gamma.assign(values)
            layer.moving_variance.assign(np.where(values == 0, 0, numpy(layer.moving_variance)))
    return model


layers_of_norms = keras.layers.BatchNormalization


def kinds(model: Any) -> list[str]:
    return [type(layer).__name__ for layer in model.layers]


def assert_same(folded: Any, model: Any, shape: Any, tolerance: float = TOLERANCE) -> None:
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(DTYPE)
    want, got = numpy(model(x)), numpy(folded(x))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
@pytest.mark.parametrize("name", chosen(LAYERS, "Dense", "Conv2D", "DepthwiseConv2D"))
def test_a_layer_takes_over_what_comes_after_it(name: str, norm: Any, use_bias: bool) -> None:
    shape, make = LAYERS[name]
    options: dict[str, Any] = {"dtype": DTYPE, "name": "linear", "use_bias": use_bias}
    model = keras.Sequential([keras.Input(shape, dtype=DTYPE), make(**options), norm(dtype=DTYPE)])
    randomized(model)
    folded = fold(model)
    assert [type(layer) for layer in folded.layers] == [type(model.layers[0])]
    assert folded.layers[0].name == "linear"
    assert_same(folded, model, shape)
    assert len(model.layers) == 2
    assert model.layers[0].use_bias is use_bias


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", chosen(BEFORE, "Conv2D, groups"))
def test_a_layer_takes_over_what_comes_before_it(name: str, use_bias: bool) -> None:
    shape, make = LAYERS[name]
    linear = make(dtype=DTYPE, name="linear", use_bias=use_bias, activation="tanh")
    x = keras.Input(shape, dtype=DTYPE)
    norm = BatchNormalization(dtype=DTYPE, name="norm")
    model = randomized(keras.Model(x, linear(norm(layers.ReLU(dtype=DTYPE)(x)))))
    assert "BatchNormalization" in kinds(fold(model))
    folded = fold(model, before=True)
    padded = name in ("Conv1D", "Conv2D")
    (row,) = explain_fold(model, before=True)
    assert (row.layer is None) is padded
    assert ("pads zeros" in row.reason) is padded
    assert ("BatchNormalization" in kinds(folded)) is padded
    assert_same(folded, model, shape)


def test_channels_first() -> None:
    if BACKEND == "tensorflow":
        return  # its CPU has no such convolution
    x = keras.Input((4, 7, 6), dtype=DTYPE)
    conv = layers.Conv2D(3, 3, data_format="channels_first", dtype=DTYPE)
    model = randomized(keras.Model(x, BatchNormalization(axis=1, dtype=DTYPE)(conv(x))))
    assert kinds(fold(model)) == ["InputLayer", "Conv2D"]
    assert_same(fold(model), model, (4, 7, 6))


@pytest.mark.parametrize("fused", chosen([False, True], True))
@pytest.mark.parametrize("name", chosen(NETWORKS, "sequential"))
def test_networks(name: str, fused: bool) -> None:
    model = randomized(NETWORKS[name]())
    names = {layer.name for layer in model.layers}
    if fused:
        model = fuse(model)
    folded = fold(model)
    found = {row.name: row.layer for row in explain_fold(model)}
    left = [layer.name for layer in folded.layers if isinstance(layer, layers_of_norms)]
    assert left == [norm for norm, layer in found.items() if layer is None]
    assert left == []
    assert fused or {layer.name for layer in folded.layers} == names - set(found)
    x = data()[0]
    want, got = numpy(model(x)), numpy(folded(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_activations_and_residuals_stay() -> None:
    for activation in ("relu", "relu6", "leaky_relu", "silu", "gelu", None):
        for residual in (True, False):
            x = keras.Input((6,), dtype=DTYPE)
            y = layers.Dense(6, dtype=DTYPE)(x)
            norm = BatchNormalization(activation=activation, dtype=DTYPE, name="norm")
            y = norm(y, residual=x) if residual else norm(y)
            model = randomized(keras.Model(x, y))
            folded = fold(model)
            rest = {"norm_sum"} if residual else set()
            rest |= {"norm"} if activation else set()
            named = {layer.name for layer in folded.layers[2:]}
            assert named == rest
            # TensorFlow's constants of these two are float32.
            rough = activation in ("leaky_relu", "gelu")
            assert_same(folded, model, (6,), max(1e-6, TOLERANCE) if rough else TOLERANCE)


def test_what_stays_and_why() -> None:
    x = keras.Input((6,))
    shared = layers.Dense(6, name="shared")
    norms = [BatchNormalization(name=f"norm{i}") for i in range(6)]
    a = norms[0](shared(x))
    b = norms[1](shared(a))
    c = layers.Dense(6, name="read")(b)
    d = norms[2](c) + c
    e = norms[3](layers.Dense(6, "relu", name="relu")(d))
    f = norms[4](layers.Dense(6, name="once")(e))
    g = norms[4](f)
    h = norms[5](x)
    model = randomized(keras.Model(x, [g, h]))
    reasons = {row.name: (row.layer, row.reason) for row in explain_fold(model)}
    assert reasons == {
        "norm0": (None, "'shared' is called 2 times"),
        "norm1": (None, "'shared' is called 2 times"),
        "norm2": (None, "what 'read' yields has 2 readers"),
        "norm3": (None, "Dense 'relu' has an activation"),
        "norm4": (None, "it comes first, or is called more than once"),
        "norm5": (None, f"InputLayer {x._keras_history.operation.name!r} is beside it"),
    }
    folded = fold(model)
    assert sorted(kinds(folded)) == sorted(kinds(model))
    x = np.ones((2, 6), "float32")
    for a, b in zip(folded(x), model(x), strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    assert str(explain_fold(model)).splitlines()[0].split("  ")[0] == "batch norm"


def test_another_axis_and_models_inside() -> None:
    inner = keras.Sequential(
        [keras.Input((5, 4)), layers.Dense(4, name="d"), BatchNormalization(name="n")], name="inner"
    )
    x = keras.Input((5, 4))
    y = layers.Dense(3, name="last")(inner(x))
    model = randomized(keras.Model(x, BatchNormalization(axis=1, name="other")(y)))
    inner.get_layer("n").moving_mean.assign([1, 2, 3, 4])
    rows = {row.name: (row.layer, row.reason) for row in explain_fold(model)}
    assert rows == {
        "inner/n": ("d", ""), "other": (None, "its axis is not that of the channels"),
    }  # fmt: skip
    folded = fold(model)
    assert kinds(folded.get_layer("inner")) == ["Dense"]
    given = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    np.testing.assert_allclose(numpy(folded(given)), numpy(model(given)), rtol=1e-4, atol=1e-5)


def test_transforms_are_folded_as_they_are_active() -> None:
    for active in (True, False):
        norm = BatchNormalization(
            transforms={"scale": FakeQuantize(3)}, transforms_active=active, dtype=DTYPE
        )
        x = keras.Input((6,), dtype=DTYPE)
        model = randomized(keras.Model(x, norm(layers.Dense(6, dtype=DTYPE)(x))))
        assert len(fold(model).layers) == 2
        assert_same(fold(model), model, (6,))


class Own(keras.Model):
    """Of which nothing is known."""


def test_errors() -> None:
    for function in (fold, explain_fold):
        with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
            function(3)
        for other in (keras.Sequential([layers.Dense(3)]), Own()):
            with pytest.raises(
                ValueError, match="must be Functional or Sequential, and built; got"
            ):
                function(other)
    model = resnet()
    model.get_layer("a_norm").moving_variance.assign([-1.0] * 4)
    with pytest.raises(ValueError, match="`layer: variance` must not be negative"):
        fold(model)
    with pytest.raises(TypeError, match="`before`"):
        fold(mobilenet(), before=2)
