"""A small ResNet in Keras, trained by `fit`: as it is, and after `fusebn.keras.fuse`.

The one of 20 layers for images of 32x32: He, Zhang, Ren and Sun, "Deep Residual Learning for Image
Recognition", 2015, https://arxiv.org/abs/1512.03385, section 4.2, with 1x1 convolutions where a
shortcut changes its width, and a first scale of 0 behind each block: roundings stay small then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import fusebn.keras as fbk
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import Case, Data
from fusebn.cli.bench.peers.keras_layers import policy, prepare
from fusebn.cli.bench.suites import Step
from fusebn.cli.resident import resident

WIDTHS, BLOCKS = (16, 32, 64), 3
CLASSES, BATCH = 10, 64
EPOCHS = 5  # whose losses are compared
RATE, MOMENTUM = 1e-3, 0.9  # so slow that roundings stay what they are


class Networks:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.version = prepare(threads)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._images, self._dtype = data.x.astype(np.float32), case.dtype
        self._labels = np.arange(len(data.x)) % CLASSES
        self._epochs: dict[str, Callable[[], Any]] = {}

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        keras.utils.set_random_seed(0)
        model = resnet(self._images.shape[1:], policy(self._dtype))
        model = fbk.fuse(model) if step.ours else model
        model.compile(
            keras.optimizers.SGD(RATE, MOMENTUM),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}

        def epoch() -> Any:
            history = model.fit(self._images, self._labels, **options)
            return history.history["loss"][0]

        self._epochs[step.name] = epoch
        return epoch

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer: the losses of the first epochs, and the memory."""
        epoch = self._epochs[step.name]
        answer = {"losses": np.array([result, *(epoch() for _ in range(EPOCHS - 1))])}
        if found := resident(epoch):
            answer["peak"] = np.array([found.peak], np.float64)
        return answer


def resnet(shape: tuple[int, ...], dtype: str) -> Any:
    """Return the network: images to logits."""
    images = keras.Input(shape)
    x = _normalized(images, WIDTHS[0], dtype)
    x = layers.ReLU(dtype=dtype)(x)
    for width in WIDTHS:
        for block in range(BLOCKS):
            x = _block(x, width, 2 if width != WIDTHS[0] and block == 0 else 1, dtype)
    x = layers.GlobalAveragePooling2D(dtype=dtype)(x)
    return keras.Model(images, layers.Dense(CLASSES, dtype="float32")(x))


def _block(x: Any, width: int, stride: int, dtype: str) -> Any:
    shortcut = x if stride == 1 else _normalized(x, width, dtype, side=1, stride=stride)
    y = _normalized(x, width, dtype, stride=stride)
    y = layers.ReLU(dtype=dtype)(y)
    y = _normalized(y, width, dtype, scale="zeros")
    y = layers.Add(dtype=dtype)([y, shortcut])
    return layers.ReLU(dtype=dtype)(y)


def _normalized(
    x: Any, width: int, dtype: str, *, side: int = 3, stride: int = 1, scale: str = "ones"
) -> Any:
    x = layers.Conv2D(width, side, stride, padding="same", use_bias=False, dtype=dtype)(x)
    return layers.BatchNormalization(gamma_initializer=scale, dtype=dtype)(x)


create = Networks
