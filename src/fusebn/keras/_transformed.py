"""The variables of a layer as they normalize: what transforms make of them.

They are applied outside of any `cond`, since what they observe goes into weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from fusebn import _spec, _transforms
from fusebn._dispatch import adapter_of

Tensor = Any

_NAME = "BatchNormalization"


class Transforms(NamedTuple):
    """What a layer does to its variables in one call."""

    functions: Mapping[str, Callable[..., Tensor]]  # checked
    active: Any  # a bool, or a scalar boolean tensor, as `training`
    training: Any
    of_batch: bool  # whether they apply to the batch's statistics

    def __call__(self, name: str, vector: Tensor | None) -> Tensor | None:
        """Return a variable as it is to normalize, in its own shape."""
        if vector is None or name not in self.functions:
            return vector
        flat = ops.reshape(vector, [-1])
        array_ops = adapter_of(_NAME, flat).array_ops
        given = self.functions, name, flat, self.active, self.training
        new = _transforms.apply(array_ops, _NAME, *given)
        return vector if self.active is False else ops.reshape(new, vector.shape)

    def replace_batch(self) -> Any:
        """Say whether transformed statistics of the batch normalize it: a bool or a tensor."""
        if not (self.of_batch and self.functions.keys() & {"moving_mean", "moving_variance"}):
            return False
        return both(self.active, self.training)


def flag(argument: str, value: Any) -> Any:
    """Return a bool if it is known now, else a scalar boolean tensor."""
    if isinstance(value, keras.Variable):
        value = value.value
    if not ops.is_tensor(value):
        return bool(value)
    if len(value.shape):
        expected, got = "be a bool, or a boolean scalar", f"a tensor of shape {value.shape}"
        _spec.fail(TypeError, _NAME, argument, expected, got)
    if keras.backend.backend() in ("torch", "numpy"):
        return bool(value)
    return ops.cast(value, "bool")


def both(a: Any, b: Any) -> Any:
    """Return `a and b`, without an op where it is known."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return ops.logical_and(a, b)


def choose(condition: Any, new: Tensor, old: Tensor) -> Tensor:
    """Return new where the condition holds, without an op where that is known."""
    if isinstance(condition, bool):
        return new if condition else old
    return new if new is old else ops.where(condition, new, old)
