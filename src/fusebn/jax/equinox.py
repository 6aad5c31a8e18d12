"""Equinox's layer, ``equinox.nn.BatchNorm``, on this library's kernels."""

from typing import Any

import jax.numpy as jnp

from fusebn import _spec
from fusebn.jax import functional
from fusebn.jax._arguments import training_flag
from fusebn.jax._transformed import negated

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    if error.name != "equinox":
        raise
    _spec.missing("fusebn.jax.equinox", "equinox")

__all__ = ["BatchNorm"]

Array = Any

_NAME = "BatchNorm"


class BatchNorm(eqx.nn.BatchNorm):
    """``equinox.nn.BatchNorm``, and what surrounds it in the same pass.

    ::

        y = activation((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    It is a subclass of Equinox's layer, with its leaves and its state, so that to import this one
    instead is to migrate, and a file of leaves goes from either to the other. Like Equinox's it is
    called with one example, inside a ``vmap`` whose axis has its `axis_name`.

    Parameters
    ----------
    input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype
        As in ``equinox.nn.BatchNorm``.
    mode : "batch" or "ema"
        What normalizes in training: the batch's mean and biased variance; or their running
        averages, with this batch already in them. "legacy", the default, is "ema" and warns.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied to the result. By keyword.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit, here or in a call; in compiled code when it is traced.

    Notes
    -----
    What Equinox's layer does otherwise: in the mode "batch" its running variance starts at 1, and
    in inference that 1 is taken for something seen, so that after a single batch the variance is
    too large by 99 at the default momentum. Here it is taken out again, of the same state.

    As ``equinox.nn.BatchNorm``: https://docs.kidger.site/equinox/api/nn/normalisation/

    Examples
    --------
    >>> import equinox as eqx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import fusebn.jax.equinox
    >>> layer, state = eqx.nn.make_with_state(fusebn.jax.equinox.BatchNorm)(
    ...     2, axis_name="batch", mode="batch", activation="relu"
    ... )
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])  # two examples of two channels
    >>> over_batch = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    >>> y, state = jax.vmap(layer, **over_batch)(x, state)
    >>> y.round(2).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """

    activation: str | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Any,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: Any = None,
        mode: Any = "legacy",
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype, mode
        )
        _spec.activation(_NAME, activation)
        self.activation = activation

    def __call__(
        self,
        x: Array,
        state: Any,
        *,
        key: Any = None,
        inference: Any = None,
        residual: Array | None = None,
    ) -> tuple[Array, Any]:
        """Normalize one example of a batch.

        Parameters
        ----------
        x : array of shape (input_size, ...)
            Integers are taken as float32.
        state : equinox.nn.State
            Where the running averages are.
        key
            Not used, as in Equinox.
        inference : bool, or boolean array of rank 0
            Whether the running averages normalize, and stay as they are; None is as the layer says.
            It may be traced: then one compiled program serves both.
        residual : array of the shape of x, optional
            Added before the activation.

        Returns
        -------
        y : array of the shape of x
            Of the type of x and the parameters together.
        state : equinox.nn.State
            With the averages as they are now.
        """
        x = jnp.asarray(x)
        inference = self.inference if inference is None else inference
        if jnp.iscomplexobj(x):
            _spec.fail(TypeError, _NAME, "x", "be real", f"dtype {x.dtype}")
        training = negated(training_flag(_NAME, "inference", inference))
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        if self.channelwise_affine:
            x = x.astype(jnp.result_type(x, self.weight, self.bias))
        step = self._by_batch if self.mode == "batch" else self._by_averages
        return step(x, state, training, residual)

    def _by_batch(self, x: Array, state: Any, training: Any, residual: Any) -> tuple[Array, Any]:
        counter, averages = state.get(self.batch_counter), state.get(self.batch_state_index)
        served = self._debiased(counter, *averages)
        given = served if training is False else _choose(training, averages, served)
        y, *new = self._normalize(
            x, given, residual, is_training=training, exponential_avg_factor=1 - self.momentum
        )
        if training is False:
            return y, state
        state = state.set(self.batch_counter, counter + training)
        return y, state.set(self.batch_state_index, _choose(training, new, averages))

    def _by_averages(self, x: Array, state: Any, training: Any, residual: Any) -> tuple[Array, Any]:
        first, averages = state.get(self.ema_first_time_index), state.get(self.ema_state_index)
        if training is not False:
            group = {"axis_name": self.axis_name, "axis": 0, "correction": 0}
            _, *batch = functional.batch_norm(x, None, None, None, None, **group)
            old = self.momentum
            mixed = [(1 - old) * b + old * a for b, a in zip(batch, averages, strict=True)]
            averages = _choose(training, _choose(first, batch, mixed), averages)
            state = state.set(self.ema_first_time_index, first & negated(training))
            state = state.set(self.ema_state_index, averages)
        y, *_ = self._normalize(x, averages, residual, is_training=False)
        return y, state

    def _debiased(self, counter: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
        """Return the averages without what they started from: zeros and ones."""
        started = jnp.where(counter == 0, 0, self.momentum**counter)
        return mean / (1 - started), jnp.maximum(variance - started, 0) / (1 - started)

    def _normalize(self, x: Array, given: tuple[Array, ...], residual: Any, **options: Any) -> Any:
        return functional.batch_norm(
            x,
            self.weight,
            self.bias,
            *given,
            axis=0,
            epsilon=self.eps,
            activation=self.activation,
            residual=None if residual is None else residual.astype(x.dtype),
            correction=0,
            axis_name=self.axis_name,
            **options,
        )


def _choose(condition: Any, new: Any, old: Any) -> tuple[Array, ...]:
    """Return new where the condition holds, in the types of old."""
    return tuple(jnp.where(condition, a, b).astype(b.dtype) for a, b in zip(new, old, strict=True))
