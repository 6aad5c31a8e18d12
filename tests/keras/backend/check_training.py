"""`fit`, compiled and not, and files: ours from Keras's, Keras's from ours, for other backends."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from networks import data, sequential
from steps import BACKEND, numpy

from fusebn.keras import BatchNormalization, fuse

THEIRS = keras.layers.BatchNormalization
FIT: dict[str, Any] = {"batch_size": 8, "epochs": 2, "verbose": 0, "shuffle": False}


def trained(norm: type[Any], compiling: Any = None, **options: Any) -> tuple[Any, list[float]]:
    keras.utils.set_random_seed(7)
    model = sequential(norm, **options)
    model.compile("adam", "mse", **(compiling or {}))
    return model, model.fit(*data(), **FIT).history["loss"]


def predictions(model: Any) -> Any:
    return model.predict(data()[0], verbose=0)


def called(model: Any) -> Any:
    return numpy(model(data()[0], training=False))


def assert_same(*results: tuple[Any, list[float]], atol: float) -> None:
    """Assert that two trainings went the same way."""
    (ours, losses), (theirs, their_losses) = results
    np.testing.assert_allclose(losses, their_losses, atol=atol, rtol=atol)
    np.testing.assert_allclose(predictions(ours), predictions(theirs), atol=atol, rtol=atol)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), atol=atol, rtol=atol)


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, list[float]]:
    return trained(THEIRS)


def test_fit_goes_the_same_way(theirs: Any) -> None:
    assert_same(trained(BatchNormalization), theirs, atol=1e-4)


def test_fit_eagerly_goes_the_same_way(theirs: Any) -> None:
    assert_same(trained(BatchNormalization, {"run_eagerly": True}), theirs, atol=1e-4)


def test_fit_goes_the_same_way_in_mixed_precision() -> None:
    options = {"dtype": "mixed_bfloat16"}
    assert_same(trained(BatchNormalization, **options), trained(THEIRS, **options), atol=0.05)


def test_fit_compiled_goes_the_same_way(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By XLA, or on PyTorch by torch.compile, whose code for a CPU would take a minute to make."""
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, losses = trained(BatchNormalization, {"jit_compile": True})
    assert model.jit_compile
    assert_same((model, losses), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu", "renorm": True, "virtual_batch_size": 4},
        {"activation": "gelu", "nonfinite": "skip", "correction": 1},
        {"synchronized": True},
    ],
    ids=str,
)
def test_fit_with_extras(options: Any) -> None:
    model, losses = trained(BatchNormalization, **options)
    assert losses[1] < losses[0]
    assert np.isfinite(predictions(model)).all()


def test_fit_cannot_compile_what_raises() -> None:
    if BACKEND == "torch":
        trained(BatchNormalization, nonfinite="raise")  # never compiled
        return
    with pytest.raises(ValueError, match=r"a symbol in a compiled step.*run_eagerly=True"):
        trained(BatchNormalization, nonfinite="raise")


def test_fit_eagerly_raises_before_anything_changes() -> None:
    model, losses = trained(BatchNormalization, {"run_eagerly": True}, nonfinite="raise")
    assert losses[1] < losses[0]
    x, y = map(np.array, data())
    x[3, 2, 2, 1] = np.nan
    before = [numpy(weight) for weight in model.get_layer("norm").weights]
    with pytest.raises(ValueError, match="got NaN or Inf in channels 0, 1, 2, 3"):
        model.fit(x, y, **FIT)
    if BACKEND == "jax":  # where a fit that fails leaves Keras's variables without values
        return
    for weight, value in zip(model.get_layer("norm").weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)


def test_a_model_with_a_layer_in_its_own_code() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNormalization(activation="relu")
            self.head = keras.layers.Dense(2)

        def call(self, x: Any, training: Any = None) -> Any:
            return self.head(self.norm(keras.ops.mean(x, (1, 2)), training=training))

    model = Own()
    model.compile("sgd", "mse")
    model.fit(*data(), **FIT)
    assert numpy(model.norm.moving_mean).all()


# ---- files ----


def test_their_saved_model_becomes_ours(theirs: Any, tmp_path: Path) -> None:
    model, _ = theirs
    model.save(tmp_path / "theirs.keras")
    ours = fuse(keras.models.load_model(tmp_path / "theirs.keras"))
    assert type(ours.get_layer("norm")) is BatchNormalization
    np.testing.assert_allclose(called(ours), called(model), atol=1e-5)
    model.save_weights(tmp_path / "theirs.weights.h5")
    ours = sequential(BatchNormalization)
    ours.load_weights(tmp_path / "theirs.weights.h5")
    np.testing.assert_allclose(called(ours), called(model), atol=1e-5)


def test_our_saved_model_becomes_theirs(tmp_path: Path, monkeypatch: Any) -> None:
    ours = sequential(BatchNormalization)
    ours.get_layer("norm").set_weights(list(np.arange(1.0, 17.0).reshape(4, 4)))
    ours.save(tmp_path / "ours.keras")
    # As where fusebn is not imported: what is registered comes before what is given.
    monkeypatch.delitem(keras.saving.get_custom_objects(), "fusebn>BatchNormalization")
    theirs = keras.models.load_model(
        tmp_path / "ours.keras", custom_objects={"fusebn>BatchNormalization": THEIRS}
    )
    norm = theirs.get_layer("norm")
    np.testing.assert_allclose(called(theirs), called(ours), atol=1e-5)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs = sequential(THEIRS)
    theirs.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_allclose(called(theirs), called(ours), atol=1e-5)
    assert type(norm) is THEIRS


def test_our_saved_model_goes_on_where_it_was(tmp_path: Path) -> None:
    model, _ = trained(BatchNormalization, activation="relu", renorm=True, nonfinite="skip")
    model.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    norm = again.get_layer("norm")
    assert (type(norm), norm.activation, norm.nonfinite) == (BatchNormalization, "relu", "skip")
    losses = [one.fit(*data(), **FIT).history["loss"] for one in (model, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_leave_a_model_for_other_backends() -> None:
    directory = Path(os.environ["FUSEBN_MODELS"])
    model, _ = trained(BatchNormalization, activation="silu", correction=1)
    model.save(directory / f"{BACKEND}.keras")
    np.save(directory / f"{BACKEND}.npy", predictions(model))
