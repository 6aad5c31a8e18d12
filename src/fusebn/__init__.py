"""Batch normalization, written once and written right.

Arrays in, arrays out: every function takes the arrays of its framework and finds the framework by
the type of its first argument. Words mean the same everywhere: `scale` and `offset` are the
parameters, `epsilon` is added to the variance, `decay` is the weight of the old value of a moving
average and `factor` that of the new one, `correction` is what is taken from n in a divisor.
"""

import os as _os
from collections.abc import Mapping as _Mapping
from importlib.metadata import version as _version
from typing import Any as _Any

from fusebn import _core, _spec, memory, quantize
from fusebn._dispatch import adapter_of as _adapter_of
from fusebn._folding import fold as _fold
from fusebn._info import cache_share as _cache_share
from fusebn._info import info as _info
from fusebn._info import physical_memory as _physical_memory
from fusebn._layer import BatchNorm
from fusebn._moments import Moments
from fusebn._results import FusedBatchNorm, FusedBatchNormGrad
from fusebn._store import load as _load
from fusebn._store import save as _save

__all__ = [
    "BatchNorm",
    "FusedBatchNorm",
    "FusedBatchNormGrad",
    "Moments",
    "assign_moving_average",
    "batch_norm_with_global_normalization",
    "batch_normalization",
    "fold",
    "fused_batch_norm",
    "fused_batch_norm_grad",
    "get_num_threads",
    "info",
    "load",
    "memory",
    "moments",
    "normalize_moments",
    "quantize",
    "save",
    "set_num_threads",
    "sufficient_statistics",
    "weighted_moments",
]

__version__ = _version("fusebn")


def moments(
    x: _Any, axes: _Any, *, weights: _Any = None, keepdims: bool = False
) -> tuple[_Any, _Any]:
    """Return the mean and the biased variance of x over `axes`.

    ::

        mean     = sum(w * x) / sum(w)
        variance = sum(w * (x - mean)**2) / sum(w)

    in one pass over x, and without cancellation: a mean far from 0 costs no digits, and the
    variance is never negative.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Any shape and memory order. Not modified.
    axes : int, ints or None
        The axes to reduce, any set of them; None means all. ``[0, 1, 2]`` of an NHWC array gives
        the statistics of batch norm.
    weights : array, optional
        One non-negative real for each reduced position: its shape broadcasts to that of the
        reduced axes. A position of weight 0 is left out, even if it holds NaN. None means 1.
    keepdims : bool
        Keep the reduced axes with length 1.

    Returns
    -------
    mean, variance : arrays of float32, or float64 if x is
        Both NaN where nothing is counted (x empty, or all weights 0) and where a channel holds a
        NaN or an infinity.

    Raises
    ------
    TypeError
        x is no array of a floating type.
    ValueError
        An axis is out of range or named twice; the weights are negative or of another shape.

    See Also
    --------
    Moments : what can be merged, and has any divisor.

    Notes
    -----
    As ``tf.nn.moments``, https://www.tensorflow.org/api_docs/python/tf/nn/moments, but statistics
    of 16-bit arrays stay float32: the variance of a float16 array may exceed 65504. Squares are
    summed in the type of the statistics: float32 values of one channel more than 1e17 apart
    overflow, and the variance is then infinite, or NaN where the distances overflow as well.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0, 542.37], [3.0, 542.37]], dtype="float32")
    >>> fusebn.moments(x, axes=0)
    (array([  2.  , 542.37], dtype=float32), array([1., 0.], dtype=float32))
    >>> mean, variance = fusebn.moments(np.zeros((128, 32, 32, 64), "float32"), axes=[0, 1, 2])
    >>> mean.shape, variance.shape
    ((64,), (64,))
    """
    adapter = _adapter_of("moments", x)
    result: tuple[_Any, _Any] = adapter.moments(x, axes, weights=weights, keepdims=keepdims)
    return result


def weighted_moments(
    x: _Any, axes: _Any, frequency_weights: _Any, keepdims: bool = False
) -> tuple[_Any, _Any]:
    """Return the weighted mean and biased variance of x over `axes`.

    As :func:`moments`, but the weights broadcast against x itself, and may differ between the
    channels, too.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
    axes : int, ints or None
        The axes to reduce; None means all.
    frequency_weights : array
        Non-negative reals; the shape broadcasts to that of x. Positions of weight 0 are left out.
    keepdims : bool
        Keep the reduced axes with length 1.

    Returns
    -------
    mean, variance : arrays of float32, or float64 if x is
        NaN where all weights are 0 (TensorFlow says 0 there).

    Raises
    ------
    TypeError, ValueError
        As :func:`moments`.

    Notes
    -----
    As ``tf.nn.weighted_moments``. Weights that are the same for all channels take the fast way;
    others need a few arrays as large as x in float64.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    >>> fusebn.weighted_moments(x, 0, np.array([[1.0], [3.0], [0.0]]))
    (array([2.5, 3.5]), array([0.75, 0.75]))
    """
    adapter = _adapter_of("weighted_moments", x)
    result: tuple[_Any, _Any] = adapter.weighted_moments(x, axes, frequency_weights, keepdims)
    return result


def sufficient_statistics(
    x: _Any, axes: _Any, shift: _Any = None, keepdims: bool = False
) -> tuple[_Any, _Any, _Any, _Any]:
    """Return the sums that mean and variance can be computed from.

    ::

        count       = number of elements reduced
        mean_ss     = sum(x - shift)
        variance_ss = sum((x - shift)**2)

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
    axes : int, ints or None
        The axes to reduce; None means all.
    shift : array, optional
        A value near the mean, so that the sums carry the variance; it broadcasts to the shape of
        the mean with the reduced axes kept. None means 0.
    keepdims : bool
        Keep the reduced axes with length 1.

    Returns
    -------
    count, mean_ss, variance_ss : arrays of float32, or float64 if x is
    shift : as given

    Raises
    ------
    TypeError, ValueError
        As :func:`moments`; or the shift does not broadcast.

    Notes
    -----
    As ``tf.nn.sufficient_statistics``. Sums of squares lose the variance where the mean is large
    and the shift is not near it: :class:`Moments` has no such trap.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> statistics = fusebn.sufficient_statistics(x, 0, shift=np.array([2.0, 4.0]))
    >>> statistics[:3]
    (array(2.), array([0., 0.]), array([2., 8.]))
    >>> fusebn.normalize_moments(*statistics)
    (array([2., 4.]), array([1., 4.]))
    """
    adapter = _adapter_of("sufficient_statistics", x)
    result: tuple[_Any, _Any, _Any, _Any] = adapter.sufficient_statistics(x, axes, shift, keepdims)
    return result


def normalize_moments(
    counts: _Any, mean_ss: _Any, variance_ss: _Any, shift: _Any
) -> tuple[_Any, _Any]:
    """Return mean and biased variance, given the sums of :func:`sufficient_statistics`.

    ::

        mean     = shift + mean_ss / counts
        variance = max(variance_ss / counts - (mean_ss / counts)**2, 0)

    Parameters
    ----------
    counts : real, or array that broadcasts to the sums
    mean_ss, variance_ss : arrays of one shape
    shift : array or None
        The shift that was taken from x. None means 0.

    Returns
    -------
    mean, variance : arrays of float32, or float64 if `mean_ss` is
        NaN where the count is 0.

    Raises
    ------
    TypeError, ValueError
        The sums have no floating type, or different shapes; a count is negative.

    Notes
    -----
    As ``tf.nn.normalize_moments``, computed in float64 and held at 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> fusebn.normalize_moments(4, np.array([8.0]), np.array([20.0]), None)
    (array([2.]), array([1.]))
    """
    adapter = _adapter_of("normalize_moments", mean_ss, "mean_ss")
    result: tuple[_Any, _Any] = adapter.normalize_moments(counts, mean_ss, variance_ss, shift)
    return result


def batch_normalization(
    x: _Any, mean: _Any, variance: _Any, offset: _Any, scale: _Any, variance_epsilon: _Any
) -> _Any:
    """Normalize x by a mean and a variance of any shapes that broadcast.

    ::

        y = (x - mean) * scale / sqrt(variance + variance_epsilon) + offset

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Not modified.
    mean, variance : array
        They broadcast against x: shape (C,) for the last axis, any shape with ``keepdims``.
    offset, scale : array or None
        The same. None means 0 and 1, without the arithmetic.
    variance_epsilon : float
        Added to the variance; not negative. Where the sum is 0, y is offset.

    Returns
    -------
    y : array of the dtype of x and the broadcast shape

    Raises
    ------
    TypeError, ValueError
        An argument has no floating type or does not broadcast; a variance is negative.

    Notes
    -----
    As ``tf.nn.batch_normalization``, but the mean is taken from x first: TensorFlow's
    ``x * inv + (offset - mean * inv)`` cancels where the mean is large.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
    >>> mean, variance = fusebn.moments(x, axes=1, keepdims=True)
    >>> fusebn.batch_normalization(x, mean, variance, None, None, 0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return _adapter_of("batch_normalization", x).batch_normalization(
        x, mean, variance, offset, scale, variance_epsilon
    )


def batch_norm_with_global_normalization(
    input: _Any,
    mean: _Any,
    variance: _Any,
    beta: _Any,
    gamma: _Any,
    variance_epsilon: _Any,
    scale_after_normalization: bool,
) -> _Any:
    """Normalize by given statistics; TensorFlow's oldest name for it.

    ::

        y = (input - mean) * gamma / sqrt(variance + variance_epsilon) + beta

    Parameters
    ----------
    input, mean, variance, beta, gamma, variance_epsilon
        The x, mean, variance, offset, scale and variance_epsilon of :func:`batch_normalization`.
    scale_after_normalization : bool
        Whether `gamma` is used.

    Returns
    -------
    y : array of the dtype of `input`

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_normalization`.

    Notes
    -----
    As ``tf.nn.batch_norm_with_global_normalization``.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.ones((1, 1, 1, 2))
    >>> one = np.ones(2)
    >>> fusebn.batch_norm_with_global_normalization(x, one * 0, one, one, one * 3, 0, True)
    array([[[[4., 4.]]]])
    """
    adapter = _adapter_of("batch_norm_with_global_normalization", input, "input")
    return adapter.batch_norm_with_global_normalization(
        input, mean, variance, beta, gamma, variance_epsilon, scale_after_normalization
    )


def fused_batch_norm(
    x: _Any,
    scale: _Any,
    offset: _Any,
    mean: _Any = None,
    variance: _Any = None,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: _Any = True,
    exponential_avg_factor: float = 1.0,
    *,
    axis: int | None = None,
    activation: str | None = None,
    residual: _Any = None,
    weights: _Any = None,
    correction: float = 1,
    out: _Any = None,
) -> FusedBatchNorm:
    """Normalize each channel of x, and what surrounds it, in as few passes as there can be.

    ::

        y = activation((x - m) * scale / sqrt(v + epsilon) + offset + residual)

    In training m and v are the batch's: ``m = sum(w * x) / n``, ``v = sum(w * (x - m)**2) / n``,
    ``n = sum(w)``. Otherwise they are the given `mean` and `variance`.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Any memory order. Not modified, unless it is `out`.
    scale, offset : array of shape (channels,), or None
        None means 1 and 0, without the arithmetic.
    mean, variance : array of shape (channels,), or None
        The moving statistics: needed in inference, and in training if `exponential_avg_factor` is
        not 1; ignored in training if it is.
    epsilon : float
        Added to the variance; not negative.
    data_format : str
        Where the channels are: "NHWC", "NCHW", "NDHWC", "NCDHW", "NWC", "NCW" or "NC".
    is_training : bool, or boolean array of rank 0
        Whether the batch's statistics normalize x, or the given ones.
    exponential_avg_factor : float in [0, 1]
        Weight of the batch in the statistics returned: ``(1 - f) * given + f * batch``.
    axis : int, optional
        The channel axis, for any rank; it overrides `data_format`.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        leaky_relu has slope 0.01 below 0; gelu is the exact one, ``z * Phi(z)``.
    residual : array of the shape and dtype of x, optional
        Added before the activation.
    weights : array, optional
        One non-negative real for each position, in the shape of x without the channel axis (or
        with length 1 there), or broadcasting to it. They weigh the statistics; a position of
        weight 0 is left out of them, even if it holds NaN, but is normalized like any other. None
        means 1.
    correction : float
        The variance returned is ``sum(w * (x - m)**2) / (n - correction)``: 1 is TensorFlow's, 0
        the biased one. Where n is not above it the divisor is n: a single element has variance 0.
    out : array of the shape and dtype of x, optional
        Where y is written. It may be x.

    Returns
    -------
    y : array of the shape and dtype of x
    mean, variance : array of shape (channels,), float32 or float64 if x is
        In training the batch's statistics, mixed into the given ones if the factor is not 1; in
        inference copies of the given ones. Together with y a named tuple. With `correction` 1 this
        variance is not the one that normalized x, which :func:`fused_batch_norm_grad` takes.

    Raises
    ------
    TypeError
        An argument is of the wrong kind: x is no floating array, `data_format` no string.
    ValueError
        An argument has the wrong value or shape: see the message. Nothing has been written.

    Notes
    -----
    As ``tf.compat.v1.nn.fused_batch_norm``; the arguments after the star are ours.

    In training y is always normalized with the divisor n, as everywhere. A batch with one element
    a channel gives y = activation(offset) and variance 0. An empty batch, or one whose weights are
    all 0, gives NaN for the statistics, or the given ones unchanged where the factor is not 1; y is
    then empty, or activation(offset + residual). A NaN or an infinity makes both statistics NaN, in
    its own channel only. Where variance + epsilon is 0, y is activation(offset + residual).

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
    >>> y, mean, variance = fusebn.fused_batch_norm(x, None, None, epsilon=0.25, data_format="NC")
    >>> mean, variance
    (array([ 2., 10.]), array([2., 0.]))
    >>> y.round(4)
    array([[-0.8944,  0.    ],
           [ 0.8944,  0.    ]])

    Inference, with ReLU in the same pass:

    >>> fusebn.fused_batch_norm(
    ...     x, None, None, mean, variance, data_format="NC", is_training=False, activation="relu"
    ... ).y.round(4)
    array([[0.    , 0.    ],
           [0.7069, 0.    ]])
    """
    result: FusedBatchNorm = _adapter_of("fused_batch_norm", x).fused_batch_norm(
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        exponential_avg_factor,
        axis=axis,
        activation=activation,
        residual=residual,
        weights=weights,
        correction=correction,
        out=out,
    )
    return result


def fused_batch_norm_grad(
    dy: _Any,
    x: _Any,
    scale: _Any,
    offset: _Any,
    mean: _Any,
    variance: _Any,
    epsilon: float = 0.001,
    data_format: str = "NHWC",
    is_training: _Any = True,
    *,
    axis: int | None = None,
    activation: str | None = None,
    residual: _Any = None,
    weights: _Any = None,
    dmean: _Any = None,
    dvariance: _Any = None,
) -> FusedBatchNormGrad:
    """Return the gradients of :func:`fused_batch_norm`, given that of its y.

    With ``xhat = (x - mean) / sqrt(variance + epsilon)``, ``a = scale / sqrt(variance + epsilon)``
    and ``g = dy * activation'(xhat * scale + offset + residual)``::

        dscale    = sum(g * xhat)          doffset = sum(g)          dresidual = g
        dx        = a * (g - w / n * (sum(g) + xhat * sum(g * xhat)))            in training
                  + w / n * (dmean + 2 * (x - mean) * dvariance)
        dx        = a * g                                                        otherwise

    Parameters
    ----------
    dy : array of the shape and dtype of x
    x, scale, offset, epsilon, data_format, is_training, axis, activation, residual, weights
        As they were given to :func:`fused_batch_norm`.
    mean, variance : array of shape (channels,)
        What normalized x: in training the batch's mean and its **biased** variance (divisor n, as
        :func:`moments` returns it), in inference the given ones. Pass them in float64 to keep the
        digits that float32 drops.
    dmean, dvariance : array of shape (channels,), optional
        Gradients that flow into the batch's mean and biased variance from elsewhere. None means 0.

    Returns
    -------
    dx : array of the shape and dtype of x
    dscale, doffset : array of shape (channels,), float32 or float64 if x is
        None where scale or offset is None.
    dresidual : array of the shape and dtype of x
        None where residual is None.

    Raises
    ------
    TypeError, ValueError
        As :func:`fused_batch_norm`.

    Notes
    -----
    The activation's input is computed again from x, not stored. The derivative of relu and relu6
    at 0 is 0. Two passes over dy and x in training; one in inference.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> mean, variance = fusebn.moments(x, axes=0)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dscale, doffset, _ = fusebn.fused_batch_norm_grad(
    ...     dy, x, np.ones(1), np.zeros(1), mean, variance, epsilon=0, data_format="NC"
    ... )
    >>> dx.round(4).ravel(), dscale.round(4), doffset
    (array([ 0.1763, -0.2204,  0.0441]), array([-0.9258]), array([1.]))
    """
    result: FusedBatchNormGrad = _adapter_of("fused_batch_norm_grad", x).fused_batch_norm_grad(
        dy,
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        axis=axis,
        activation=activation,
        residual=residual,
        weights=weights,
        dmean=dmean,
        dvariance=dvariance,
    )
    return result


def assign_moving_average(
    variable: _Any, value: _Any, decay: float, zero_debias: bool = False
) -> _Any:
    """Update a moving average in place.

    ::

        variable = decay * variable + (1 - decay) * value

    Parameters
    ----------
    variable : array of float16, bfloat16, float32 or float64
        Changed in place.
    value : array of the same shape
    decay : float in [0, 1]
        Weight of the old value.
    zero_debias : bool
        Weigh the t-th update of this array by ``(1 - decay) / (1 - decay**t)`` instead of
        ``1 - decay``: the average divided by the sum of its weights, in which the array's first
        content has no part. The updates are counted for each array object.

    Returns
    -------
    variable : the array itself

    Raises
    ------
    TypeError, ValueError
        The array is read-only or has no floating type, the shapes differ, the decay is out of
        range; or with zero_debias the array is a view, or the decay 1. Nothing has changed.

    Notes
    -----
    As ``tf.python.training.moving_averages.assign_moving_average``, whose ``zero_debias`` is True
    unless said otherwise. The correction is that of Kingma and Ba, "Adam", 2015, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> average = np.array([0.0, 10.0])
    >>> fusebn.assign_moving_average(average, np.array([1.0, 20.0]), decay=0.9)
    array([ 0.1, 11. ])
    """
    adapter = _adapter_of("assign_moving_average", variable, "variable")
    return adapter.assign_moving_average(variable, value, decay, zero_debias)


def fold(
    weight: _Any,
    bias: _Any,
    layer: _Any,
    *,
    kind: str,
    layout: str = "torch",
    groups: int = 1,
    before: bool = False,
    padded: bool | str | None = None,
) -> tuple[_Any, _Any]:
    """Return the weight and bias of a linear layer that has taken over the batch norm beside it.

    In inference a batch norm is affine, one factor and one shift a channel. With
    ``factor = scale / sqrt(variance + epsilon)``, 0 where that sum is 0, and o and i for the
    channels out and in::

        linear, then norm   weight[o, i] * factor[o]
                            (bias[o] - mean[o]) * factor[o] + offset[o]
        norm, then linear   weight[o, i] * factor[i]
                            bias[o] + sum(weight[o, i] * (offset[i] - mean[i] * factor[i]))

    the last sum over i and the taps of the kernel.

    Parameters
    ----------
    weight : array of float16, bfloat16, float32 or float64
        Of any framework, or a variable of Keras or Flax; not modified.
    bias : array of shape (channels out,), or None
        None means 0. A bias is returned all the same.
    layer : batch norm, or mapping
        What normalizes in inference: a layer of this library, of PyTorch, Keras or Flax's nnx; or
        a mapping of ``"mean"`` (or ``"moving_mean"``), ``"variance"`` (or ``"moving_variance"``),
        ``"epsilon"``, and, where there are any, ``"scale"`` and ``"offset"``. A layer that has a
        method ``effective_variables()`` is asked for such a mapping: there its transforms have
        been applied.
    kind : "dense", "conv", "depthwise_conv" or "conv_transpose"
        Convolutions have kernels of any rank.
    layout : "torch", "tensorflow" (also "keras") or "flax"
        How the axes of the weight are ordered, ``*k`` being the kernel's:

        ================  ========================  ========================  ====================
        kind              torch                     tensorflow                flax
        ================  ========================  ========================  ====================
        dense             [out, in]                 [in, out]                 [in, out]
        conv              [out, in / groups, *k]    [*k, in / groups, out]    [*k, in / groups, out]
        depthwise_conv    (conv, groups = in)       [*k, in, multiplier]      (conv, groups = in)
        conv_transpose    [in, out / groups, *k]    [*k, out / groups, in]    [*k, in / groups, out]
        ================  ========================  ========================  ====================

        Flax's ``ConvTranspose(transpose_kernel=True)`` has the layout of TensorFlow.
    groups : int
        Of the convolution, transposed ones too. "depthwise_conv" has one for each channel in.
    before : bool
        Whether the batch norm comes before the linear layer. Folding is exact only where every
        output sees the whole kernel; so a transposed convolution is refused, unless nothing is
        shifted.
    padded : bool or "inexact", optional
        Needed for a convolution with a batch norm before it: whether zeros are padded around what
        the batch norm returns. True is refused, unless nothing is shifted: padded after the batch
        norm, the zeros are not shifted, after folding they are, and the border is wrong. "inexact"
        folds all the same. Padding by reflection, or by what is at the border, is none: False.

    Returns
    -------
    weight, bias : arrays of the framework, dtype and device of `weight`
        Computed in float64, rounded once. Plain values: no gradient flows through them.

    Raises
    ------
    TypeError
        An argument is of the wrong kind.
    ValueError
        The channels do not match; a variance is negative, or a variable of the layer is not
        finite; folding is not exact; the layer has an activation, which would be lost; the dtype
        of the weight cannot hold what it becomes.

    Notes
    -----
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
    Only Inference", 2018, https://arxiv.org/abs/1712.05877, section 3.2. PyTorch has
    ``torch.nn.utils.fusion`` for the first direction.

    Examples
    --------
    >>> import numpy as np
    >>> import fusebn
    >>> rng = np.random.default_rng(0)
    >>> x, kernel = rng.normal(size=(5, 3)), rng.normal(size=(3, 2))
    >>> layer = {"mean": np.ones(2), "variance": np.full(2, 4.0), "epsilon": 0}
    >>> folded, bias = fusebn.fold(kernel, None, layer, kind="dense", layout="tensorflow")
    >>> np.allclose(x @ folded + bias, (x @ kernel - 1) / 2)
    True
    """
    return _fold(
        weight,
        bias,
        layer,
        kind=kind,
        layout=layout,
        groups=groups,
        before=before,
        padded=padded,
    )


def save(path: str | _os.PathLike[str], layers: _Mapping[str, _Any]) -> None:
    """Write layers and arrays into one safetensors file, whole or not at all.

    The file is written under another name, flushed to the disk and then renamed: a crash at any
    time leaves the old file or the new one.

    Parameters
    ----------
    path : path
        Overwritten if it exists.
    layers : mapping
        Names to :class:`BatchNorm` layers, or to NumPy arrays (a network's other weights).

    Raises
    ------
    TypeError, ValueError
        A value is neither, or two of them would get the same name in the file.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import fusebn, os, tempfile
    >>> layer = fusebn.BatchNorm(3, decay=0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     fusebn.save(path, {"bn": layer})
    ...     fusebn.load(path)["bn"].decay
    0.9
    """
    _save(path, layers)


def load(path: str | _os.PathLike[str]) -> dict[str, _Any]:
    """Read what :func:`save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        Names to layers, made anew with their state, and to arrays.

    Raises
    ------
    ValueError
        The file is damaged, or was not written by :func:`save`.
    OSError
        The file cannot be read.

    Examples
    --------
    See :func:`save`.
    """
    return _load(path)


def info() -> dict[str, _Any]:
    """Return what runs here.

    Returns
    -------
    dict
        ``version``; ``instruction_set`` in use and ``instruction_sets`` this machine can run;
        ``threads``; ``caches``, bytes of the data caches; ``frameworks``, for each its installed
        ``version`` (None if missing) and the ``support`` this version has for it.

    Examples
    --------
    >>> import fusebn
    >>> fusebn.info()["frameworks"]["numpy"]["support"]
    'native kernels'
    """
    return _info()


def get_num_threads() -> int:
    """Return how many threads share a call's work, the calling one included.

    At first ``FUSEBN_NUM_THREADS``, or as many as the cores this process may run on.

    Examples
    --------
    >>> import fusebn
    >>> fusebn.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def set_num_threads(count: int) -> None:
    """Set how many threads share a call's work, the calling one included.

    The results do not depend on it, not in one bit.

    Parameters
    ----------
    count : int
        At least 1, at most 1024.

    Raises
    ------
    TypeError, ValueError
        The count is no integer, or out of range.

    Examples
    --------
    >>> import fusebn
    >>> before = fusebn.get_num_threads()
    >>> fusebn.set_num_threads(1)
    >>> fusebn.get_num_threads()
    1
    >>> fusebn.set_num_threads(before)
    """
    _core.set_num_threads(_spec.positive_integer("set_num_threads", "count", count, most=1024))


def _read_environment() -> None:
    threads = _os.environ.get("FUSEBN_NUM_THREADS")
    if threads:
        if not threads.strip().isdecimal():
            expected = "be an integer"
            _spec.fail(ValueError, "import fusebn", "FUSEBN_NUM_THREADS", expected, repr(threads))
        count = _spec.positive_integer("import fusebn", "FUSEBN_NUM_THREADS", int(threads), 1024)
        _core.set_num_threads(count)
    pool = _os.environ.get("FUSEBN_POOL_BYTES", "").strip()
    if pool and not pool.isdecimal():
        expected = "be a number of bytes"
        _spec.fail(ValueError, "import fusebn", "FUSEBN_POOL_BYTES", expected, repr(pool))
    memory.set_limit(int(pool) if pool else _physical_memory() // 8)
    name = _os.environ.get("FUSEBN_INSTRUCTION_SET")
    if name and not _core.set_instruction_set(name):
        expected = f"be one of {', '.join(_core.instruction_sets())}, which this machine can run"
        _spec.fail(ValueError, "import fusebn", "FUSEBN_INSTRUCTION_SET", expected, repr(name))


if _share := _cache_share():
    _core.set_streaming_bytes(_share)
_read_environment()
