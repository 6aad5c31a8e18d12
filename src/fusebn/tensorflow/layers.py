"""The layers of TensorFlow 1: ``fusebn.tensorflow.layers``.

Successors of ``tf.contrib.layers.batch_norm`` (``tf_slim.batch_norm``) and of
``tf.layers.batch_normalization``, under their names, arguments, defaults and variables; what they
compute is in ``_batch_norm.py``, once.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from fusebn import _spec, _transforms
from fusebn.tensorflow import _arguments, _ops, _variables
from fusebn.tensorflow._autograph import unconverted
from fusebn.tensorflow._batch_norm import Layer
from fusebn.tensorflow._functions import stat_type
from fusebn.tensorflow._renorm import CLIPPING, Renorm
from fusebn.tensorflow._transformed import Transforms
from fusebn.tensorflow._variables import Wish

__all__ = ["batch_norm", "batch_normalization"]

v1 = tf.compat.v1

UPDATE_OPS = v1.GraphKeys.UPDATE_OPS
_MODEL_COLLECTIONS = (v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.MODEL_VARIABLES)

# The variables every layer may have, and what they start from.
_INITIALIZERS = {
    "beta": v1.zeros_initializer(),
    "gamma": v1.ones_initializer(),
    "moving_mean": v1.zeros_initializer(),
    "moving_variance": v1.ones_initializer(),
}


@unconverted
def batch_norm(
    inputs: Any,
    decay: Any = 0.999,
    center: Any = True,
    scale: Any = False,
    epsilon: Any = 0.001,
    activation_fn: Callable[[Any], Any] | None = None,
    param_initializers: Mapping[str, Any] | None = None,
    param_regularizers: Mapping[str, Any] | None = None,
    updates_collections: Any = UPDATE_OPS,
    is_training: Any = True,
    reuse: Any = None,
    variables_collections: Any = None,
    outputs_collections: Any = None,
    trainable: Any = True,
    batch_weights: Any = None,
    fused: Any = None,
    data_format: Any = "NHWC",
    zero_debias_moving_mean: Any = False,
    scope: Any = None,
    renorm: Any = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_decay: Any = 0.99,
    adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
    *,
    correction: Any = 1,
    residual: Any = None,
    transforms: Mapping[str, Callable[..., Any]] | None = None,
    transforms_active: Any = True,
    transform_batch_statistics: Any = False,
) -> Any:
    """Normalize a batch and keep moving averages: ``tf.contrib.layers.batch_norm``.

    ::

        y = activation_fn((inputs - mean) / sqrt(variance + epsilon) * gamma + beta + residual)

    In training, mean and variance are the batch's (the variance with divisor n), and the moving
    averages take them up::

        moving_mean     -= (1 - decay) * (moving_mean - mean)
        moving_variance -= (1 - decay) * (moving_variance - variance * n / (n - correction))

    Otherwise they are the moving averages, and nothing changes. The averages start at 0 and 1.

    Parameters
    ----------
    inputs : tensor of float16, bfloat16, float32 or float64
        Two axes or more, the batch first, the number of channels known.
    decay : float in [0, 1], or scalar tensor
        Weight of the old average.
    center, scale : bool
        Whether there is an offset ``beta``, a factor ``gamma``.
    epsilon : float
        Not negative; added to the variance.
    activation_fn : callable, optional
        Applied to the result. ``tf.nn.relu``, ``relu6``, ``silu`` and ``gelu`` cost no pass of
        their own.
    param_initializers, param_regularizers : dict, optional
        By name: "beta", "gamma", and for initializers "moving_mean", "moving_variance".
    updates_collections : str or list of str, or None
        Where the updates of the moving averages go, to be run with the training step. None makes
        them a control dependency of the output. Eager execution and ``tf.function`` run them at
        once in either case.
    is_training : bool, or scalar boolean tensor
        A tensor is read at run time, by the one op that there is.
    reuse : bool, optional
        Whether to take the variables that stand in `scope`, which must then be given.
    variables_collections : str, list of str, or dict of these by the variable's name, optional
        Collections for the variables besides ``GLOBAL_VARIABLES`` and ``MODEL_VARIABLES``.
    outputs_collections : str or list of str, optional
        Collections for the output, which gets the scope's name as an alias.
    trainable : bool
        Whether beta and gamma are in ``TRAINABLE_VARIABLES``. It does not stop the averages.
    batch_weights : tensor of shape [batch], optional
        How much each example counts in the statistics; not negative. An example of weight 0 is
        normalized all the same. n is then the sum of the weights.
    fused : bool, optional
        False calls TensorFlow's standard ops instead of this library's, with the same results: see
        :func:`fusebn.tensorflow.portable`. None and True choose nothing.
    data_format : str
        "NHWC": the channels are the last axis, whatever the rank. "NCHW": the second.
    zero_debias_moving_mean : bool
        Free moving_mean from its initial value: see
        :func:`fusebn.tensorflow.moving_averages.assign_moving_average`.
    scope : str or variable scope, optional
        Of the variables; None is a fresh "BatchNorm".
    renorm, renorm_clipping, renorm_decay : bool, dict, float
        Batch renormalization: train with ``r * x + d`` for the normalized x, so that it comes out
        as if the averages ``renorm_mean`` and ``renorm_stddev``, of decay `renorm_decay`, had
        normalized it. r is clipped to [rmin, rmax] and d to [-dmax, dmax], as far as the dictionary
        has these keys.
    adjustment : callable, optional
        Takes the dynamic shape of inputs and returns a factor and a summand, which broadcast to
        it, for the normalized inputs, before gamma and beta; in training only.
    correction : float
        Taken from n in the divisor of the variance that is averaged.
    residual : tensor like inputs, optional
        Added before the activation.
    transforms : dict, optional
        Functions from a vector of shape [channels] to another, by the name of what they apply to:
        "scale", "offset", "moving_mean", "moving_variance". What they return normalizes in its
        place; gradients flow through them, the variables stay as they are. A variance below 0
        becomes 0. For instance ``{"scale": fusebn.tensorflow.FakeQuantize(8)}``; what has a state
        observes in training.
    transforms_active : bool, or scalar boolean tensor or tf.Variable
        Whether the transforms apply. A tensor is read at run time: one graph serves both. Without
        them the results are those of a layer without transforms, bit for bit.
    transform_batch_statistics : bool
        Whether, in training, the batch's mean and biased variance go through the transforms of the
        moving statistics before they normalize it, at the cost of one more pass over inputs. The
        moving averages take up the batch's own. Neither with `renorm` nor with virtual batches.

    Returns
    -------
    tensor of the shape and dtype of inputs

    Raises
    ------
    TypeError, ValueError
        An argument does not fit; a wrong `reuse` is TensorFlow's own ValueError.
    RuntimeError
        In eager execution, outside of ``tf.compat.v1.make_template``: the variables would be lost.

    Notes
    -----
    The variables are ``beta, gamma, moving_mean, moving_variance``, in that order, float32 (float64
    for float64), whatever the arguments; `renorm` adds ``moving_stddev, renorm_mean,
    renorm_stddev``; zero-debiasing ``biased`` and ``local_step``. The regularizer of the scope is
    not applied to the averages.

    What TensorFlow's layer does otherwise: the variance it averaged was with or without correction
    depending on rank, `fused` and half a dozen other arguments; some combinations dropped
    `adjustment` and the regularizers, others were refused. Here each argument does the same in any
    combination. An empty batch, or one whose weights are all 0, leaves the averages as they are.

    Under a ``tf.distribute`` strategy each replica normalizes by its own batch and has averages of
    its own; to read them is to read their mean.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167; Ioffe, "Batch
    Renormalization", 2017, https://arxiv.org/abs/1702.03275.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import layers
    >>> v1 = tf.compat.v1
    >>> with tf.Graph().as_default(), v1.Session() as session:
    ...     is_training = v1.placeholder_with_default(False, [])
    ...     x = tf.constant([[1.0], [3.0]])
    ...     y = layers.batch_norm(x, decay=0.5, is_training=is_training)
    ...     update = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
    ...     session.run(v1.global_variables_initializer())
    ...     trained, _ = session.run([y, update], {is_training: True})
    ...     session.run(v1.global_variables())
    [array([0.], dtype=float32), array([1.], dtype=float32), array([1.5], dtype=float32)]
    >>> trained.round(3)
    array([[-1.],
           [ 1.]], dtype=float32)
    """
    operation = "batch_norm"
    x = _arguments.inputs_of(operation, inputs)
    _spec.one_of(operation, "data_format", data_format, ("NHWC", "NCHW"))
    initializers = _arguments.by_name(
        operation, "param_initializers", param_initializers, tuple(_INITIALIZERS)
    )
    regularizers = _arguments.by_name(
        operation, "param_regularizers", param_regularizers, ("beta", "gamma")
    )
    if not isinstance(variables_collections, Mapping):
        variables_collections = dict.fromkeys(_INITIALIZERS, variables_collections)
    wishes = {
        name: Wish(
            _arguments.initializer(
                operation, f"param_initializers[{name!r}]", initializer, default
            ),
            regularizers.get(name),
            collections=[
                *_MODEL_COLLECTIONS,
                *_arguments.collections_of(variables_collections.get(name)),
            ],
        )
        for name, default in _INITIALIZERS.items()
        for initializer in [initializers.get(name)]
    }
    return _layer(
        operation,
        x,
        _arguments.axes_of(operation, 1 if data_format == "NCHW" else -1, x),
        v1.variable_scope(scope, "BatchNorm", [x], reuse=reuse),
        wishes,
        {
            "beta": _spec.flag(operation, "center", center),
            "gamma": _spec.flag(operation, "scale", scale),
        },
        trainable=trainable,
        training=_arguments.training_flag(operation, "is_training", is_training),
        epsilon=epsilon,
        decay=_arguments.decay_of(operation, "decay", decay),
        correction=correction,
        zero_debias=_spec.flag(operation, "zero_debias_moving_mean", zero_debias_moving_mean),
        renorm=renorm,
        clipping=renorm_clipping,
        renorm_decay=_arguments.decay_of(operation, "renorm_decay", renorm_decay),
        virtual_batch_size=None,
        adjustment=adjustment,
        weights=_arguments.example_weights(operation, batch_weights, x),
        activation=activation_fn,
        residual=residual,
        fused=fused,
        transforms=transforms,
        transforms_active=transforms_active,
        transform_batch_statistics=transform_batch_statistics,
        updates_collections=updates_collections,
        outputs_collections=outputs_collections,
    )


@unconverted
def batch_normalization(
    inputs: Any,
    axis: Any = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-3,
    center: Any = True,
    scale: Any = True,
    beta_initializer: Any = None,
    gamma_initializer: Any = None,
    moving_mean_initializer: Any = None,
    moving_variance_initializer: Any = None,
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    beta_constraint: Any = None,
    gamma_constraint: Any = None,
    training: Any = False,
    trainable: Any = True,
    name: Any = None,
    reuse: Any = None,
    renorm: Any = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: Any = 0.99,
    fused: Any = None,
    virtual_batch_size: Any = None,
    adjustment: Callable[[Any], tuple[Any, Any]] | None = None,
    *,
    updates_collections: Any = UPDATE_OPS,
    correction: Any = 1,
    activation_fn: Callable[[Any], Any] | None = None,
    residual: Any = None,
    transforms: Mapping[str, Callable[..., Any]] | None = None,
    transforms_active: Any = True,
    transform_batch_statistics: Any = False,
) -> Any:
    """Normalize a batch and keep moving averages: ``tf.layers.batch_normalization``.

    The formula, the types and the errors are those of :func:`batch_norm`; what differs is said
    here. Mind the default: without ``training=`` the layer neither normalizes by the batch nor
    updates anything.

    Parameters
    ----------
    inputs : tensor of float16, bfloat16, float32 or float64
        Two axes or more, the batch first.
    axis : int or list of int
        The axes that keep statistics of their own: the channels. Their lengths must be known.
    momentum : float in [0, 1], or scalar tensor
        Weight of the old average: `decay` there.
    epsilon, center, scale, trainable, reuse, renorm, renorm_clipping, adjustment, fused
        As there.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer : \
            callable, optional
        None is zeros, ones, zeros, ones.
    beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint : callable, optional
    training : bool, or scalar boolean tensor
        `is_training` there.
    name : str, optional
        Of the variables' scope; None is a fresh "batch_normalization".
    renorm_momentum : float in [0, 1], or scalar tensor
        `renorm_decay` there.
    virtual_batch_size : int, optional
        In training, normalize groups of so many examples, each by itself (ghost batches). Group j
        of G has the examples j, j + G, j + 2G, ... The averages take up the mean of the groups'
        statistics. The size must divide the batch, in training only. Not with `adjustment`.
    updates_collections, correction, activation_fn, residual, transforms, transforms_active, \
            transform_batch_statistics
        As there.

    Returns
    -------
    tensor of the shape and dtype of inputs

    Notes
    -----
    The variables are ``gamma, beta, moving_mean, moving_variance``, in that order, and of shape
    [channels]; with several axes they have the rank of inputs, with 1 for the other axes, and with
    virtual batches one more 1 at axis 1, as TensorFlow's have.

    The variance that is averaged has divisor ``n - correction``; TensorFlow's had n - 1 where it
    was fused (rank 4, one axis, nothing special) and n elsewhere: pass ``correction=0`` for that.

    Virtual batches: Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017,
    https://arxiv.org/abs/1705.08741.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import layers
    >>> v1 = tf.compat.v1
    >>> with tf.Graph().as_default(), v1.Session() as session:
    ...     x = tf.constant([[0.0], [1.0], [10.0], [11.0]])
    ...     y = layers.batch_normalization(x, training=True, virtual_batch_size=2)
    ...     session.run(v1.global_variables_initializer())
    ...     session.run(y).round(3).ravel()              # 0 with 10, and 1 with 11
    array([-1., -1.,  1.,  1.], dtype=float32)
    """
    operation = "batch_normalization"
    x = _arguments.inputs_of(operation, inputs)
    axes = _arguments.axes_of(operation, axis, x)
    training = _arguments.training_flag(operation, "training", training)
    if virtual_batch_size is not None:
        virtual_batch_size = _spec.positive_integer(
            operation, "virtual_batch_size", virtual_batch_size
        )
        batch = x.shape[0]
        if training is True and batch is not None and batch % virtual_batch_size:
            expected = f"divide the size of the batch in training, {batch}"
            _spec.fail(
                ValueError, operation, "virtual_batch_size", expected, repr(virtual_batch_size)
            )
        if adjustment is not None:
            expected = "be None with virtual_batch_size: it would not know the groups"
            _spec.fail(ValueError, operation, "adjustment", expected, repr(adjustment))
        if 0 in axes:
            expected = "leave out axis 0 with virtual_batch_size, which cuts it"
            _spec.fail(ValueError, operation, "axis", expected, repr(axis))
    given = {
        "beta": (beta_initializer, beta_regularizer, beta_constraint),
        "gamma": (gamma_initializer, gamma_regularizer, gamma_constraint),
        "moving_mean": (moving_mean_initializer,),
        "moving_variance": (moving_variance_initializer,),
    }
    wishes = {
        key: Wish(
            _arguments.initializer(operation, f"{key}_initializer", initializer, default), *others
        )
        for key, default in _INITIALIZERS.items()
        for initializer, *others in [given[key]]
    }
    return _layer(
        operation,
        x,
        axes,
        v1.variable_scope(name, "batch_normalization", [x], reuse=reuse),
        wishes,
        {
            "gamma": _spec.flag(operation, "scale", scale),
            "beta": _spec.flag(operation, "center", center),
        },
        trainable=trainable,
        training=training,
        epsilon=epsilon,
        decay=_arguments.decay_of(operation, "momentum", momentum),
        correction=correction,
        zero_debias=False,
        renorm=renorm,
        clipping=renorm_clipping,
        renorm_decay=_arguments.decay_of(operation, "renorm_momentum", renorm_momentum),
        virtual_batch_size=virtual_batch_size,
        adjustment=adjustment,
        weights=None,
        activation=activation_fn,
        residual=residual,
        fused=fused,
        transforms=transforms,
        transforms_active=transforms_active,
        transform_batch_statistics=transform_batch_statistics,
        updates_collections=updates_collections,
        outputs_collections=None,
    )


def _layer(
    operation: str,
    x: Any,
    axes: tuple[int, ...],
    scope: Any,
    wishes: Mapping[str, Wish],
    parameters: Mapping[str, bool],
    *,
    trainable: Any,
    training: Any,
    epsilon: Any,
    correction: Any,
    renorm: Any,
    clipping: Any,
    renorm_decay: Any,
    virtual_batch_size: int | None,
    adjustment: Any,
    activation: Any,
    weights: Any,
    residual: Any,
    fused: Any,
    transforms: Any,
    transforms_active: Any,
    transform_batch_statistics: Any,
    updates_collections: Any,
    outputs_collections: Any,
    **arguments: Any,
) -> Any:
    """Do what both layers share: variables in their scope, the batch, collections."""
    epsilon = _spec.non_negative(operation, "epsilon", epsilon)
    correction = _spec.non_negative(operation, "correction", correction)
    trainable = _spec.flag(operation, "trainable", trainable)
    clipping = _arguments.by_name(operation, "renorm_clipping", clipping, CLIPPING)
    renorm = _spec.flag(operation, "renorm", renorm)
    adjustment = _arguments.function(operation, "adjustment", adjustment)
    activation = _arguments.function(operation, "activation_fn", activation)
    if residual is not None:
        residual = _arguments.like_inputs(operation, "residual", residual, x)
    transformed = Transforms(
        operation,
        _transforms.checked(operation, transforms),
        _arguments.training_flag(operation, "transforms_active", transforms_active),
        training,
        _spec.flag(operation, "transform_batch_statistics", transform_batch_statistics),
    )
    if transformed.of_batch and (renorm or virtual_batch_size is not None):
        other = "renorm" if renorm else "virtual_batch_size"
        expected = f"be False with {other}, which changes the batch's statistics in its own way"
        _spec.fail(ValueError, operation, "transform_batch_statistics", expected, "True")
    native = fused is None or _spec.flag(operation, "fused", fused)
    # The shapes that TensorFlow's layers gave their variables, and that checkpoints have.
    shape = [x.shape[axis] for axis in axes]
    if len(axes) > 1 or virtual_batch_size is not None:
        shape = [n if axis in axes else 1 for axis, n in enumerate(x.shape)]
        if virtual_batch_size is not None:
            shape.insert(1, 1)
    dtype = stat_type(x)

    def average(name: str, wish: Wish) -> Any:
        return _variables.average(operation, name, shape, dtype, wish)

    with scope as scope, nullcontext() if native else _ops.portable():
        made = {
            name: _variables.parameter(name, shape, dtype, trainable, wishes[name])
            for name, wanted in parameters.items()
            if wanted
        }
        moving_mean = average("moving_mean", wishes["moving_mean"])
        moving_variance = average("moving_variance", wishes["moving_variance"])
        layer = Layer(
            operation=operation,
            axes=axes,
            training=training,
            transforms=transformed,
            epsilon=epsilon,
            correction=correction,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            weights=weights,
            residual=residual,
            activation=activation,
            scale=made.get("gamma"),
            offset=made.get("beta"),
            moving_mean=moving_mean,
            moving_variance=moving_variance,
            renorm=Renorm.create(average, wishes, clipping, renorm_decay) if renorm else None,
            **arguments,
        )
        y, updates = layer(x)
        if tf.executing_eagerly():
            return y  # what had to be updated is; collections belong to graphs
        if updates_collections is None:
            with tf.control_dependencies(updates):
                y = tf.identity(y)
        else:
            for update in updates:
                v1.add_to_collections(updates_collections, update)
        if outputs_collections is not None:
            y.aliases = [*getattr(y, "aliases", ()), scope.name]
            v1.add_to_collections(outputs_collections, y)
        return y
