"""Moving averages of TensorFlow variables: ``fusebn.tensorflow.moving_averages``."""

from typing import Any

import tensorflow as tf

from fusebn import _spec
from fusebn.tensorflow import _variables
from fusebn.tensorflow._autograph import unconverted

__all__ = ["assign_moving_average"]

v1 = tf.compat.v1


@unconverted
def assign_moving_average(
    variable: Any, value: Any, decay: Any, zero_debias: Any = True, name: str | None = None
) -> Any:
    """Update a moving average in place.

    ::

        variable -= (1 - decay) * (variable - value)

    and with `zero_debias`, for an average that starts from 0::

        biased -= (1 - decay) * (biased - value)
        local_step += 1
        variable = biased / (1 - decay**local_step)

    Parameters
    ----------
    variable : tf.Variable of float16, bfloat16, float32 or float64
    value : tensor that broadcasts to its shape
        Converted to the variable's dtype.
    decay : float in [0, 1], or scalar tensor
        Weight of the old value.
    zero_debias : bool
        Divide the average by the sum of its weights, in which the variable's first content has no
        part. ``biased`` and ``local_step`` are variables made by ``tf.compat.v1.get_variable`` in a
        scope of the variable's name inside the current scope: for a variable ``a/b`` in scope ``a``
        they are ``a/a/b/biased`` and ``a/a/b/local_step``. The default is TensorFlow's; mind that
        :func:`fusebn.assign_moving_average` has another.
    name : str, optional
        Of the operation; None is "AssignMovingAvg".

    Returns
    -------
    The update, whose value is the new average. In a ``tf.compat.v1`` graph it happens when this is
    run: fetched, as a control dependency, or from ``UPDATE_OPS``. In eager execution and in a
    ``tf.function`` it happens in any case.

    Raises
    ------
    TypeError, ValueError
        The variable has no floating type, the value does not broadcast to it, the decay is out of
        range, or 1 with zero_debias.
    RuntimeError
        With zero_debias in eager execution, outside a template: nothing would keep the variables.

    Notes
    -----
    As ``tensorflow.python.training.moving_averages.assign_moving_average``, its hidden variables
    included, so that checkpoints restore. Under a ``tf.distribute`` strategy the update follows the
    variable's own aggregation. The correction is that of Kingma and Ba, "Adam", 2015, section 3.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import moving_averages
    >>> average = tf.Variable([0.0, 10.0])
    >>> update = moving_averages.assign_moving_average(average, [1.0, 20.0], 0.9, zero_debias=False)
    >>> average.numpy()
    array([ 0.1, 11. ], dtype=float32)
    """
    operation = "assign_moving_average"
    if not isinstance(variable, tf.Variable):
        kind = type(variable).__name__
        _spec.fail(TypeError, operation, "variable", "be a tf.Variable", kind)
    dtype = variable.dtype.base_dtype
    _spec.element_type(operation, "variable", dtype.name)
    zero_debias = _spec.flag(operation, "zero_debias", zero_debias)
    if not tf.is_tensor(decay):
        decay = _spec.fraction(operation, "decay", decay)
        if zero_debias and decay == 1:
            expected = "be less than 1 with zero_debias, which divides by 1 - decay**t"
            _spec.fail(ValueError, operation, "decay", expected, "1.0")
    value = converted(value, dtype)
    if not _broadcasts_to(value.shape, variable.shape):
        expected = f"broadcast to the variable's shape {tuple(variable.shape)}"
        _spec.fail(ValueError, operation, "value", expected, f"shape {tuple(value.shape)}")
    with v1.name_scope(name, "AssignMovingAvg", [variable, value]):
        return update(operation, variable, value, decay, zero_debias=zero_debias)


def update(
    operation: str,
    variable: Any,
    value: Any,
    decay: Any,
    *,
    zero_debias: bool = False,
    when: Any = None,
) -> Any:
    """Update an average; where the scalar tensor `when` is false, its bits stay as they are."""
    factor = converted(1.0 - decay, variable.dtype.base_dtype)

    def either(new: Any, old: Any) -> Any:
        return new if when is None else tf.where(when, new, old)

    if not zero_debias:
        # Subtracting a difference, not assigning a sum: two updates at once lose neither.
        return v1.assign_sub(variable, either((variable - value) * factor, tf.zeros_like(variable)))
    biased, local_step = _hidden_variables(operation, variable)
    biased = v1.assign_sub(biased, either((biased - value) * factor, tf.zeros_like(biased)))
    one = tf.ones([], factor.dtype)
    local_step = v1.assign_add(local_step, either(one, tf.zeros_like(one)))
    debiased = biased / (1 - tf.pow(1 - factor, local_step))
    return v1.assign(variable, either(debiased, tf.convert_to_tensor(variable)))


def _hidden_variables(operation: str, variable: Any) -> tuple[Any, Any]:
    """Return the biased average and the number of its updates, under TensorFlow's names."""
    with v1.variable_scope(variable.name.partition(":")[0]) as scope:
        taken = set() if scope.reuse else {v.op.name for v in scope.global_variables()}

        def hidden(name: str, shape: Any) -> Any:
            free, number = name, 0
            while f"{scope.name}/{free}" in taken:
                free, number = f"{name}_{number + 1}", number + 1
            wish = _variables.Wish(v1.zeros_initializer())
            return _variables.average(operation, free, shape, variable.dtype.base_dtype, wish)

        return hidden("biased", variable.shape), hidden("local_step", [])


def converted(value: Any, dtype: Any) -> Any:
    """Return a number or tensor as a tensor of `dtype`."""
    # tf.cast takes a Python number by way of float32, which costs a float64 average its digits.
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        return tf.cast(value, dtype)
    return tf.convert_to_tensor(value, dtype)


def _broadcasts_to(shape: Any, target: Any) -> bool:
    try:
        return bool(tf.broadcast_static_shape(shape, target).is_compatible_with(target))
    except ValueError:
        return False
