"""Fake quantization: what low precision does to numbers, while training.

`FakeQuantize` rounds vectors and weights to what a few bits can say. Given to a layer as one of
its `transforms`, it quantizes the layer's variables; the kernels stay fused. This one holds its
state in NumPy arrays. Without a state (``limits="minmax"`` or two numbers, and no delay) it takes
the arrays of every framework; those with a state are ``fusebn.torch.FakeQuantize`` and its like.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusebn import _quantization, _spec
from fusebn._dispatch import adapter_of
from fusebn._quantization import State
from fusebn._transforms import Transform

__all__ = ["FakeQuantize", "Transform"]

Array = NDArray[Any]

_NAME = "FakeQuantize"

# Who has states for the arrays of an adapter.
_WITH_STATE = {
    "torch": "fusebn.torch.FakeQuantize",
    "tensorflow": "fusebn.tensorflow.FakeQuantize, or with Keras fusebn.keras.FakeQuantize",
    "jax": "fusebn.jax.linen.FakeQuantize or fusebn.jax.nnx.FakeQuantize",
}


class FakeQuantize(Transform):
    """Round to the values that a few bits can say; in backward, as if nothing had been rounded.

    ::

        y = (clip(round(x / step) + zero, least, largest) - zero) * step

        affine      step = (high - low) / (2**bits - 1),  zero = round(-low / step)
                    least, largest = 0, 2**bits - 1
        symmetric   step = max(-low, high) / (2**(bits - 1) - 1),  zero = 0
                    -least = largest = 2**(bits - 1) - 1

    with low = min(low, 0) and high = max(high, 0), so that 0 stays 0. Ties round to even. The
    gradient of y is that of x where nothing was clipped, else 0; none flows to the limits. A step
    below the smallest normal number is 0, and so is y then.

    Every framework computes the same bits.

    Parameters
    ----------
    bits : int in [2, 16]
    symmetric : bool
        See above. By keyword, as all that follow.
    axis : int, optional
        Each index of this axis has limits of its own. None: one pair for all of x.
    limits : "minmax", "moving" or (low, high)
        Where low and high come from: the least and largest of x itself, each time; their moving
        averages over what was seen in training; or fixed numbers. A layer's variables are whole
        vectors, for which "minmax" is right; averages of them lag behind. "moving" is for what
        changes with each batch.
    decay : float in [0, 1]
        Weight of the old limits in the moving ones. The first step takes what it sees. What is not
        finite changes nothing.
    delay : int
        For so many steps of training, x is observed and returned as it is.

    Attributes
    ----------
    low, high : array, or None
        The moving limits, float32; None before the first step, and where `limits` is another.
    steps : int
        How often it was called in training, where that matters: with moving limits or a delay.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit: bits out of range, limits that are empty or not finite.

    Notes
    -----
    As in Jacob et al., 2018, https://arxiv.org/abs/1712.05877; the gradient is the straight-through
    estimator of Bengio, Leonard and Courville, 2013, https://arxiv.org/abs/1308.3432.

    Moving limits so small that they are subnormal numbers are 0 in some frameworks and not in
    others.

    Examples
    --------
    >>> import numpy as np
    >>> from fusebn.quantize import FakeQuantize
    >>> FakeQuantize(2)(np.array([0.0, 0.9, 1.1, 3.0], "float32"))
    array([0., 1., 1., 3.], dtype=float32)
    >>> four = FakeQuantize(4, symmetric=True, limits="moving", decay=0.5)
    >>> y = four(np.array([-7.0, 3.0], "float32"), training=True)
    >>> four(np.array([-9.0, 3.4], "float32"))     # by the limits that training saw
    array([-7.,  3.], dtype=float32)
    """

    low: Array | None = None
    high: Array | None = None
    steps: int = 0

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

    def __call__(self, x: Any, *, training: Any = False) -> Any:
        """Return x, fake quantized: its shape and dtype, of any framework where there is no state.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
        training : bool
            Whether the state observes x first.
        """
        adapter = adapter_of(_NAME, x)
        if isinstance(x, np.ndarray | np.generic):
            _spec.element_type(_NAME, "x", x.dtype.name)
        if not self.settings.has_state:
            y, _ = _quantization.quantize(adapter.array_ops, self.settings, x, None, False)
            return y
        if not isinstance(x, np.ndarray | np.generic):
            fix = f"Use {_WITH_STATE[adapter.__name__.split('.')[1]]}."
            expected = "be a NumPy array, where there is a state"
            _spec.fail(TypeError, _NAME, "x", expected, type(x).__name__, fix)
        x = np.asarray(x)
        old = self._state(x)
        training = _spec.flag(_NAME, "training", training)
        y, new = _quantization.quantize(adapter.array_ops, self.settings, x, old, training)
        if training and new is not None:
            self.steps = int(new.steps)
            if self.settings.limits == _quantization.MOVING:
                self.low, self.high = new.low, new.high
        return y

    def gradient(self, x: Array, dy: Array) -> Array:
        """Return the gradient of x, given that of y, of the last call with this x."""
        state = self._state(x) if self.settings.has_state else None
        ops = adapter_of(_NAME, x).array_ops
        dx: Array = _quantization.gradient(ops, self.settings, x, dy, state)
        return dx

    # ---- the state ----

    def _state(self, x: Array) -> State:
        """Return the state as arrays, before the first step too."""
        shape = _quantization.state_shape(self.settings, x.shape)
        zeros = np.zeros(shape, np.float64 if x.dtype == np.float64 else np.float32)
        low, high = (zeros if limit is None else limit for limit in (self.low, self.high))
        if low.shape != shape:
            _quantization.refuse_shape(x.shape, low.shape)
        return State(low, high, np.asarray(self.steps))

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of the state, as arrays; ``low`` and ``high`` once they are known."""
        state = {"low": self.low, "high": self.high, "steps": np.array(self.steps, np.int64)}
        return {key: value.copy() for key, value in state.items() if value is not None}

    def load_state_dict(self, state: Any) -> None:
        """Take over a state; all of it or, on an error, nothing."""
        name = f"{_NAME}.load_state_dict"
        if not isinstance(state, Mapping):
            _spec.fail(TypeError, name, "state", "be a mapping", type(state).__name__)
        keys = set(state)
        if keys not in ({"steps"}, {"low", "high", "steps"}):
            expected, got = "have the keys steps, or low, high, steps", ", ".join(map(str, state))
            _spec.fail(ValueError, name, "state", expected, got)
        steps = int(np.asarray(state["steps"]))
        if steps < 0:
            _spec.fail(ValueError, name, "steps", "not be negative", f"{steps}")
        low, high = (np.array(state[key]) if key in keys else None for key in ("low", "high"))
        if low is not None and high is not None:
            _spec.same_shape(name, "low", low.shape, high.shape, of="high")
        self.low, self.high, self.steps = low, high, steps

    def config(self) -> dict[str, Any]:
        """Return the arguments that construct one like this, ready for JSON."""
        config: dict[str, Any] = self.settings._asdict()
        if not isinstance(self.settings.limits, str):
            config["limits"] = list(self.settings.limits)
        return config

    def __repr__(self) -> str:
        """Return what constructs one like this."""
        return f"FakeQuantize({self.settings})"
