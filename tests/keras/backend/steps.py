"""One step of training on any backend: what a layer yields, its gradients and its new state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()

Array = Any


def chosen(cases: Iterable[Any], *names: Any) -> list[Any]:
    """Return all cases; on JAX, which compiles each operation of each shape anew, those named.

    What depends on shapes and options alone is the business of the adapter's own tests there.
    """
    return [case for case in cases if BACKEND != "jax" or case in names]


class Step(NamedTuple):
    y: Array
    dx: Array
    dparameters: list[Array]
    dresidual: Array | None


def numpy(tensor: Any) -> Array:
    return np.asarray(ops.convert_to_numpy(ops.convert_to_tensor(tensor)))


def step(layer: Any, x: Array, dy: Array, residual: Array | None = None, **options: Any) -> Step:
    """Call a built layer, and take the gradients of sum(dy * y)."""
    inputs = [ops.convert_to_tensor(x)]
    if residual is not None:
        inputs.append(ops.convert_to_tensor(residual))

    def loss_of(y: Any) -> Any:
        return ops.sum(ops.cast(y, dy.dtype) * ops.convert_to_tensor(dy))

    def call(*tensors: Any) -> Any:
        more = {} if residual is None else {"residual": tensors[1]}
        return layer(tensors[0], **more, **options)

    y, inputs_gradients, gradients = _STEPS[BACKEND](layer, inputs, call, loss_of)
    found = [None if g is None else numpy(g) for g in (*inputs_gradients, *gradients)]
    after = found[len(inputs) :]
    return Step(numpy(y), found[0], after, found[1] if residual is not None else None)


def _tensorflow(layer: Any, inputs: Any, call: Callable[..., Any], loss_of: Any) -> Any:
    import tensorflow as tf

    parameters = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = call(*inputs)
        loss = loss_of(y)
    found = tape.gradient(loss, [*inputs, *parameters])
    return y, found[: len(inputs)], found[len(inputs) :]


def _torch(layer: Any, inputs: Any, call: Callable[..., Any], loss_of: Any) -> Any:
    import torch

    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    parameters = [variable.value for variable in layer.trainable_variables]
    y = call(*inputs)
    found = torch.autograd.grad(loss_of(y), [*inputs, *parameters], allow_unused=True)
    return y.detach(), found[: len(inputs)], found[len(inputs) :]


def _jax(layer: Any, inputs: Any, call: Callable[..., Any], loss_of: Any) -> Any:
    import jax

    state = layer.non_trainable_variables

    def loss(inputs: Any, parameters: Any) -> Any:
        mapping = zip(
            [*layer.trainable_variables, *state],
            [*parameters, *(variable.value for variable in state)],
            strict=True,
        )
        with keras.StatelessScope(state_mapping=list(mapping)) as scope:
            y = call(*inputs)
        new = [scope.get_current_value(variable) for variable in state]
        return loss_of(y), (y, new)

    parameters = [variable.value for variable in layer.trainable_variables]
    found, (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, parameters)
    for variable, value in zip(state, new, strict=True):
        if value is not None:
            variable.assign(value)
    return y, *found


_STEPS = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
