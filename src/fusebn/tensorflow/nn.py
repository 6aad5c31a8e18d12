"""The batch-norm functions of ``tf.nn`` and ``tf.compat.v1.nn``, on fused kernels.

Names, order and defaults of the arguments are TensorFlow's, of both versions where they differ, and
so are shapes and dtypes of the results: replacing ``tf.nn.`` by ``fusebn.tensorflow.nn.`` is the
whole migration. Statistics are accumulated exactly whatever the dtype, mean and variance are
differentiable wherever they come from, and float64 works everywhere. Arguments after a star are
ours. All raise TypeError for the wrong kind of argument and ValueError for a wrong value or shape
where it is known when the graph is built; where it is not, the op raises
``tf.errors.InvalidArgumentError`` when it runs.
"""

from typing import Any

import tensorflow as tf

from fusebn import _spec
from fusebn._results import FusedBatchNorm
from fusebn.tensorflow import _functions
from fusebn.tensorflow._autograph import unconverted

__all__ = [
    "batch_norm_with_global_normalization",
    "batch_normalization",
    "fused_batch_norm",
    "moments",
    "normalize_moments",
    "sufficient_statistics",
    "weighted_moments",
]


@unconverted
def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: Any = True,
    name: str | None = None,
    exponential_avg_factor: float = 1.0,
    *,
    axis: int | None = None,
    activation: str | None = None,
    residual: Any = None,
    weights: Any = None,
    correction: float = 1,
) -> FusedBatchNorm:
    """Normalize each channel of x, and what surrounds it, in as few passes as there can be.

    ::

        y = activation((x - m) * scale / sqrt(v + epsilon) + offset + residual)

    In training m and v are the batch's, ``m = sum(w * x) / n``, ``v = sum(w * (x - m)**2) / n``,
    ``n = sum(w)``; otherwise they are the given `mean` and `variance`.

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64
    scale, offset : tensor of shape (channels,), or None
        None means 1 and 0, without the arithmetic.
    mean, variance : tensor of shape (channels,), or None
        The moving statistics: needed in inference, where `is_training` is a tensor, and if
        `exponential_avg_factor` is not 1; ignored in training if it is.
    epsilon : float
        Added to the variance; not negative.
    data_format : str
        "NHWC", "NCHW", "NDHWC", "NCDHW", "NWC", "NCW" or "NC".
    is_training : bool, or scalar boolean tensor
        Whether the batch's statistics normalize x, or the given ones. A tensor is read when the
        one op runs, in the gradient too: there is no cond and no second graph.
    name : str, optional
        Of the operation.
    exponential_avg_factor : float in [0, 1]
        Weight of the batch in the statistics returned: ``(1 - f) * given + f * batch``.
    axis : int, optional
        The channel axis, for any rank; it overrides `data_format`.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        leaky_relu has slope 0.01 below 0; gelu is the exact one.
    residual : tensor of the shape and dtype of x, optional
        Added before the activation.
    weights : tensor, optional
        One non-negative real for each position, in the shape of x without the channel axis (or
        with length 1 there), or broadcasting to it: how much it counts in the statistics.
    correction : float
        The variance returned is ``sum(w * (x - m)**2) / (n - correction)``: 1 is TensorFlow's, 0
        the biased one. Where n is not above it the divisor is n.

    Returns
    -------
    y : tensor of the shape and dtype of x
    mean, variance : tensors of shape (channels,), float32 or float64 if x is
        In training the batch's, mixed into the given ones if the factor is not 1; in inference
        copies of the given ones, bit for bit. Together with y a named tuple. All inputs have
        gradients, through all three results and of any order.

    Notes
    -----
    As ``tf.compat.v1.nn.fused_batch_norm``, whose gradients into mean and variance are silently 0.
    One element a channel has variance 0. An empty batch, or weights that are all 0, give NaN for
    the statistics, or the given ones where the factor is not 1. See :func:`fusebn.fused_batch_norm`
    for the policies in full.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> x = tf.constant([[1.0, 10.0], [3.0, 10.0]])
    >>> y, mean, variance = nn.fused_batch_norm(x, None, None, epsilon=0.25, data_format="NC")
    >>> mean.numpy(), variance.numpy()
    (array([ 2., 10.], dtype=float32), array([2., 0.], dtype=float32))
    >>> y.numpy().round(4)
    array([[-0.8944,  0.    ],
           [ 0.8944,  0.    ]], dtype=float32)

    The switch as a tensor:

    >>> @tf.function
    ... def apply(x, is_training):
    ...     return nn.fused_batch_norm(
    ...         x, None, None, mean, variance, data_format="NC", is_training=is_training
    ...     ).variance
    >>> apply(x * 10, tf.constant(True)).numpy(), apply(x * 10, tf.constant(False)).numpy()
    (array([200.,   0.], dtype=float32), array([2., 0.], dtype=float32))
    """
    result = _functions.forward(
        "fused_batch_norm",
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        exponential_avg_factor,
        axis,
        activation,
        residual,
        weights,
        correction,
        name,
    )
    return FusedBatchNorm(*result[:3])


def _keepdims(operation: str, keepdims: Any, name: Any, keep_dims: Any) -> tuple[bool, str | None]:
    """Return keepdims and name; TensorFlow 1 and 2 have them in opposite order."""
    if isinstance(keepdims, str) or isinstance(name, bool):
        keepdims, name = name, keepdims
    if keep_dims is not None and keepdims:
        expected = "be left out, since `keepdims` is given"
        _spec.fail(ValueError, operation, "keep_dims", expected, repr(keep_dims))
    keepdims = keep_dims if keepdims is None or keep_dims is not None else keepdims
    return _spec.flag(operation, "keepdims", bool(keepdims) if keepdims is None else keepdims), name


def _as(x: Any, *statistics: Any) -> tuple[Any, ...]:
    """Round statistics to the dtype of x, as TensorFlow's functions return them."""
    return tuple(tf.cast(value, x.dtype) for value in statistics)


@unconverted
def moments(
    x: Any,
    axes: Any,
    shift: Any = None,
    keepdims: Any = False,
    name: str | None = None,
    *,
    keep_dims: bool | None = None,
    weights: Any = None,
) -> tuple[Any, Any]:
    """Return the mean and the biased variance of x over `axes`.

    ::

        mean     = sum(w * x) / sum(w)
        variance = sum(w * (x - mean)**2) / sum(w)

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64
        Its rank must be known.
    axes : int, ints or None
        The axes to reduce, any set of them; None means all.
    shift
        Not used, as in TensorFlow.
    keepdims : bool
        Keep the reduced axes with length 1. `keepdims` and `name` may also come in the order of
        ``tf.compat.v1.nn.moments``, name first.
    name : str, optional
    keep_dims : bool, optional
        The old name of `keepdims`.
    weights : tensor, optional
        As for :func:`fusebn.moments`: one non-negative real for each reduced position.

    Returns
    -------
    mean, variance : tensors of the dtype of x
        NaN where nothing is counted.

    Notes
    -----
    As ``tf.nn.moments``, but 16-bit tensors are accumulated in float32, bfloat16 too, and rounded
    once. A variance that does not fit a float16 is still infinite there; :func:`fusebn.moments`
    returns float32 for it.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> mean, variance = nn.moments(tf.constant([[1.0, 542.37], [3.0, 542.37]]), axes=[0])
    >>> mean.numpy(), variance.numpy()
    (array([  2.  , 542.37], dtype=float32), array([1., 0.], dtype=float32))
    """
    del shift
    keepdims, name = _keepdims("moments", keepdims, name, keep_dims)
    with tf.name_scope(name or "moments"):
        x = _functions.tensor_of("moments", "x", x)
        statistics = _functions.moments(x, axes, weights=weights, keepdims=keepdims)
        mean, variance = _as(x, *statistics)
    return mean, variance


@unconverted
def weighted_moments(
    x: Any,
    axes: Any,
    frequency_weights: Any,
    keepdims: Any = False,
    name: str | None = None,
    *,
    keep_dims: bool | None = None,
) -> tuple[Any, Any]:
    """Return the weighted mean and biased variance of x over `axes`.

    ::

        mean     = sum(w * x) / sum(w)
        variance = sum(w * (x - mean)**2) / sum(w)

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64
    axes : int, ints or None
    frequency_weights : tensor
        Non-negative reals; the shape broadcasts to that of x. Positions of weight 0 are left out.
    keepdims, name, keep_dims
        As for :func:`moments`.

    Returns
    -------
    mean, variance : tensors of the dtype of x
        0 where all weights are 0, as TensorFlow says (:func:`fusebn.weighted_moments` says NaN).

    Notes
    -----
    As ``tf.nn.weighted_moments``. Weights that are the same for all channels take the fast way.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> x = tf.constant([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> mean, variance = nn.weighted_moments(x, 0, [[1.0], [3.0], [0.0]])
    >>> mean.numpy(), variance.numpy()
    (array([2.5, 3.5], dtype=float32), array([0.75, 0.75], dtype=float32))
    """
    operation = "weighted_moments"
    keepdims, name = _keepdims(operation, keepdims, name, keep_dims)
    with tf.name_scope(name or operation):
        x = _functions.tensor_of(operation, "x", x)
        statistics = _functions.weighted_mean_and_variance(
            x, axes, frequency_weights, keepdims, undefined=0.0
        )
        mean, variance = _as(x, *statistics)
    return mean, variance


@unconverted
def sufficient_statistics(
    x: Any,
    axes: Any,
    shift: Any = None,
    keepdims: Any = False,
    name: str | None = None,
    *,
    keep_dims: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return the sums that mean and variance can be computed from.

    ::

        count       = number of elements reduced
        mean_ss     = sum(x - shift)
        variance_ss = sum((x - shift)**2)

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64
    axes : int, ints or None
    shift : tensor, optional
        A value near the mean, so that the sums carry the variance; None means 0.
    keepdims, name, keep_dims
        As for :func:`moments`.

    Returns
    -------
    count, mean_ss, variance_ss : tensors of the dtype of x
    shift : as given

    Notes
    -----
    As ``tf.nn.sufficient_statistics``. A count above 2048 cannot be told exactly in float16, nor
    one above 256 in bfloat16: pass wider tensors, or call :func:`moments`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> x = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    >>> count, mean_ss, variance_ss, shift = nn.sufficient_statistics(x, 0, shift=[2.0, 4.0])
    >>> count.numpy().item(), mean_ss.numpy(), variance_ss.numpy()
    (2.0, array([0., 0.], dtype=float32), array([2., 8.], dtype=float32))
    """
    operation = "sufficient_statistics"
    keepdims, name = _keepdims(operation, keepdims, name, keep_dims)
    with tf.name_scope(name or operation):
        x = _functions.tensor_of(operation, "x", x)
        *sums, shift = _functions.sufficient_statistics(x, axes, shift, keepdims)
        count, mean_ss, variance_ss = _as(x, *sums)
    return count, mean_ss, variance_ss, shift


@unconverted
def normalize_moments(
    counts: Any, mean_ss: Any, variance_ss: Any, shift: Any, name: str | None = None
) -> tuple[Any, Any]:
    """Return mean and biased variance, given the sums of :func:`sufficient_statistics`.

    ::

        mean     = shift + mean_ss / counts
        variance = max(variance_ss / counts - (mean_ss / counts)**2, 0)

    Parameters
    ----------
    counts : tensor that broadcasts to the sums
    mean_ss, variance_ss : tensors of one shape
    shift : tensor or None
        The shift that was taken from x. None means 0.
    name : str, optional

    Returns
    -------
    mean, variance : tensors of the dtype of `mean_ss`
        NaN where the count is 0.

    Notes
    -----
    As ``tf.nn.normalize_moments``, computed in float64 and held at 0.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> mean, variance = nn.normalize_moments(4, [8.0], [20.0], None)
    >>> mean.numpy(), variance.numpy()
    (array([2.], dtype=float32), array([1.], dtype=float32))
    """
    with tf.name_scope(name or "normalize"):
        sums = _functions.tensor_of("normalize_moments", "mean_ss", mean_ss)
        statistics = _functions.normalize_moments(counts, sums, variance_ss, shift)
        mean, variance = _as(sums, *statistics)
    return mean, variance


@unconverted
def batch_normalization(
    x: Any,
    mean: Any,
    variance: Any,
    offset: Any,
    scale: Any,
    variance_epsilon: Any,
    name: str | None = None,
) -> Any:
    """Normalize x by a mean and a variance of any shapes that broadcast.

    ::

        y = (x - mean) * scale / sqrt(variance + variance_epsilon) + offset

    Parameters
    ----------
    x : tensor of float16, bfloat16, float32 or float64
    mean, variance : tensor
        They broadcast against x: shape (C,) for the last axis, any shape with ``keepdims``. Where
        all parameters vary along one axis alone, one op does it all.
    offset, scale : tensor or None
        The same. None means 0 and 1.
    variance_epsilon : float, or scalar tensor
        Added to the variance. Where the sum is 0, y is offset.
    name : str, optional

    Returns
    -------
    y : tensor of the dtype of x and the broadcast shape

    Notes
    -----
    As ``tf.nn.batch_normalization``, but the mean is taken from x first: TensorFlow's
    ``x * inv + (offset - mean * inv)`` cancels where the mean is large.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> x = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    >>> mean, variance = nn.moments(x, axes=1, keepdims=True)
    >>> nn.batch_normalization(x, mean, variance, None, None, 0).numpy()
    array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """
    with tf.name_scope(name or "batchnorm"):
        return _functions.batch_normalization(x, mean, variance, offset, scale, variance_epsilon)


@unconverted
def batch_norm_with_global_normalization(
    input: Any = None,
    mean: Any = None,
    variance: Any = None,
    beta: Any = None,
    gamma: Any = None,
    variance_epsilon: Any = None,
    scale_after_normalization: Any = None,
    name: str | None = None,
    *,
    t: Any = None,
    m: Any = None,
    v: Any = None,
) -> Any:
    """Normalize by given statistics; TensorFlow's oldest name for it.

    ::

        y = (input - mean) * gamma / sqrt(variance + variance_epsilon) + beta

    Parameters
    ----------
    input, mean, variance, beta, gamma, variance_epsilon
        The x, mean, variance, offset, scale and variance_epsilon of :func:`batch_normalization`.
    scale_after_normalization : bool
        Whether `gamma` is used.
    name : str, optional
    t, m, v
        The names of `input`, `mean` and `variance` in ``tf.compat.v1.nn``.

    Returns
    -------
    y : tensor of the dtype of `input`

    Notes
    -----
    As ``tf.nn.batch_norm_with_global_normalization``.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import nn
    >>> x, one = tf.ones([1, 1, 1, 2]), tf.ones(2)
    >>> nn.batch_norm_with_global_normalization(x, one * 0, one, one, one * 3, 0, True).numpy()
    array([[[[4., 4.]]]], dtype=float32)
    """
    operation = "batch_norm_with_global_normalization"

    def either(argument: str, new: Any, alias: str, old: Any) -> Any:
        if new is not None and old is not None:
            expected = f"be left out, since `{argument}` is given"
            _spec.fail(ValueError, operation, alias, expected, "both")
        return old if new is None else new

    with tf.name_scope(name or "batchnorm"):
        return _functions.batch_norm_with_global_normalization(
            either("input", input, "t", t),
            either("mean", mean, "m", m),
            either("variance", variance, "v", v),
            beta,
            gamma,
            variance_epsilon,
            scale_after_normalization,
        )
