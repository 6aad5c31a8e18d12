"""The network as a user of Keras would write it: a functional model without a word of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

import fusebn.keras as fbk
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.images import NESTEROV, OVER_ADAM, SIDE, WIDTHS, patches
from fusebn.cli.demo.network import DECAY, EPSILON, Array, First
from fusebn.cli.demo.schedule import batches


class _Builder:
    """Layers of one type, and the ways they are put together."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def convolution(self, x: Any, out: int, name: str, side: int = 3, stride: int = 1) -> Any:
        """Return a convolution without a bias: that of the batch norm behind it is one."""
        options = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
        return layers.Conv2D(out, side, stride, **options, dtype=self._dtype, name=name)(x)

    def norm(self, x: Any, name: str, first_scale: str = "ones") -> Any:
        """Return x normalized by the batch, or by the moving statistics."""
        options = {"momentum": DECAY, "epsilon": EPSILON, "gamma_initializer": first_scale}
        return layers.BatchNormalization(**options, dtype=self._dtype, name=name)(x)

    def relu(self, x: Any, name: str) -> Any:
        """Return what is positive of x."""
        return layers.ReLU(dtype=self._dtype, name=name)(x)

    def block(self, x: Any, out: int, name: str) -> Any:
        """Return two convolutions of x, and a shortcut around them."""
        stride, shortcut = 1, x
        if x.shape[-1] != out:
            stride = 2
            shortcut = self.convolution(x, out, f"{name}_conv3", side=1, stride=2)
            shortcut = self.norm(shortcut, f"{name}_norm3")
        y = self.convolution(x, out, f"{name}_conv1", stride=stride)
        y = self.relu(self.norm(y, f"{name}_norm1"), f"{name}_relu1")
        y = self.convolution(y, out, f"{name}_conv2")
        # With a scale of 0 a block begins as its shortcut: training starts calmly.
        y = self.norm(y, f"{name}_norm2", first_scale="zeros")
        y = layers.Add(dtype=self._dtype, name=f"{name}_add")([y, shortcut])
        return self.relu(y, f"{name}_relu2")


def build(seed: int, dtype: str = "float32") -> keras.Model:
    """Return the model: images [N, 8, 8, 1] to logits [N, 10]."""
    keras.utils.set_random_seed(seed)
    first, last = WIDTHS
    builder = _Builder(dtype)
    images = keras.Input((SIDE, SIDE, 1), dtype=dtype)
    x = builder.convolution(images, first, "conv")
    x = builder.relu(builder.norm(x, "norm"), "relu")
    x = builder.block(builder.block(x, first, "block0"), last, "block1")
    x = layers.GlobalAveragePooling2D(dtype=dtype, name="mean")(x)
    return keras.Model(images, layers.Dense(10, dtype=dtype, name="last")(x), name="digits")


class Network:
    """A model, ours after one line, with its training."""

    def __init__(self, seed: int, *, fused: bool = False, dtype: str = "float32") -> None:
        model = build(seed, dtype)
        if dtype != "float32":
            model.set_weights(build(seed).get_weights())  # the same first weights
        self.model = fbk.fuse(model) if fused else model
        self._dtype = dtype
        self.model.compile(
            keras.optimizers.SGD(0.0, NESTEROV, nesterov=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype),
        )

    def train(self, digits: Digits, epochs: int, seed: int) -> Iterator[float]:
        """Train, and yield the loss of each step."""
        for batch, rate in batches(digits, epochs, seed):
            yield self.step(batch, rate * OVER_ADAM)

    def step(self, digits: Digits, rate: float) -> float:
        """Train on a batch, and return its loss."""
        self.model.optimizer.learning_rate = rate
        self.model.reset_metrics()  # else the loss is a mean over batches
        return float(self.model.train_on_batch(self._images(digits.images), digits.labels))

    def infer(self, images: Array) -> Array:
        """Return the logits as a user gets them."""
        logits: Array = self.model.predict_on_batch(self._images(images))
        return logits

    def norms(self) -> list[layers.BatchNormalization]:
        """Return the batch norms."""
        kind = layers.BatchNormalization
        return [layer for layer in self.model.layers if isinstance(layer, kind)]

    def _images(self, rows: Array) -> Array:
        return rows.reshape(-1, SIDE, SIDE, 1).astype(self._dtype)

    # What the report asks of a network.

    def first(self) -> First:
        """See :class:`fusebn.cli.demo.network.Network`."""
        norm = self.model.get_layer("norm")
        values = (self.model.get_layer("conv").kernel, norm.moving_mean, norm.moving_variance)
        kernel, mean, variance = (np.array(keras.ops.convert_to_numpy(value)) for value in values)
        return First(kernel.reshape(9, -1), mean, variance, patches)

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """See :class:`fusebn.cli.demo.network.Network`."""
        if not training:
            return self.infer(images)
        before = self.model.get_weights()  # in training mode a call moves the statistics
        logits = keras.ops.convert_to_numpy(self.model(self._images(images), training=True))
        self.model.set_weights(before)
        return np.array(logits)

    def state(self) -> dict[str, bytes]:
        """See :class:`fusebn.cli.demo.network.Network`."""
        return {
            norm.name: b"".join(value.tobytes() for value in norm.get_weights())
            for norm in self.norms()
        }
