"""What both of Flax's fake quantizers are made of: they differ in where the state is."""

from typing import Any

import jax.numpy as jnp

from fusebn import _quantization, _spec
from fusebn._quantization import Settings, State
from fusebn.jax._arguments import array_of, training_flag
from fusebn.jax._array_ops import array_ops

Array = Any

_NAME = "FakeQuantize"


def argument(x: Any) -> Array:
    """Return x as an array that can be quantized."""
    return array_of(_NAME, "x", x)


def unseen(settings: Settings, x: Array) -> State:
    """Return the state before the first step."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    limits = jnp.zeros(_quantization.state_shape(settings, x.shape), dtype)
    return State(limits, limits, jnp.zeros((), jnp.int32))


def quantize(settings: Settings, x: Array, state: State | None, training: Any) -> Any:
    """Return y, and the state afterwards; it is None where the settings need none."""
    training = training_flag(_NAME, "training", training)
    if state is not None and state.low.shape != _quantization.state_shape(settings, x.shape):
        expected = f"have a shape whose limits are those seen before, of shape {state.low.shape}"
        _spec.fail(ValueError, _NAME, "x", expected, f"shape {x.shape}")
    return _quantization.quantize(array_ops, settings, x, state, training)
