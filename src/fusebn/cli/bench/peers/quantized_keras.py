"""Quantised blocks in Keras, on the backend of KERAS_BACKEND; the flag is a variable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers import quantized
from fusebn.cli.bench.peers.keras_layers import STEPS, prepare
from fusebn.cli.bench.suites import Step
from fusebn.keras import BatchNormalization
from fusebn.quantize import FakeQuantize


class Blocks:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.version = prepare(threads)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._case, self._data = case, data

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        active = keras.Variable(True, dtype="bool", trainable=False)
        options = quantized.options(
            step.name, lambda: FakeQuantize(quantized.BITS, symmetric=True), active
        )
        convolution = keras.layers.Conv2D(self._case.block[1], 3, padding="same", use_bias=False)
        norm = BatchNormalization(epsilon=EPSILON, activation="relu", **options)
        shape = keras.Input(batch_shape=self._case.dims)
        model = keras.Sequential([shape, convolution, norm])
        convolution.set_weights([quantized.kernel(self._case)])
        norm.gamma.assign(self._data.scale)
        norm.beta.assign(self._data.offset)
        x, dy = (keras.ops.convert_to_tensor(array) for array in (self._data.x, self._data.dy))
        return STEPS[keras.backend.backend()](model, x, dy)

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        y, dx, *_ = (np.asarray(keras.ops.convert_to_numpy(value)) for value in result)
        return quantized.answer(y, dx, self._case.axis)


create = Blocks
