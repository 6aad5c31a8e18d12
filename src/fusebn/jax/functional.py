"""`batch_norm`: what layers are made of, across devices too."""

from functools import partial
from typing import Any

from fusebn import _spec
from fusebn._results import FusedBatchNorm
from fusebn.jax import _ops, _synchronized
from fusebn.jax._arguments import array_of
from fusebn.jax._functions import canonical

Array = Any


def batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any,
    variance: Any,
    *,
    is_training: Any = True,
    axis: Any = -1,
    epsilon: Any = 1e-3,
    exponential_avg_factor: Any = 1.0,
    activation: Any = None,
    residual: Any = None,
    weights: Any = None,
    correction: Any = 1,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> FusedBatchNorm:
    """Normalize a batch of which every device, or every lane of a ``vmap``, may hold a part.

        y = activation((x - m) / sqrt(v + epsilon) * scale + offset + residual)

    where m and v are the mean and biased variance of the whole batch, or, without training, the
    given ones. It is :func:`fusebn.fused_batch_norm` with another order of arguments, and with
    `axis_name`.

    Parameters
    ----------
    x : jax.Array
        The part of the batch that is here: float16, bfloat16, float32 or float64, any rank.
    scale, offset : array or None
        [channels], of float32 (float64 if x is); None is 1 and 0.
    mean, variance : array or None
        The given statistics, [channels]: read without training, and where
        `exponential_avg_factor` is not 1. None where they are not read.
    is_training : bool or boolean scalar
        Whether the batch's statistics normalize. A traced one is compiled once for both values, and
        wants `mean` and `variance`.
    axis : int
        The channel axis.
    epsilon : float
        Added to the variance.
    exponential_avg_factor : float
        The weight of the batch's statistics in the returned ones, ``1 - decay``: with the moving
        statistics given, the returned ones are the updated.
    activation : str or None
        "relu", "relu6", "leaky_relu", "silu" or "gelu", of the sum.
    residual : jax.Array or None
        Of the shape and dtype of x; None is 0.
    weights : array or None
        One for each position, not negative: of the shape of x with 1 for channels, or without that
        axis; or what broadcasts to these. Positions of weight 0 are left out of the statistics,
        whatever x holds there. None is 1.
    correction : float
        Returned variances have the divisor ``count - correction``; ``count`` where that is not
        above 0. v has the divisor count.
    axis_name : str, tuple of str, or None
        The named axes of ``shard_map``, ``pmap`` or ``vmap`` along which the batch is divided. The
        parts are merged with their counts (Chan, Golub, LeVeque, 1983), so any sizes and weights
        come out as in one piece. None: the batch is here.
    axis_index_groups : list of lists of int, or None
        As in ``jax.lax.psum``: the devices that have a batch together; None is all.

    Returns
    -------
    FusedBatchNorm
        y, of the dtype of x, and the statistics ``mean`` and ``variance``. A batch of count 0 has
        none: NaN, or the given ones where the factor is not 1; y is then
        ``activation(offset + residual)``.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value, when the function is traced.

    Notes
    -----
    A negative given variance, and a weight that is negative or not finite, are found when the
    program runs, on a CPU, as an error of the runtime. Elsewhere they give NaN.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import fusebn.jax as fbj
    >>> x = jnp.array([[[1.0], [2.0]], [[3.0], [6.0]]])  # two parts of a batch of four
    >>> def part(x):
    ...     return fbj.batch_norm(x, None, None, None, None, axis_name="parts").mean
    >>> jax.vmap(part, axis_name="parts")(x).tolist()
    [[3.0], [3.0]]
    """
    operation = "batch_norm"
    x = array_of(operation, "x", x)
    axis = _spec.axis_of(operation, "axis", axis, x.shape)
    arguments: Any = canonical(
        operation, x, scale, offset, mean, variance, residual, weights, is_training, axis,
        epsilon, correction, exponential_avg_factor, activation,
    )  # fmt: skip
    together = axis_name is not None and is_training is not False
    if axis_index_groups is not None and axis_name is None:
        expected = "be None without `axis_name`"
        _spec.fail(ValueError, operation, "axis_index_groups", expected, repr(axis_index_groups))
    compute: Any = _ops.batch_norm
    if together:
        group = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        compute = partial(_synchronized.batch_norm, **group)
    found = compute(*arguments)
    return FusedBatchNorm(found.y, found.mean, found.variance)
