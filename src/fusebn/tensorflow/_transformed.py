"""The variables of a layer as they normalize: what transforms make of them.

In a graph of v1 nothing runs that nobody asks for. So what the transforms yield in training is
noted, used or not: the layer's output and its updates wait for it, and what observes has observed
the averages before they change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from fusebn import _transforms
from fusebn._transforms import Transform
from fusebn.tensorflow._array_ops import array_ops
from fusebn.tensorflow._quantize import FakeQuantize

Tensor = Any


class _Noted(Transform):
    """A transform with a state, which notes its results."""

    def __init__(self, transform: Any, seen: list[Tensor]) -> None:
        self.transform = transform
        self.seen = seen

    def __call__(self, vector: Tensor, training: Any) -> Tensor:
        result = self.transform(vector, training=training)
        if training is not False:
            self.seen.append(result)
        return result


@dataclass(frozen=True)
class Transforms:
    """What a layer does to its variables in one call."""

    operation: str
    functions: Mapping[str, Callable[..., Tensor]]  # checked
    active: Any  # a bool, or a scalar boolean tensor, as `training`
    training: Any
    of_batch: bool  # whether they apply to the batch's statistics
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, name: str, vector: Tensor | None) -> Tensor | None:
        """Return a vector as it is to normalize."""
        functions = dict(self.functions)
        function: Any = functions.get(name)
        if isinstance(function, FakeQuantize):
            # By its place, not by the order in which it was made, so that a checkpoint fits.
            scope = tf.compat.v1.get_variable_scope().name
            function.belong_to(f"{scope}/transforms/{name}" if scope else f"transforms/{name}")
        if isinstance(function, Transform):
            functions[name] = _Noted(function, self.seen)
        result: Tensor | None = _transforms.apply(
            array_ops, self.operation, functions, name, vector, self.active, self.training
        )
        return result

    def replace_batch(self) -> Any:
        """Say whether transformed statistics of the batch normalize it: a bool or a tensor."""
        if not (self.of_batch and self.functions.keys() & {"moving_mean", "moving_variance"}):
            return False
        return both(self.active, self.training)


def both(a: Any, b: Any) -> Any:
    """Return `a and b`, without an op where it is known."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return tf.logical_and(a, b)


def choose(condition: Any, new: Tensor, old: Tensor) -> Tensor:
    """Return new where the condition holds, without an op where that is known."""
    if new is old:
        return new
    if isinstance(condition, bool):
        return new if condition else old
    return tf.where(condition, new, old)
