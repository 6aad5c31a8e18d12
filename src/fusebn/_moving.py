"""Moving averages: how much a new value weighs, and the update itself.

Every average of this library is ``new = (1 - factor) * old + factor * value``. What differs is the
factor of update t = 1, 2, ...:

- exponential, ``1 - decay``;
- cumulative (decay None), ``1 / t``: the plain mean of all values;
- debiased, ``(1 - decay) / (1 - decay**t)``: the exponential average divided by the sum of its own
  weights, so that the initial value has no part in it. This is Adam's correction (Kingma and Ba,
  2015, section 3) written as a factor, and needs no second copy of the average.
"""

import weakref
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusebn import _spec


def factor(decay: float | None, update: int, zero_debias: bool = False) -> float:
    """Return the weight of the value of update number `update`, counted from 1."""
    if decay is None:
        return 1 / update
    return (1 - decay) / (1 - decay**update) if zero_debias else 1 - decay


def mix(
    old: NDArray[Any], value: NDArray[Any], factor: float, scale: float = 1
) -> NDArray[np.float64]:
    """Return the average after an update by scale * value, in float64."""
    mixed: NDArray[np.float64] = (1 - factor) * old.astype(np.float64) + (factor * scale) * value
    return mixed


# How many debiased updates each array has had. TensorFlow keeps hidden variables for this.
_updates: dict[int, tuple[weakref.ref[Any], int]] = {}
_updates_lock = Lock()


def count_update(variable: Any) -> int:
    """Return which debiased update of this array object this is, counted from 1."""
    key = id(variable)
    with _updates_lock:
        update = _updates[key][1] + 1 if key in _updates else 1
        forget = lambda _: _updates.pop(key, None)  # noqa: E731
        _updates[key] = (weakref.ref(variable, forget), update)
    return update


def assign_moving_average(
    variable: NDArray[Any], value: Any, decay: Any, zero_debias: Any = False
) -> NDArray[Any]:
    """See :func:`fusebn.assign_moving_average`."""
    operation = "assign_moving_average"
    _spec.element_type(operation, "variable", variable.dtype.name)
    if not variable.flags.writeable:
        _spec.fail(ValueError, operation, "variable", "be writeable", "a read-only array")
    new = np.asarray(value)
    if new.dtype.kind not in "iu":
        _spec.element_type(operation, "value", new.dtype.name)
    _spec.same_shape(operation, "value", new.shape, variable.shape, of="variable")
    decay = _spec.fraction(operation, "decay", decay, "It is the weight of the old value.")
    if _spec.flag(operation, "zero_debias", zero_debias):
        if decay == 1:
            _spec.fail(ValueError, operation, "decay", "be below 1 with zero_debias", "1.0")
        if not variable.flags.owndata:
            # A view made anew for each call would be a new object each time, and count as fresh.
            expected = "own its memory with zero_debias, which counts the updates of an array"
            fix = "Pass the array itself."
            _spec.fail(ValueError, operation, "variable", expected, "a view", fix)
        weight = factor(decay, count_update(variable), zero_debias=True)
    else:
        weight = factor(decay, 1)
    variable[...] = mix(variable, new, weight).astype(variable.dtype)
    return variable
