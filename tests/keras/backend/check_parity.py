"""The same numbers as ``keras.layers.BatchNormalization``, wherever that is right."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from steps import chosen, numpy, step

from fusebn.keras import BatchNormalization

THEIRS = keras.layers.BatchNormalization
IMAGES, CLIPPING = (6, 4, 3, 5), {"rmin": 0.8, "rmax": 1.2, "dmax": 0.1}

# name -> (shape of inputs, arguments of the layer, of the call)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "NHWC": (IMAGES, {}, {}),
    "NCHW": (IMAGES, {"axis": 1}, {}),
    "NC": (IMAGES[:2], {}, {}),
    "NWC": (IMAGES[:3], {"axis": 2}, {}),
    "NDHWC": ((3, 2, 2, 3, 4), {"axis": -1}, {}),
    "axis 0": (IMAGES, {"axis": 0}, {}),
    "one channel": ((7, 1), {}, {}),
    "no scale": (IMAGES, {"scale": False}, {}),
    "no center": (IMAGES, {"center": False}, {}),
    "neither": (IMAGES, {"scale": False, "center": False}, {}),
    "momentum 0": (IMAGES, {"momentum": 0.0}, {}),
    "momentum 1": (IMAGES, {"momentum": 1.0}, {}),
    "epsilon": (IMAGES, {"epsilon": 0.5}, {}),
    "float64": (IMAGES, {"dtype": "float64"}, {}),
    "initializers": (
        IMAGES,
        {"gamma_initializer": keras.initializers.Constant(-2.0), "beta_initializer": "ones",
         "moving_mean_initializer": "ones",
         "moving_variance_initializer": keras.initializers.Constant(4.0)},
        {},
    ),
    "mask": (IMAGES, {}, {"mask": (6, 4, 3)}),
    "mask that broadcasts": (IMAGES, {}, {"mask": (6, 1, 1)}),
    "renorm": (IMAGES, {"renorm": True}, {}),
    "renorm, clipped": (IMAGES, {"renorm": True, "renorm_clipping": CLIPPING}, {}),
    "renorm, no scale": (IMAGES, {"renorm": True, "scale": False, "renorm_momentum": 0.5}, {}),
    "renorm, masked": (IMAGES, {"renorm": True}, {"mask": (6, 4, 3)}),
}  # fmt: skip
CHOSEN = chosen(CASES, "NHWC", "NCHW", "neither", "momentum 0", "mask", "renorm, clipped")


def arguments_of(case: str, rng: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    shape, options, call = CASES[case]
    dtype = options.get("dtype", "float32")
    x, dy = rng.normal(3, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    if "mask" in call:
        call = {"mask": rng.random(call["mask"]) < 0.6}
    return x, dy, {"momentum": 0.9, **options}, call


def both(options: dict[str, Any], shape: Any, rng: np.random.Generator) -> list[Any]:
    """Return a layer of ours and one of theirs, in the same state."""
    layers = [of(**options) for of in (BatchNormalization, THEIRS)]
    for layer in layers:
        layer.build(shape)
    for ours, theirs in zip(layers[0].weights, layers[1].weights, strict=True):
        assert ours.path.rpartition("/")[2] == theirs.path.rpartition("/")[2]
        assert ours.dtype == theirs.dtype
        assert ours.trainable == theirs.trainable
        if options.get("gamma_initializer") is None:
            value = rng.uniform(0.5, 2, ours.shape)
            ours.assign(value)
            theirs.assign(value)
    return layers


def assert_same(ours: Any, theirs: Any, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("case", CHOSEN)
def test_training_and_inference(case: str, rng: np.random.Generator) -> None:
    x, dy, options, call = arguments_of(case, rng)
    ours, theirs = both(options, x.shape, rng)
    for training in (True, False, None):
        found, wanted = (step(layer, x, dy, training=training, **call) for layer in (ours, theirs))
        assert_same(found.y, wanted.y)
        # A gradient is as large as what cancels in it.
        assert_same(found.dx, wanted.dx, atol=1e-4)
        for mine, other in zip(found.dparameters, wanted.dparameters, strict=True):
            assert_same(mine, other, rtol=1e-4, atol=1e-3)
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            assert_same(numpy(mine), numpy(other))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_half_precision(policy: str, rng: np.random.Generator) -> None:
    x = rng.normal(3, 2, IMAGES).astype("float32")
    layers = [of(dtype=policy, momentum=0.9) for of in (BatchNormalization, THEIRS)]
    results = [layer(x, training=True) for layer in layers]
    assert results[0].dtype == results[1].dtype
    ulp = 2.0**-10 if "float16" in policy and "b" not in policy else 2.0**-7
    found, wanted = (np.asarray(numpy(y), "float32") for y in results)
    np.testing.assert_allclose(found, wanted, atol=4 * ulp)
    for mine, other in zip(layers[0].weights, layers[1].weights, strict=True):
        of_state = mine.path.rpartition("/")[2].startswith("moving")
        assert mine.dtype == ("float32" if of_state else other.dtype)
        np.testing.assert_allclose(
            np.asarray(numpy(mine), "float32"), np.asarray(numpy(other), "float32"), atol=4 * ulp
        )


def test_averages_of_half_precision_do_not_stall() -> None:
    layer, x = BatchNormalization(dtype="bfloat16", momentum=0.999), np.full((4, 2), 256.0)
    for _ in range(3):
        layer(x, training=True)
    assert numpy(layer.moving_mean) == pytest.approx(256 * (1 - 0.999**3), rel=1e-5)


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable(trainable: bool, rng: np.random.Generator) -> None:
    x, dy, options, _ = arguments_of("NHWC", rng)
    ours, theirs = both(options, x.shape, rng)
    ours.trainable = theirs.trainable = trainable
    before = [numpy(weight) for weight in ours.weights]
    found, wanted = (step(layer, x, dy, training=True) for layer in (ours, theirs))
    assert_same(found.y, wanted.y)
    assert_same(found.dx, wanted.dx, atol=1e-4)
    unchanged = all((numpy(w) == b).all() for w, b in zip(ours.weights, before, strict=True))
    assert unchanged is not trainable


def test_regularizers_and_constraints() -> None:
    options = {
        "gamma_regularizer": "l2", "beta_regularizer": keras.regularizers.L1(0.5),
        "gamma_constraint": "non_neg", "activity_regularizer": "l2",
    }  # fmt: skip
    losses = []
    for of in (BatchNormalization, THEIRS):
        layer = of(beta_initializer="ones", **options)
        layer(np.arange(6.0).reshape(3, 2), training=True)
        losses.append([float(numpy(ops.stop_gradient(loss))) for loss in layer.losses])
        assert type(layer.gamma.constraint).__name__ == "NonNeg"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3


def test_integers_become_floats() -> None:
    x = np.array([[1, 2], [3, 6]], "int32")
    found, wanted = (numpy(of()(x, training=True)) for of in (BatchNormalization, THEIRS))
    assert_same(found, wanted)


def test_configurations_go_both_ways() -> None:
    options = {"axis": 1, "momentum": 0.5, "center": False, "gamma_regularizer": "l2",
               "renorm": True, "renorm_clipping": CLIPPING, "name": "norm"}  # fmt: skip
    ours, theirs = BatchNormalization(**options), THEIRS(**options)
    assert ours.get_config() == theirs.get_config()
    assert type(THEIRS.from_config(ours.get_config())) is THEIRS
    again = BatchNormalization.from_config(theirs.get_config())
    assert again.get_config() == ours.get_config()


def test_the_signature_begins_as_theirs() -> None:
    import inspect

    ours, theirs = (
        list(inspect.signature(of).parameters.values()) for of in (BatchNormalization, THEIRS)
    )
    for mine, other in zip(ours, theirs[:-1], strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    assert all(p.kind is not p.POSITIONAL_OR_KEYWORD for p in ours[len(theirs) - 1 :])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"axis": 7}, (2, 3)),
        ({"renorm": True, "renorm_clipping": {"max": 1}}, (2, 3)),
        ({"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}}, (2, 3)),
        ({"renorm": True, "renorm_clipping": {"dmax": -1}}, (2, 3)),
        ({"unknown": 1}, (2, 3)),
        ({"trainable": "yes"}, (2, 3)),
        ({"gamma_initializer": "nonsense"}, (2, 3)),
        ({"axis": "last"}, (2, 3)),
        ({}, (2, 3, 4)),
        ({}, (2, 4)),
    ],
)  # fmt: skip
def test_what_keras_rejects_is_rejected_in_its_words(options: Any, shape: Any) -> None:
    told = []
    for of in (BatchNormalization, THEIRS):
        with pytest.raises(Exception) as caught:  # noqa: PT011, PT012
            layer = of(**{"name": "norm", **options})
            if not options:
                layer(np.zeros((2, 3)))
            layer(np.zeros(shape))
        told.append((caught.type, str(caught.value)))
    assert told[0] == told[1]


def test_a_mask_of_another_rank_is_rejected_in_its_words() -> None:
    told = []
    for of in (BatchNormalization, THEIRS):
        with pytest.raises(ValueError, match="one dimension less") as caught:
            of(name="norm")(np.zeros((2, 3)), mask=np.ones((2, 3), "bool"), training=True)
        told.append(str(caught.value).partition("Arguments received")[0])
    assert told[0] == told[1]
