"""Keras 3 on TensorFlow: the layer, in a `tf.function` as `fit` runs it. Forward only.

Its backward pass is whatever the backend's autograd makes of the forward pass, and cannot be called
without it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data, Verb


class Keras:
    """The peer."""

    def __init__(self, threads: int) -> None:
        os.environ["KERAS_BACKEND"] = "tensorflow"
        self.tf: Any = importlib.import_module("tensorflow")
        self.tf.config.threading.set_intra_op_parallelism_threads(threads)
        self.keras: Any = importlib.import_module("keras")
        self.version = self.keras.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self.x, self.residual = self.tf.constant(data.x), self.tf.constant(data.residual)
        self.layer = self.keras.layers.BatchNormalization(
            axis=case.axis, epsilon=EPSILON, momentum=1.0, dtype=_policy(case.dtype)
        )
        self.layer.build(case.dims)
        self.layer.set_weights(data[3:])

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        if verb.backward:
            return None

        def forward(x: Any, residual: Any) -> Any:
            y = self.layer(x, training=verb.training)
            if verb.residual:
                y = y + residual
            return self.keras.ops.relu(y) if verb.activation else y

        run = self.tf.function(forward)
        return lambda: run(self.x, self.residual)

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        return {"y": np.asarray(result.numpy())}


def _policy(dtype: str) -> str:
    return f"mixed_{dtype}" if dtype.endswith("float16") else dtype


create = Keras
