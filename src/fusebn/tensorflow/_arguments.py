"""The arguments of the layers, checked, in the form `_batch_norm` wants them."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from fusebn import _spec
from fusebn.tensorflow._functions import stat_type, tensor_of


def inputs_of(operation: str, inputs: Any) -> Any:
    """Return the inputs as a tensor with a batch and channels."""
    x = tensor_of(operation, "inputs", inputs)
    if x.shape.rank is None or x.shape.rank < 2:
        got = "an unknown rank" if x.shape.rank is None else f"shape {tuple(x.shape)}"
        fix = "Give it one by inputs.set_shape(...)." if x.shape.rank is None else ""
        _spec.fail(ValueError, operation, "inputs", "have a known rank of at least 2", got, fix)
    return x


def axes_of(operation: str, axis: Any, x: Any) -> tuple[int, ...]:
    """Return the channel axes, sorted, counted from the front, and of known length."""
    given = list(axis) if isinstance(axis, Sequence) and not isinstance(axis, str) else [axis]
    axes = sorted(_spec.axis_of(operation, "axis", one, tuple(x.shape)) for one in given)
    if not axes or len(set(axes)) != len(axes):
        expected = "name each axis once, and one at least"
        _spec.fail(ValueError, operation, "axis", expected, repr(axis))
    for one in axes:
        if x.shape[one] is None:
            expected = f"have a known length on its channel axis {one}"
            fix = "The variables need it: give it by inputs.set_shape(...)."
            _spec.fail(ValueError, operation, "inputs", expected, f"shape {tuple(x.shape)}", fix)
    return tuple(axes)


def training_flag(operation: str, argument: str, value: Any) -> Any:
    """Return a bool if it is known now, else a scalar boolean tensor."""
    if not tf.is_tensor(value) and not isinstance(value, tf.Variable):
        # As in TensorFlow, the integers 0 and 1 are flags.
        is_flag = isinstance(value, int) and value in (0, 1)
        return _spec.flag(operation, argument, bool(value) if is_flag else value)
    flag = tf.convert_to_tensor(value)
    if flag.dtype != tf.bool or flag.shape.rank not in (0, None):
        got = f"a tensor of {flag.dtype.name} and shape {flag.shape}"
        _spec.fail(TypeError, operation, argument, "be a bool, or a scalar boolean tensor", got)
    known = tf.get_static_value(flag)
    return flag if known is None else bool(known)


def decay_of(operation: str, argument: str, value: Any) -> Any:
    """Return a decay: a number, checked, or a tensor."""
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        return tf.convert_to_tensor(value)
    return _spec.fraction(operation, argument, value)


def like_inputs(operation: str, argument: str, value: Any, x: Any) -> Any:
    """Return a tensor with the dtype and shape of the inputs, as far as they are known."""
    tensor = tensor_of(operation, argument, value)
    _spec.same_type(operation, argument, tensor.dtype.name, x.dtype.name)
    if not tensor.shape.is_compatible_with(x.shape):
        shapes = tuple(tensor.shape), tuple(x.shape)
        _spec.same_shape(operation, argument, *shapes, of="inputs")
    return tensor


def example_weights(operation: str, weights: Any, x: Any) -> Any:
    """Return batch_weights in the shape that broadcasts to inputs."""
    if weights is None:
        return None
    weights = tf.convert_to_tensor(weights, dtype_hint=stat_type(x))
    if not weights.shape.is_compatible_with(x.shape[:1]):
        expected = f"have shape ({x.shape[0]},), one weight for each example"
        got = f"shape {tuple(weights.shape)}"
        _spec.fail(ValueError, operation, "batch_weights", expected, got)
    return tf.reshape(weights, [-1] + [1] * (x.shape.rank - 1))


def function(operation: str, argument: str, value: Any) -> Any:
    """Return a function or None."""
    if value is not None and not callable(value):
        _spec.fail(TypeError, operation, argument, "be callable", repr(value))
    return value


def initializer(operation: str, argument: str, value: Any, default: Any) -> Any:
    """Return an initializer; None is the default."""
    if value is None:
        return default
    if not callable(value):
        fix = "Pass one such as tf.compat.v1.zeros_initializer()."
        _spec.fail(TypeError, operation, argument, "be an initializer", repr(value), fix)
    return value


def by_name(operation: str, argument: str, value: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """Return a dictionary whose keys are among `names`; None is the empty one."""
    if value is None:
        return {}
    expected = f"be a dictionary with keys among {', '.join(names)}"
    if not isinstance(value, Mapping):
        _spec.fail(TypeError, operation, argument, expected, repr(value))
    if unknown := sorted(map(str, value.keys() - set(names))):
        _spec.fail(ValueError, operation, argument, expected, ", ".join(unknown))
    return value


def collections_of(value: Any) -> tuple[str, ...]:
    """Return the names of collections: of one, of several, or of none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
