"""`fuse` and `explain`: another model that computes the same."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from networks import NETWORKS, data, mobilenet, resnet, sequential
from steps import chosen, numpy

from fusebn.keras import BatchNormalization, explain, fuse

FOLDED = {
    "sequential": {"norm": (False, "relu")},
    "resnet": {
        "stem_norm": (False, "relu"), "a_norm": (False, "relu"), "b_norm": (True, "relu"),
        "c_norm": (False, "relu"), "d_norm": (False, None), "shortcut_norm": (True, "relu"),
    },
    "mobilenet": {
        "expand_norm": (False, "relu6"), "depthwise_norm": (False, "silu"),
        "project_norm": (True, None),
    },
}  # fmt: skip
FOLDS = re.compile(r".*relu.*|.*sum|activation.*")


def fold_of(model: Any) -> dict[str, tuple[bool, str | None]]:
    return {row.name: (row.residual, row.activation) for row in explain(model)}


def fitted(model: Any) -> list[float]:
    history = model.fit(*data(), batch_size=8, epochs=1, verbose=0, shuffle=False)
    return history.history["loss"]


def called(model: Any, training: bool = False) -> Any:
    return numpy(model(data()[0], training=training))


@pytest.mark.parametrize("network", chosen(NETWORKS, "sequential"))
def test_a_fused_model_computes_the_same(network: str) -> None:
    model = NETWORKS[network]()
    called(model, training=True)  # averages of its own
    before = {weight.path: numpy(weight) for weight in model.weights}
    fused = fuse(model)
    assert (fused.name, type(fused)) == (model.name, type(model))
    assert fold_of(fused) == FOLDED[network]
    assert all(row.ours for row in explain(fused))
    assert {weight.path for weight in fused.weights} == set(before)
    for weight in fused.weights:
        np.testing.assert_array_equal(numpy(weight), before[weight.path])
    for training in (True, False):
        np.testing.assert_allclose(called(fused, training), called(model, training), atol=2e-5)


def test_a_compiled_model_goes_on_where_it_was() -> None:
    keras.utils.set_random_seed(3)
    model = resnet()
    model.compile("adam", "mse", metrics=["mae"])
    fitted(model)
    fused = fuse(model)
    # With averages of its own to start from, Adam's first steps would be others.
    assert fitted(fused) == pytest.approx(fitted(model), rel=1e-4)
    assert int(fused.optimizer.iterations) == 8
    np.testing.assert_allclose(called(fused), called(model), atol=5e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_was_folded_is_gone_and_the_rest_keeps_its_name(network: str) -> None:
    model = NETWORKS[network]()
    gone = {layer.name for layer in model.layers if FOLDS.fullmatch(layer.name)}
    assert gone
    names = [layer.name for layer in fuse(model).layers]
    assert sorted(names) == sorted({layer.name for layer in model.layers} - gone)
    assert all(type(layer) is not BatchNormalization for layer in model.layers)


def test_fusing_twice_is_fusing_once() -> None:
    once = fuse(resnet())
    twice = fuse(once)
    assert fold_of(twice) == fold_of(once)
    np.testing.assert_array_equal(called(twice), called(once))


def test_a_fused_model_is_saved_and_loaded(tmp_path: Any) -> None:
    fused = fuse(resnet())
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras")
    np.testing.assert_array_equal(called(loaded), called(fused))
    assert fold_of(loaded) == FOLDED["resnet"]


def test_trainable_stays() -> None:
    model = resnet()
    model.get_layer("a_norm").trainable = False
    model.get_layer("b_conv").trainable = False
    fused = fuse(model)
    for layer in model.layers:
        if layer.weights:
            assert fused.get_layer(layer.name).trainable is layer.trainable
    model.trainable = False
    assert not fuse(model).trainable_weights


def test_models_in_models() -> None:
    inner = sequential()
    x = keras.Input((8, 8, 3))
    y = layers.BatchNormalization(name="outer")(x)
    model = keras.Model(x, layers.ReLU()(inner(y)), name="both")
    fused = fuse(model)
    assert fold_of(fused) == {"outer": (False, None), "small/norm": (False, "relu")}
    np.testing.assert_allclose(called(fused), called(model), atol=1e-5)


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = layers.BatchNormalization(name="inside")

    def build(self, shape: Any) -> None:
        self.norm.build(shape)

    def call(self, x: Any, training: Any = None) -> Any:
        return keras.ops.relu(self.norm(x, training=training))


def test_batch_norms_in_layers_of_others() -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), Block(name="block"), layers.Flatten()])
    fused = fuse(model)
    (row,) = explain(fused)
    assert (row.name, row.ours, row.reason) == (
        "block/inside",
        True,
        "how it is called is not known",
    )
    np.testing.assert_allclose(
        numpy(fused(data()[0], training=True)), numpy(model(data()[0], training=True)), atol=1e-5
    )
    assert not explain(model)[0].ours


def test_a_model_of_ones_own_changes_in_place() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [Block(), Block()]
            self.head = layers.Dense(2)

        def call(self, x: Any, training: Any = None) -> Any:
            for block in self.blocks:
                x = block(x, training=training)
            return self.head(keras.ops.mean(x, (1, 2)))

    model = Own()
    model.compile("adam", "mse")
    fitted(model)
    before, weights = called(model), model.weights
    assert fuse(model) is model
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    assert [row.ours for row in explain(model)] == [True, True]
    np.testing.assert_allclose(called(model), before, atol=1e-5)
    mean = numpy(model.blocks[1].norm.moving_mean)
    fitted(model)
    assert (numpy(model.blocks[1].norm.moving_mean) != mean).all()


# ---- what is left alone ----


def build(after: Any) -> Any:
    x = keras.Input((4, 4, 3))
    return keras.Model(x, after(x, layers.BatchNormalization(name="norm")))


def two_readers(x: Any, norm: Any) -> Any:
    y = norm(x)
    return layers.ReLU()(y) + layers.Flatten()(y)[:, :1, None, None]


def called_twice(x: Any, norm: Any) -> Any:
    return layers.ReLU()(norm(x)) + layers.ReLU()(norm(x * 2.0))


def then(layer: Any) -> Any:
    return lambda x, norm: layer(norm(x))


LEFT: dict[str, tuple[Any, str]] = {
    "another activation": (then(layers.Activation("tanh", name="t")), "Activation 't' follows"),
    "another slope": (then(layers.LeakyReLU(0.2, name="l")), "LeakyReLU 'l' follows"),
    "a threshold": (then(layers.ReLU(threshold=1.0, name="r")), "ReLU 'r' follows"),
    "an approximation": (lambda x, norm: keras.ops.gelu(norm(x), approximate=True), "follows"),
    "a regularizer": (then(layers.ReLU(activity_regularizer="l2", name="r")), "ReLU 'r' follows"),
    "another type": (then(layers.ReLU(dtype="float64", name="r")), "ReLU 'r' follows"),
    "an output": (lambda x, norm: norm(x), "is an output of the model"),
    "two readers": (two_readers, "has 2 readers"),
    "called twice": (called_twice, "is called 2 times"),
    "a sum that broadcasts": (lambda x, norm: norm(x) + x[:, :1], "Add 'add"),
    "a sum with itself": (lambda x, norm: (lambda y: y + y)(norm(x)), "has 2 readers"),
    "a sum of three": (lambda x, norm: layers.Add(name="s")([norm(x), x, x]), "Add 's' follows"),
}


@pytest.mark.parametrize("case", chosen(LEFT, "two readers"))
def test_what_is_not_the_pattern_is_left(case: str) -> None:
    after, reason = LEFT[case]
    model = build(after)
    fused = fuse(model)
    (row,) = explain(fused)
    assert (row.ours, row.residual, row.activation) == (True, False, None)
    assert reason in row.reason
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype("float32")
    for training in (True, False):
        found, wanted = (numpy(one(x, training=training)) for one in (fused, model))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_subclasses_are_left() -> None:
    class Special(layers.BatchNormalization):
        pass

    with keras.saving.custom_object_scope({"Special": Special}):
        fused = fuse(sequential(Special))
    (row,) = explain(fused)
    assert (row.ours, row.activation, row.reason) == (False, None, "its class is not Keras's own")


def test_masks_and_options_of_calls_stay() -> None:
    x = keras.Input((6, 3))
    y = layers.BatchNormalization(name="norm")(layers.Masking()(x), training=False)
    model = keras.Model(x, layers.ReLU()(y))
    fused = fuse(model)
    values = np.random.default_rng(0).normal(2, 3, (4, 6, 3)).astype("float32")
    found, wanted = (numpy(one(values, training=True)) for one in (fused, model))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert fold_of(fused) == {"norm": (False, "relu")}


def test_a_loss_of_ones_own() -> None:
    def loss(wanted: Any, found: Any) -> Any:
        return keras.ops.mean(keras.ops.abs(wanted - found))

    model = mobilenet()
    model.compile("sgd", loss)
    with pytest.warns(UserWarning, match=r"The fused model is not compiled, call compile\(\)"):
        fused = fuse(model)
    assert model.compiled
    assert not fused.compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.compile("sgd", loss)


@pytest.mark.parametrize("function", [fuse, explain])
def test_it_takes_models_only(function: Any) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model; got Dense"):
        function(layers.Dense(2))
