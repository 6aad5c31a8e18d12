"""Transforms of the layer's variables, `FakeQuantize`, and the switch between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from networks import data, sequential
from steps import BACKEND, chosen, numpy, step

from conftest import Array, frozen
from fusebn.keras import BatchNormalization, FakeQuantize, fuse
from fusebn.quantize import FakeQuantize as Expected

IMAGES = (6, 4, 3, 5)
NAMES = ("scale", "offset", "moving_mean", "moving_variance")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation": {"activation": "relu", "correction": 1},
    "no parameters": {"scale": False, "center": False},
    "two axes": {"axis": [1, 3]},
    "synchronized": {"synchronized": True},
    "renorm": {"renorm": True},
    "virtual batches": {"virtual_batch_size": 3},
}


def squared(vector: Any) -> Any:
    return 0.5 * vector + ops.square(vector)


SMOOTH = {"scale": squared, "offset": ops.sin, "moving_mean": squared, "moving_variance": squared}


def switch(value: bool) -> Any:
    return keras.Variable(value, dtype="bool", trainable=False)


def layers(of_batch: bool, **options: Any) -> tuple[Any, Any]:
    """Return a layer without transforms, and one with, of the same weights."""
    quantize = FakeQuantize(3, limits="moving", decay=0.5)
    transforms = {**SMOOTH, "offset": quantize}
    plain = BatchNormalization(momentum=0.75, **options)
    other = BatchNormalization(
        momentum=0.75, transforms=transforms, transform_batch_statistics=of_batch, **options
    )
    rng = np.random.default_rng(1)
    for layer in (plain, other):
        layer.build(IMAGES)
    for a, b in zip(plain.weights, other.weights, strict=False):
        a.assign(rng.uniform(0.5, 2, a.shape))
        b.assign(a)
    return plain, other


def taken(layer: Any, *, training: bool, active: Any = None, **more: Any) -> list[Array]:
    """Return y, the gradients and the averages of one step."""
    rng = np.random.default_rng(2)
    x, dy = (frozen(rng.normal(3, 2, IMAGES), np.float32) for _ in range(2))
    given = {} if active is None else {"transforms_active": active}
    found = step(layer, x, dy, training=training, **given, **more)
    averages = [numpy(w) for w in layer._averages]
    return [found.y, found.dx, *(g for g in found.dparameters if g is not None), *averages]


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("name", chosen(OPTIONS, "plain", "renorm"))
def test_what_is_not_active_changes_no_bit(name: str, of_batch: bool) -> None:
    options = OPTIONS[name]
    if name in ("renorm", "virtual batches"):
        of_batch = False  # which is refused, see below
    for training in (True, False):
        for active in (False, ops.convert_to_tensor(False)):
            plain, other = layers(of_batch, **options)
            found = taken(other, training=training, active=active)
            for a, b in zip(found, taken(plain, training=training), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_averages_take_up_the_batch_as_it_is(of_batch: bool, masked: bool) -> None:
    mask = ops.convert_to_tensor(np.arange(6 * 4 * 3).reshape(6, 4, 3) % 3 > 0)
    plain, other = layers(of_batch)
    more = {"mask": mask} if masked else {}
    got, want = taken(other, training=True, **more), taken(plain, training=True, **more)
    assert np.abs(got[0] - want[0]).max() > 0.1
    for a, b in zip(got[-2:], want[-2:], strict=True):
        assert a.tobytes() == b.tobytes()


class Composite(keras.layers.Layer):
    """What the layer computes, of Keras's operations."""

    def __init__(self, of: Any, of_batch: bool, mask: Any) -> None:
        super().__init__()
        self.of, self.of_batch, self.mask = of, of_batch, mask

    def call(self, x: Any, training: bool = False) -> Any:
        of, t = self.of, SMOOTH
        mean, variance = of.moving_mean.value, of.moving_variance.value
        if training:
            w = ops.ones(IMAGES[:3]) if self.mask is None else ops.cast(self.mask, "float32")
            w = ops.expand_dims(w, -1)
            count = ops.sum(w)
            mean = ops.sum(w * x, (0, 1, 2)) / count
            variance = ops.sum(w * ops.square(x - mean), (0, 1, 2)) / count
        if self.of_batch or not training:
            mean, variance = t["moving_mean"](mean), t["moving_variance"](variance)
        scale, offset = t["scale"](of.gamma.value), t["offset"](of.beta.value)
        return (x - mean) / ops.sqrt(variance + of.epsilon) * scale + offset


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", chosen([False, True], True))
def test_against_a_composite(of_batch: bool, training: bool, masked: bool) -> None:
    mask = np.arange(6 * 4 * 3).reshape(6, 4, 3) % 3 > 0 if masked else None
    ours = BatchNormalization(transforms=SMOOTH, transform_batch_statistics=of_batch)
    ours.build(IMAGES)
    rng = np.random.default_rng(1)
    for weight in ours.weights:
        weight.assign(rng.uniform(0.5, 2, weight.shape))
    rng = np.random.default_rng(2)
    x, dy = (frozen(rng.normal(3, 2, IMAGES), np.float32) for _ in range(2))
    want = step(Composite(ours, of_batch, mask), x, dy, training=training)
    more = {} if mask is None else {"mask": ops.convert_to_tensor(mask)}
    got = step(ours, x, dy, training=training, **more)
    pairs = [(got.y, want.y), (got.dx, want.dx)]
    pairs += list(zip(got.dparameters, want.dparameters, strict=True))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * np.abs(b).max())


@pytest.mark.parametrize("of_batch", [False, True])
def test_a_mask_of_nothing(of_batch: bool) -> None:
    plain, other = layers(of_batch)
    mask = ops.zeros(IMAGES[:3], "bool")
    before = [numpy(w) for w in other._averages]
    x = ops.ones(IMAGES)
    y = numpy(other(x, training=True, mask=mask))
    assert np.isfinite(y).all()
    assert np.ptp(y.reshape(-1, 5), 0).max() == 0
    for a, b in zip(other._averages, before, strict=True):
        np.testing.assert_array_equal(numpy(a), b)
    assert np.isfinite(numpy(plain(x, training=True, mask=mask))).all()


@pytest.mark.parametrize("of_batch", [False, True])
def test_a_variance_below_0(of_batch: bool) -> None:
    transforms = {"moving_variance": ops.negative, "moving_mean": ops.zeros_like}
    layer = BatchNormalization(
        epsilon=0.25, transforms=transforms, transform_batch_statistics=of_batch
    )
    x = np.random.default_rng(0).normal(3, 2, IMAGES).astype("float32")
    np.testing.assert_allclose(numpy(layer(x, training=of_batch)), 2 * x, rtol=1e-6)
    layer.epsilon = 0.0
    np.testing.assert_array_equal(numpy(layer(x, training=of_batch)), np.zeros(IMAGES))
    effective = layer.effective_variables()
    assert (numpy(effective["variance"]) == 0).all()
    assert effective["epsilon"] == 0


def test_training_may_be_known_only_at_run_time() -> None:
    for of_batch in (False, True):
        for training in (True, False):
            _, one = layers(of_batch)
            _, other = layers(of_batch)
            tensor = ops.convert_to_tensor(training)
            x = np.random.default_rng(0).normal(3, 2, IMAGES).astype("float32")
            a, b = one(x, training=training), other(x, training=tensor)
            np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5, atol=1e-5)
            for v, w in zip(one.weights, other.weights, strict=True):
                np.testing.assert_allclose(numpy(v), numpy(w), rtol=1e-6)


# ---- the switch ----


def quantized(active: Any, *functions: Any, **options: Any) -> Any:
    transforms = {name: FakeQuantize(4, limits="moving", decay=0.5) for name in NAMES}
    transforms |= dict(zip(NAMES, functions, strict=False))
    return sequential(
        BatchNormalization, transforms=transforms, transforms_active=active, **options
    )


@pytest.mark.parametrize("of_batch", [False, True])
def test_fit_with_a_switch_compiles_once(of_batch: bool) -> None:
    traces = []

    def counted(vector: Any) -> Any:
        traces.append(1)
        return squared(vector) + 0.5

    active = switch(False)
    transforms = {"scale": counted, "moving_mean": FakeQuantize(2, limits="moving")}

    def fitted(model: Any) -> float:
        """Return the loss of an epoch that leaves gamma and beta alone."""
        options = {"batch_size": 8, "epochs": 1, "verbose": 0, "shuffle": False}
        return model.fit(*data(), **options).history["loss"][0]

    def compiled(**options: Any) -> Any:
        keras.utils.set_random_seed(7)
        model = sequential(BatchNormalization, **options)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    model = compiled(
        transforms=transforms, transforms_active=active, transform_batch_statistics=of_batch
    )
    off = fitted(model)
    assert off == fitted(compiled())
    norm = model.get_layer("norm")
    assert all(weight is not active for weight in norm.weights)
    assert int(transforms["moving_mean"].steps) == 4
    evaluated = model.evaluate(*data(), batch_size=8, verbose=0)
    before = len(traces)
    active.assign(True)
    on = fitted(model)
    assert on != off
    assert int(transforms["moving_mean"].steps) == 8
    assert model.evaluate(*data(), batch_size=8, verbose=0) != evaluated
    active.assign(False)
    assert fitted(model) == off
    if BACKEND != "torch":  # which compiles nothing
        assert len(traces) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
def test_what_is_compiled_by_order() -> None:
    # On PyTorch that asks for torch.compile, which itself warns of what PyTorch deprecates.
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(transforms=SMOOTH)])
    model.compile("sgd", "mse", jit_compile=True)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    predicted, expected = model.predict(x, verbose=0), numpy(model(x, training=False))
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-4)


def test_mixed_precision() -> None:
    model = quantized(True, dtype="mixed_bfloat16")
    y = model(data()[0], training=True)
    norm = model.get_layer("norm")
    assert numpy(norm.transforms["scale"].high).dtype == np.float32
    assert np.isfinite(numpy(ops.cast(y, "float32"))).all()


def test_files(tmp_path: Path) -> None:
    model = quantized(switch(True))
    model(data()[0], training=True)
    model(data()[0], training=True)
    expected = numpy(model(data()[0]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(again(data()[0])), expected)
    norm = again.get_layer("norm")
    assert norm.transforms_active is True
    assert int(norm.transforms["moving_variance"].steps) == 2
    model.save_weights(tmp_path / "model.weights.h5")
    other = quantized(switch(False))
    other.load_weights(tmp_path / "model.weights.h5")
    other.get_layer("norm").transforms_active = True
    np.testing.assert_array_equal(numpy(other(data()[0])), expected)


def test_fuse_keeps_transforms() -> None:
    active = switch(True)
    model = quantized(active, squared)
    model(data()[0], training=True)
    fused = fuse(model)
    norm = fused.get_layer("norm")
    assert norm.activation == "relu"
    assert norm.transforms_active is active
    assert norm.transforms["scale"] is squared
    assert norm.transforms["offset"] is not model.get_layer("norm").transforms["offset"]
    for value in (True, False):
        active.assign(value)
        np.testing.assert_allclose(
            numpy(fused(data()[0])), numpy(model(data()[0])), rtol=1e-5, atol=1e-5
        )


# ---- FakeQuantize ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "axis": 0, "limits": "moving", "decay": 0.5},
        {"limits": (-0.3, 0.7), "delay": 1},
        {"limits": "moving", "decay": 0.75, "delay": 1},
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_fake_quantize_has_the_bits_of_numpy(dtype: str, options: Any) -> None:
    if BACKEND == "jax" and dtype == "float64":
        dtype = "float32"  # it has no other, unless asked
    values = [[0, -0.0, 1, -1, 0.5, 2.5], [0.1, -0.4, 0.55, 9, np.nan, 1e-40]]
    x = ops.convert_to_tensor(np.array(values).astype("float32"), dtype=dtype)
    for bits in (2, 5, 8, 16):
        layer = FakeQuantize(bits, dtype=dtype, **options)
        expected = Expected(bits, **options)
        for training in (True, True, False):
            with np.errstate(all="ignore"):
                want = expected(numpy(x), training=training)
            got = numpy(layer(x, training=training))
            assert got.dtype == want.dtype
            got, want = (np.where(v == v, v, 0.1).astype(float) for v in (got, want))
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
        if expected.low is not None:
            np.testing.assert_array_equal(numpy(layer.high), expected.high)


def test_fake_quantize_passes_gradients_straight_through() -> None:
    x, dy = np.linspace(-5, 5, 51, dtype="float32"), np.arange(51, dtype="float32")
    options: dict[str, Any] = {"limits": (-1.0, 3.0), "delay": 1}
    layer, expected = FakeQuantize(3, **options), Expected(3, **options)
    layer.build(x.shape)
    for _ in range(3):
        expected(x, training=True)
        got = step(layer, x, dy, training=True).dx
        np.testing.assert_array_equal(got, expected.gradient(x, dy))


def test_fake_quantize_is_a_layer() -> None:
    layer = FakeQuantize(5, limits=(0.0, 1.0), delay=2, name="five")
    again = FakeQuantize.from_config(layer.get_config())
    assert again.settings == layer.settings
    inputs = keras.Input((3,))
    model = keras.Model(inputs, FakeQuantize(2, limits="moving", axis=-1)(inputs))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_array_equal(
        numpy(model(x, training=True)), Expected(2, limits="moving", axis=-1)(x, training=True)
    )


# ---- errors ----


def test_errors() -> None:
    for transforms, kind, text in (
        ([1], TypeError, "`transforms` must be a mapping"),
        ({"gamma": ops.tanh}, ValueError, "`transforms` must name scale, offset"),
        ({"scale": 3}, TypeError, r"`transforms\['scale'\]` must be a function"),
    ):
        with pytest.raises(kind, match=f"BatchNormalization: {text}"):
            BatchNormalization(transforms=transforms)
    with pytest.raises(ValueError, match=r"`transforms\['scale'\]` must return the shape \(5,\)"):
        BatchNormalization(transforms={"scale": lambda v: v[:2]})(np.ones(IMAGES, "float32"))
    with pytest.raises(ValueError, match=r"`transforms\['scale'\]` must return no NaN"):
        BatchNormalization(transforms={"scale": lambda v: v * np.nan})(np.ones(IMAGES, "float32"))
    with pytest.raises(TypeError, match="`transforms_active` must be"):
        BatchNormalization(transforms_active=3)
    with pytest.raises(ValueError, match="`transforms_active` must be a scalar"):
        BatchNormalization(transforms_active=keras.Variable([True], "bool", trainable=False))
    for other in ({"renorm": True}, {"virtual_batch_size": 2}):
        with pytest.raises(ValueError, match="`transform_batch_statistics` must be False with"):
            BatchNormalization(transform_batch_statistics=True, **other)
    with pytest.raises(ValueError, match=r"FakeQuantize: `bits` must lie in \[2, 16\]"):
        FakeQuantize(17)
