"""The variables of a layer: made, named, collected and reused as TensorFlow 1 did."""

from typing import Any, NamedTuple

import tensorflow as tf

from fusebn import _spec

v1 = tf.compat.v1


class Wish(NamedTuple):
    """What the user wishes of a variable."""

    initializer: Any
    regularizer: Any = None
    constraint: Any = None
    collections: list[str] | None = None


def parameter(name: str, shape: Any, dtype: Any, trainable: bool, wish: Wish) -> Any:
    """Return an offset or a scale, from the current scope."""
    return v1.get_variable(name, shape, dtype, trainable=trainable, **wish._asdict())


def average(operation: str, name: str, shape: Any, dtype: Any, wish: Wish) -> Any:
    """Return a variable that no optimizer trains, from the current scope.

    It is whole and unregularized whatever the scope's defaults: a scope's regularizer is meant for
    parameters, and an update needs the variable in one piece.
    """
    scope = v1.get_variable_scope()
    with v1.variable_scope(scope, auxiliary_name_scope=False) as whole:
        whole.set_partitioner(None)
        variable = v1.get_variable(
            name,
            shape,
            dtype,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
            **wish._replace(regularizer=v1.no_regularizer)._asdict(),
        )
        # Outside of a template, eager execution makes a new variable of the name each time.
        if tf.executing_eagerly() and v1.get_variable(name, shape, dtype) is not variable:
            _spec.fail(
                RuntimeError,
                operation,
                "scope",
                "keep the variables from one call to the next",
                "eager execution, which would make new ones in every call",
                "Wrap the model once by tf.compat.v1.make_template(name, function) and call that, "
                "or build it in a tf.Graph.",
            )
    return variable
