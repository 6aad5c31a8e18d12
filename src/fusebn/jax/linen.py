"""Flax Linen's layer, ``flax.linen.BatchNorm``, on this library's kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fusebn import _spec
from fusebn.jax import _flax
from fusebn.jax._transformed import negated

try:
    from flax import linen
    from flax.linen.dtypes import canonicalize_dtype

    from fusebn.jax._linen_quantize import FakeQuantize
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    _spec.missing("fusebn.jax.linen", "flax")

__all__ = ["BatchNorm", "FakeQuantize"]

Array = Any


class BatchNorm(linen.BatchNorm, kw_only=True):
    """``flax.linen.BatchNorm``, and what surrounds it in the same pass.

    ::

        y = activation((x - mean) / sqrt(variance + epsilon) * scale + bias + residual)

    Unless the running averages are used, mean and variance are the batch's,
    ``variance = m2 / n`` with m2 the sum of squared distances from the mean, and the averages in
    the collection ``batch_stats`` move towards them::

        mean = momentum * mean + (1 - momentum) * the batch's
        var  = momentum * var  + (1 - momentum) * m2 / (n - correction)

    It is a subclass of Flax's layer, with its name and variables, so that to import this one
    instead is to migrate, and a checkpoint goes from either to the other.

    Parameters
    ----------
    use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale
        As in ``flax.linen.BatchNorm``. Of `axis` there may be several.
    bias_init, scale_init, axis_name, axis_index_groups, force_float32_reductions
        As in ``flax.linen.BatchNorm``. The last is about the type of the running averages alone.
    use_fast_variance : bool
        Chooses nothing: the variance here is both fast and exact.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied to the result. By keyword, as all that follow.
    correction : float
        0 as Flax has it; 1 averages the unbiased variance. Where n is not above it, the divisor is
        n.
    nonfinite : "propagate" or "skip"
        What a NaN or an infinity in a channel does to that channel's running averages: it gets into
        them, as in Flax, or they stay as they are. It touches no other channel in any case.
    transforms : mapping, optional
        Functions of an array, by the name of the variable they apply to: "scale", "offset" (the
        bias), "moving_mean", "moving_variance". What they return normalizes in the variable's
        place; the variable stays as it is. A variance below 0 becomes 0. For instance
        ``{"scale": fusebn.quantize.FakeQuantize(8)}``, or the :class:`FakeQuantize` that is here.
    transforms_active : bool, or boolean array of rank 0
        Whether the transforms apply. It may be traced: then one compiled program serves both.
        Without them the results are those of a layer without transforms: bit for bit, except that
        XLA may round otherwise along `axis_name`, or where a mask differs between features.
    transform_batch_statistics : bool
        Whether, unless the running averages are used, the batch's mean and biased variance go
        through the transforms of the moving ones before they normalize x. The running averages take
        up the batch's own. It takes more passes over memory, in forward and in backward.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit, here or in a call; in compiled code when it is traced. A transform
        that changes the shape; or that returns NaN for what has none, outside of compiled code.

    Notes
    -----
    What Flax's layer does otherwise:

    - its variance is ``E[x^2] - E[x]^2`` by default, which loses its digits where the mean is
      large: of 1e4 and a variance of 1, it says 0 or 8. Here it is exact;
    - along `axis_name` it takes the mean of what the devices have, whatever their masks leave. Here
      every position of the whole batch counts the same;
    - a batch without any unmasked position makes its averages NaN. Here they stay as they are, and
      y is activation(bias + residual).

    The kernel computes in the wider of the types of x and y, and XLA casts the other. Where x is
    bfloat16 and the parameters float32, y is float32, as in Flax; pass ``dtype=jnp.bfloat16`` to
    spare that pass.

    A mask that differs between the features of a position, feature axes that are no neighbours, and
    devices other than a CPU take more passes over memory. Complex x is left to Flax's layer, and
    goes without what that does not have.

    As ``flax.linen.BatchNorm``:
    https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/layers.html

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import fusebn.jax.linen
    >>> layer = fusebn.jax.linen.BatchNorm(activation="relu", momentum=0.5)
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, updated = layer.apply(
    ...     variables, x, use_running_average=False, mutable=["batch_stats"]
    ... )
    >>> updated["batch_stats"]["mean"].tolist()
    [1.0, 2.5]
    """

    activation: str | None = None
    correction: float = 0
    nonfinite: str = "propagate"
    transforms: Mapping[str, Callable[..., Any]] | None = None
    transforms_active: Any = True
    transform_batch_statistics: bool = False

    @linen.compact
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
        x : array
            Of any rank; integers are taken as float32.
        use_running_average : bool, or boolean array of rank 0
            Whether the running averages normalize, and stay as they are. Either here or in the
            constructor. It may be traced: then one call serves both, and nothing is compiled twice.
        mask : boolean array, optional
            Broadcasts to x: the positions that count for mean and variance. All are normalized.
        residual : array of the shape of x, optional
            Added before the activation.
        transforms_active : bool, or boolean array of rank 0, optional
            Whether the transforms apply to this call. None: as the layer's says.

        Returns
        -------
        y : array of the shape of x
            Of the type `dtype`, or that of x and the parameters together.
        """
        layer = _flax.layer_of(self)
        _flax.check(layer)
        x = jnp.asarray(x)
        if jnp.iscomplexobj(x):
            _flax.check_plain(layer, x, residual, self.transforms)
            return super().__call__(x, use_running_average, mask=mask)
        use_running_average = _flax.flag(
            linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        )
        shape = [x.shape[axis] for axis in _flax.feature_axes(x, self.axis)]
        stat = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, stat))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(shape, stat))
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        if self.is_initializing():
            layer = layer._replace(axis_name=None)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        transformation = _flax.transformation_of(self, transforms_active)
        training = negated(use_running_average)
        scale, bias = transformation.of_parameters(scale, bias, training)
        y, *new = _flax.normalize(
            layer,
            transformation,
            x,
            scale,
            bias,
            mean.value,
            var.value,
            training,
            mask=mask,
            residual=residual,
            dtype=dtype,
        )
        if use_running_average is not True and not self.is_initializing():
            mean.value, var.value = (self._averaged(v, mean.value, x) for v in new)
        return y

    def effective_variables(self) -> dict[str, Any]:
        """Return what normalizes in inference: the variables, as the transforms have them.

        Of a layer that is bound to its variables: ``layer.bind(variables).effective_variables()``.

        Returns
        -------
        dict
            ``scale`` and ``offset``, None where the layer has none, ``mean``, ``variance``; and
            ``epsilon``.
        """
        return _flax.effective(
            _flax.transformation_of(self, None),
            self.epsilon,
            *(self.get_variable("params", name) for name in ("scale", "bias")),
            *(self.get_variable("batch_stats", name) for name in ("mean", "var")),
        )

    def _averaged(self, new: Array, old: Array, x: Array) -> Array:
        """Return a running average in the type that Flax gives it."""
        least = jnp.float32 if self.force_float32_reductions else old.dtype
        seen = jnp.promote_types(least, self.dtype or x.dtype)
        return new.astype(jnp.promote_types(old.dtype, seen))
