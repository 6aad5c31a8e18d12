"""Batch norm and ReLU in Keras, its two layers and our one, on the backend of KERAS_BACKEND.

A step is what `fit` runs of them: forward with the update of the moving statistics, and backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import fusebn
import fusebn.keras as fbk
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.suites import Step

Call = Callable[[], Any]


class Layers:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.version = prepare(threads)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._case, self._data = case, data
        self._models: dict[str, Any] = {}

    def call(self, step: Step) -> Call:
        """See Peer."""
        model = self._models[step.name] = self._model(step)
        x, dy = (keras.ops.convert_to_tensor(array) for array in (self._data.x, self._data.dy))
        return STEPS[keras.backend.backend()](model, x, dy)

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        moving = self._models[step.name].non_trainable_variables
        arrays = [np.array(keras.ops.convert_to_numpy(value)) for value in (*result, *moving)]
        answer = dict(
            zip(("y", "dx", "dscale", "doffset", "mean", "variance"), arrays, strict=True)
        )
        # Keras's variance divides by n, the one that is asked for by n - 1.
        n = self._case.block[0] * self._case.block[2]
        answer["variance"] = answer["variance"].astype(np.float64) * (n / max(n - 1, 1))
        return answer

    def _model(self, step: Step) -> Any:
        """Return layers whose moving statistics become the batch's."""
        options: dict[str, Any] = {"axis": self._case.axis, "epsilon": EPSILON, "momentum": 0.0}
        options["dtype"] = policy(self._case.dtype)
        if step.ours:
            layers = [fbk.BatchNormalization(**options, activation="relu")]
        else:
            relu = keras.layers.ReLU(dtype=options["dtype"])
            layers = [keras.layers.BatchNormalization(**options), relu]
        model = keras.Sequential([keras.Input(batch_shape=self._case.dims), *layers])
        model.set_weights(self._data[3:])
        return model


def prepare(threads: int) -> str:
    """Have the backend and us use so many threads; return the versions."""
    fusebn.set_num_threads(threads)
    name = keras.backend.backend()
    backend = importlib.import_module(name)
    if name == "tensorflow":
        backend.config.threading.set_intra_op_parallelism_threads(threads)
    elif name == "torch":
        backend.set_num_threads(threads)
    return f"{keras.__version__} on {name} {backend.__version__}"


def policy(dtype: str) -> str:
    """Return Keras's name for activations of a type."""
    return f"mixed_{dtype}" if dtype.endswith("float16") else dtype


def _tensorflow(model: Any, x: Any, dy: Any) -> Call:
    import tensorflow as tf

    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=True)
        inputs = [x, *(variable.value for variable in model.trainable_variables)]
        return y, *tape.gradient(y, inputs, dy)

    run = tf.function(step)
    return lambda: run(x, dy)


def _jax(model: Any, x: Any, dy: Any) -> Call:
    import jax

    def step(trainable: Any, moving: Any, x: Any, dy: Any) -> Any:
        def forward(trainable: Any, x: Any) -> Any:
            return model.stateless_call(trainable, moving, x, training=True)

        y, pullback, moving = jax.vjp(forward, trainable, x, has_aux=True)
        gradients, dx = pullback(dy)
        return (y, dx, *gradients), moving

    compiled = jax.jit(step)
    trainable = [variable.value for variable in model.trainable_variables]
    variables = model.non_trainable_variables

    def run() -> Any:
        moving = [variable.value for variable in variables]
        gradients, moving = jax.block_until_ready(compiled(trainable, moving, x, dy))
        for variable, value in zip(variables, moving, strict=True):
            variable.assign(value)
        return gradients

    return run


def _torch(model: Any, x: Any, dy: Any) -> Call:
    import torch

    x.requires_grad_()
    inputs = [x, *(variable.value for variable in model.trainable_variables)]

    def run() -> Any:
        y = model(x, training=True)
        return (y.detach(), *torch.autograd.grad(y, inputs, dy))

    return run


STEPS: dict[str, Callable[[Any, Any, Any], Call]] = {
    "tensorflow": _tensorflow,
    "jax": _jax,
    "torch": _torch,
}

create = Layers
