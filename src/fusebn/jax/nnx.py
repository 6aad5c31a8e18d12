"""Flax NNX's layer, ``flax.nnx.BatchNorm``, on this library's kernels."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fusebn import _spec
from fusebn.jax import _flax
from fusebn.jax._transformed import Transformation, negated

try:
    from flax import nnx
    from flax.nnx.nn import dtypes, initializers

    from fusebn.jax._nnx_quantize import FakeQuantize
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    _spec.missing("fusebn.jax.nnx", "flax")

__all__ = ["BatchNorm", "FakeQuantize"]

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
    transforms, transforms_active, transform_batch_statistics
        As in :class:`fusebn.jax.linen.BatchNorm`. Transforms may be modules of NNX, whose variables
        are then the layer's too. `transforms_active` may also be an ``nnx.Variable``: that, or an
        array, must come here if it is not to stay a bool, which NNX takes as a constant.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit, here or in a call; in compiled code when it is traced. A transform
        that changes the shape; or that returns NaN for what has none, outside of compiled code.

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
        transforms: Mapping[str, Callable[..., Any]] | None = None,
        transforms_active: Any = True,
        transform_batch_statistics: bool = False,
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
        # A module's variables are found in a module, which a plain mapping is not.
        checked = _flax.checked_transforms(transforms)
        self.transforms = nnx.Dict(checked) if checked else None
        self.transforms_active = transforms_active
        self.transform_batch_statistics = transform_batch_statistics
        _flax.check(_flax.layer_of(self))
        self._transformation(None)

    def __call__(
        self,
        x: Array,
        use_running_average: Any = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
        transforms_active: Any = None,
    ) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x, use_running_average, mask, residual, transforms_active
            As in :meth:`fusebn.jax.linen.BatchNorm.__call__`; the switches of the call go before
            those of the layer.

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
            _flax.check_plain(layer, x, residual, self.transforms)
            return super().__call__(x, use_running_average, mask=mask)
        use_running_average = _flax.flag(use_running_average)
        scale, bias, mean, var = self._variables()
        transformation = self._transformation(transforms_active)
        training = negated(use_running_average)
        scale, bias = transformation.of_parameters(scale, bias, training)
        x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        y, *new = _flax.normalize(
            layer,
            transformation,
            x,
            scale,
            bias,
            mean,
            var,
            training,
            mask=mask,
            residual=residual,
            dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        if use_running_average is not True:
            self.mean[...], self.var[...] = map(jax.lax.stop_gradient, new)
        return y

    def effective_variables(self) -> dict[str, Any]:
        """Return what normalizes in inference: the variables, as the transforms have them.

        Returns
        -------
        dict
            ``scale`` and ``offset``, None where the layer has none, ``mean``, ``variance``, of
            shape (num_features,); and ``epsilon``.
        """
        return _flax.effective(self._transformation(None), self.epsilon, *self._variables())

    def _variables(self) -> tuple[Array | None, Array | None, Array, Array]:
        scale, bias = (None if v is None else v[...] for v in (self.scale, self.bias))
        return scale, bias, self.mean[...], self.var[...]

    def _transformation(self, active: Any) -> Transformation:
        if active is None:
            active = self.transforms_active
        if isinstance(active, nnx.Variable):
            active = active[...]
        return _flax.transformation_of(self, active)
