"""What Keras's users gain: one line, less time, statistics that stay right."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import fusebn.keras as fbk
from fusebn.cli.demo import findings
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, far_from_zero, folded_into
from fusebn.cli.demo.keras.network import Network
from fusebn.cli.demo.network import Array
from fusebn.cli.demo.side_by_side import FIRST, LARGE, side_by_side
from fusebn.cli.demo.watch import Course, History
from fusebn.cli.output import hushed

LAYERS = {"Keras's": layers.BatchNormalization, "ours": fbk.BatchNormalization}


def before_and_after(histories: tuple[History, History], course: Course) -> Finding:
    """Compare the model with the same one after `fuse`: what it learned, and what it cost."""
    names = ("as it is", "after fuse")
    large = Digits(course.training.images[:LARGE], course.training.labels[:LARGE])
    return side_by_side(
        "Before and after fusebn.keras.fuse",
        "The same model, seed and batches, without and with one line: model = fuse(model).",
        dict(zip(names, histories, strict=True)),
        {
            name: partial(Network(course.seed, fused=fused).step, large, 0.0)
            for name, fused in zip(names, (False, True), strict=True)
        },
        _exact(course),
        gives_back=keras.backend.backend() != "tensorflow",
    )


def _exact(course: Course) -> list[float]:
    """Return the first losses of the same training in float64."""
    training, _, epochs, seed, _ = course
    with _doubles(), hushed():  # TensorFlow warns that oneDNN knows no float64
        network = Network(seed, dtype="float64")
        return list(islice(network.train(training, epochs, seed), FIRST))


def _doubles() -> Any:
    """Let the backend compute in float64: JAX does where it is told to."""
    if keras.backend.backend() != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(True)


def one_layer(network: Network) -> Finding:
    """Show what became one layer with each batch norm."""
    return Finding(
        "One layer for each batch norm and what surrounds it",
        "fuse replaces each BatchNormalization by ours, and folds into it the addition and the "
        "ReLU that follow: one pass over memory instead of three. Weights and names stay. explain "
        "says what was folded, and what was not, and why.",
        ("batch norm", "folded into it"),
        [
            (row.name, folded_into(row.residual, row.activation))
            for row in fbk.explain(network.model)
        ],
    )


def bright_background(digits: Digits) -> Finding:
    """Normalize images whose mean is far from 0."""

    def normalized(kind: Any, images: Array) -> Array:
        return np.array(keras.ops.convert_to_numpy(kind()(images, training=True)))

    return far_from_zero(
        {name: partial(normalized, kind) for name, kind in LAYERS.items()},
        digits,
        "On PyTorch, Keras takes the mean's square from the mean of the squares, in float32: where "
        "the mean is large, few digits of the variance are left. Its other backends do not.",
    )


def padding_alone(digits: Digits) -> Finding:
    """Show what batches of nothing but padding do to the moving statistics."""
    rows_of_pixels = digits.images.reshape(-1, 8, 8)
    everything = np.ones(rows_of_pixels.shape[:2], bool)

    def variances(kind: Any) -> tuple[str, ...]:
        layer = kind(momentum=0.9)
        found = []
        for mask in (everything, ~everything):
            for _ in range(20):
                layer(rows_of_pixels, training=True, mask=mask)
            variance = keras.ops.convert_to_numpy(layer.moving_variance)
            found.append(f"{variance.mean():.4f}")
        return tuple(found)

    return Finding(
        "Batches of padding",
        "The images as sequences of rows, with a mask: 20 batches with nothing masked, then 20 "
        "with all of it masked. Who knows nothing should learn nothing: Keras's moving statistics "
        "fall towards 0. The mean over the columns of pixels:",
        ("layer", "moving variance before", "and after the padding"),
        [(name, *variances(kind)) for name, kind in LAYERS.items()],
    )


def saved_and_loaded(network: Network, digits: Digits, model: Path) -> Finding:
    """Save the fused model, load it, and give its weights to the model as it was."""
    network.model.save(model)
    loaded, plain = keras.models.load_model(model), Network(0)
    for layer in plain.model.layers:
        if layer.weights:
            layer.set_weights(loaded.get_layer(layer.name).get_weights())
    return findings.reloaded(
        "Saved, loaded, and given to Keras's own layers",
        "A .keras file holds the fused model. The weights of each of its layers fit the layer of "
        "that name in the model as it was before fuse, which predicts the same to rounding.",
        {"bytes in the file": f"{model.stat().st_size:,}"},
        network.logits(digits.images),
        plain.logits(digits.images),
    )
