"""``fusebn.jax.nnx.FakeQuantize``: fake quantization, with the state in variables."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from fusebn import _quantization
from fusebn._quantization import State
from fusebn._transforms import Transform
from fusebn.jax import _observers

Array = Any


class Observed(nnx.Variable[Any]):
    """What fake quantization has seen: limits, and how often it looked."""


class FakeQuantize(nnx.Module, Transform):
    """:class:`fusebn.quantize.FakeQuantize` as a module of Flax: the same bits, compiled or not.

    Given to a layer as one of its `transforms`, it quantizes a variable of the layer.

    Parameters
    ----------
    bits, symmetric, axis, limits, decay, delay
        As in :class:`fusebn.quantize.FakeQuantize`; all but `bits` by keyword.

    Attributes
    ----------
    low, high : Observed
        The moving limits, float32 (float64 for float64 x), 0 before the first step: of rank 0, or
        with `axis` of the rank of x and length 1 along all others; then the first call, in training
        or not, gives them that shape. Only where there is a state: with moving limits or a delay.
    steps : Observed
        How often it was called in training, int32; where there is a state.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit, here or in a call; in compiled code when it is traced.

    Notes
    -----
    Formula, gradient and papers: see :class:`fusebn.quantize.FakeQuantize`. The only numbers that
    may differ are the subnormal ones, below 1.2e-38, which XLA takes for 0.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import fusebn.jax.nnx
    >>> four = fusebn.jax.nnx.FakeQuantize(4, symmetric=True, limits="moving", decay=0.5)
    >>> y = four(jnp.array([-7.0, 3.0]), training=True)
    >>> four(jnp.array([-9.0, 3.4])).tolist()  # by the limits that training saw
    [-7.0, 3.0]
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        limits: str | tuple[float, float] = "minmax",
        decay: float = 0.99,
        delay: int = 0,
    ) -> None:
        self.settings = _quantization.settings(bits, symmetric, axis, limits, decay, delay)
        if self.settings.has_state:
            self.low, self.high = (Observed(jnp.zeros((), jnp.float32)) for _ in range(2))
            self.steps = Observed(jnp.zeros((), jnp.int32))

    def __call__(self, x: Array, *, training: Any = False) -> Array:
        """Return x, fake quantized: its shape and dtype.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
        training : bool, or boolean array of rank 0
            Whether the state observes x first. It may be traced.
        """
        x = _observers.argument(x)
        if not self.settings.has_state:
            return _observers.quantize(self.settings, x, None, training)[0]
        kept = [getattr(self, name) for name in State._fields]
        old = State(*(variable.get_value() for variable in kept))
        state = old
        if state.low.shape == ():  # what nothing has sized may still be that of an axis
            unseen = _observers.unseen(self.settings, x)
            shape, dtype = unseen.low.shape, jnp.promote_types(unseen.low.dtype, state.low.dtype)
            low, high = (jnp.broadcast_to(v, shape).astype(dtype) for v in state[:2])
            state = State(low, high, state.steps)
        y, new = _observers.quantize(self.settings, x, state, training)
        for variable, value, before in zip(kept, new, old, strict=True):
            if value is not before:
                variable.set_value(value)
        return y
