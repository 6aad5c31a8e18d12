"""Flax NNX's layer, ``flax.nnx.BatchNorm``, on this library's kernels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fusebn import _spec
from fusebn.jax import _flax

try:
    from flax import nnx
    from flax.nnx.nn import dtypes, initializers
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    _spec.missing("fusebn.jax.nnx", "flax")

__all__ = ["BatchNorm"]

Array = Any
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class BatchNorm(nnx.BatchNorm):
    """``flax.nnx.BatchNorm``, and what surrounds it in the same pass.

    ::

        y = activation((x - mean) / sqrt(variance + epsilon) * scale + bias + residual)

    Unless the running averages are used, mean and variance are the batch's,
    ``variance = m2 / n`` with m2 the sum of squared distances from the mean, and the averages move
    towards them::

        self.mean = momentum * self.mean + (1 - momentum) * mean
        self.var  = momentum * self.var  + (1 - momentum) * m2 / (n - correction)

    It is a subclass of Flax's layer, with its variables, so that to import this one instead is to
    migrate, and a state goes from either to the other.

    Parameters
    ----------
    num_features : int
        Number of features: the product of their lengths if `axis` names several axes.
    use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale
        As in ``flax.nnx.BatchNorm``. Of `axis` there may be several.
    bias_init, scale_init, axis_name, axis_index_groups, promote_dtype, rngs, bias_metadata
        As in ``flax.nnx.BatchNorm``.
    scale_metadata
        As in ``flax.nnx.BatchNorm``.
    use_fast_variance : bool
        Chooses nothing: the variance here is both fast and exact.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied to the result.
    correction : float
        0 as Flax has it; 1 averages the unbiased variance. Where n is not above it, the divisor is
        n.
    nonfinite : "propagate" or "skip"
        What a NaN or an infinity in a channel does to that channel's running averages: it gets into
        them, as in Flax, or they stay as they are. It touches no other channel in any case.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit, here or in a call; in compiled code when it is traced.

    Notes
    -----
    See :class:`fusebn.jax.linen.BatchNorm` for what both layers share.

    `promote_dtype` makes x, scale and bias of one type, as in Flax, but the running averages go on
    as they are: a mean rounded to bfloat16 is off by as much as 0.4 %.

    As ``flax.nnx.BatchNorm``:
    https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import fusebn.jax.nnx
    >>> from flax import nnx
    >>> layer = fusebn.jax.nnx.BatchNorm(2, activation="relu", momentum=0.5, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> bool((y[:, 0] > 0.99).tolist() == [False, True])
    True
    >>> layer.mean[...].tolist()
    [1.0, 2.5]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Any = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = initializers.zeros_init(),  # noqa: B008
        scale_init: Any = initializers.ones_init(),  # noqa: B008
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: Any,
        bias_metadata: Mapping[str, Any] = _NOTHING,
        scale_metadata: Mapping[str, Any] = _NOTHING,
        activation: str | None = None,
        correction: float = 0,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.correction = correction
        self.nonfinite = nonfinite
        _flax.check(_flax.layer_of(self))

    def __call__(
        self,
        x: Array,
        use_running_average: Any = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x, use_running_average, mask, residual
            As in :meth:`fusebn.jax.linen.BatchNorm.__call__`; the switch of the call goes before
            that of the layer.

        Returns
        -------
        y : array of the shape of x
            Of the type `dtype`, or that of x and the parameters together.
        """
        layer = _flax.layer_of(self)
        x = jnp.asarray(x)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None or jnp.iscomplexobj(x):
            # Flax's to do, or its error.
            _flax.check_plain(layer, x, residual)
            return super().__call__(x, use_running_average, mask=mask)
        use_running_average = _flax.flag(use_running_average)
        mean, var = self.mean[...], self.var[...]
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        y, *new = _flax.normalize(
            layer,
            x,
            scale,
            bias,
            mean,
            var,
            use_running_average,
            mask=mask,
            residual=residual,
            dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        if use_running_average is not True:
            self.mean[...], self.var[...] = map(jax.lax.stop_gradient, new)
        return y
