"""``fusebn.jax.linen.FakeQuantize``: fake quantization, with the state in a collection."""

from dataclasses import KW_ONLY
from typing import Any

from flax import linen

from fusebn import _quantization
from fusebn._quantization import State
from fusebn._transforms import Transform
from fusebn.jax import _observers

Array = Any


class FakeQuantize(linen.Module, Transform):
    """:class:`fusebn.quantize.FakeQuantize` as a module of Flax: the same bits, compiled or not.

    Given to a layer as one of its `transforms`, it quantizes a variable of the layer.

    Where it has a state, with moving limits or a delay, that is in the collection ``quantize``:
    `low` and `high`, float32 (float64 for float64 x), of rank 0, or of the rank of x and length 1
    along all but `axis`; and `steps`, int32. It changes in calls with `training`, which need
    ``mutable=["quantize"]``, and not in ``init``.

    Parameters
    ----------
    bits, symmetric, axis, limits, decay, delay
        As in :class:`fusebn.quantize.FakeQuantize`; all but `bits` by keyword.

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
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import fusebn.jax.linen
    >>> four = fusebn.jax.linen.FakeQuantize(4, symmetric=True, limits="moving", decay=0.5)
    >>> x = jnp.array([-7.0, 3.0])
    >>> variables = four.init(jax.random.key(0), x)
    >>> y, variables = four.apply(variables, x, training=True, mutable=["quantize"])
    >>> four.apply(variables, jnp.array([-9.0, 3.4])).tolist()  # by the limits that training saw
    [-7.0, 3.0]
    """

    bits: int = 8
    _: KW_ONLY
    symmetric: bool = False
    axis: int | None = None
    limits: str | tuple[float, float] = "minmax"
    decay: float = 0.99
    delay: int = 0

    def __post_init__(self) -> None:
        """Check the arguments, as Flax does not."""
        self.settings()
        super().__post_init__()

    def settings(self) -> _quantization.Settings:
        """Return the arguments, checked."""
        return _quantization.settings(
            *(getattr(self, name) for name in _quantization.Settings._fields)
        )

    @linen.compact
    def __call__(self, x: Array, *, training: Any = False) -> Array:
        """Return x, fake quantized: its shape and dtype.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
        training : bool, or boolean array of rank 0
            Whether the state observes x first. It may be traced.
        """
        settings, x = self.settings(), _observers.argument(x)
        if not settings.has_state:
            return _observers.quantize(settings, x, None, training)[0]
        unseen = _observers.unseen(settings, x)
        kept = [
            self.variable("quantize", name, lambda value=value: value)
            for name, value in unseen._asdict().items()
        ]
        state = State(*(variable.value for variable in kept))
        y, new = _observers.quantize(settings, x, state, training)
        if training is not False and not self.is_initializing():
            for variable, value in zip(kept, new, strict=True):
                variable.value = value
        return y
