"""Fake quantization: the one definition, for the arrays of every framework.

A number of `bits` bits stands for one of evenly spaced values

    (q - zero) * step,    q = 0 ... 2**bits - 1                                     affine
     q         * step,    q = -(2**(bits - 1) - 1) ... 2**(bits - 1) - 1            symmetric

between the limits low and high, with 0 always among them:

    affine      low = min(low, 0), high = max(high, 0)
                step = (high - low) / (2**bits - 1),   zero = round(-low / step)
    symmetric   step = max(-low, high) / (2**(bits - 1) - 1),   zero = 0

    fake_quantize(x) = (clip(round(x / step) + zero, least q, largest q) - zero) * step

after Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
Only Inference", 2018, https://arxiv.org/abs/1712.05877, sections 2.1 and 3. The gradient passes
straight through where nothing was clipped and is 0 elsewhere (Bengio, Leonard and Courville, 2013,
https://arxiv.org/abs/1308.3432). None flows to the limits.

Every framework gives the same bits. Rounding is to the nearest even; division, difference and
product are each rounded once everywhere. Only a sum of a product may be compiled to fewer
roundings; the one there is, in the average of the limits, is kept apart by `Ops.rounded`. What
is smaller than the smallest normal number is 0, x and step, since some frameworks flush such
numbers and others do not.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from fusebn import _spec

Array = Any

MINMAX, MOVING = "minmax", "moving"


class Ops(NamedTuple):
    """What is needed of a framework, much as NumPy calls it. Every adapter has its own."""

    where: Callable[[Array, Array, Array], Array]
    round: Callable[[Array], Array]  # to the nearest integer, ties to even
    minimum: Callable[[Array, Array], Array]
    maximum: Callable[[Array, Array], Array]
    amin: Callable[[Array, tuple[int, ...]], Array]  # of axes
    amax: Callable[[Array, tuple[int, ...]], Array]
    isfinite: Callable[[Array], Array]
    reshape: Callable[[Array, tuple[int, ...]], Array]
    stop_gradient: Callable[[Array], Array]
    cast: Callable[[Array, str], Array]  # to a dtype, by its name
    # Of a value, of the dtype and device of an array; compilers must not see the value, since they
    # replace a quotient by one they see by a product.
    scalar: Callable[[float, Array], Array]
    dtype: Callable[[Array], str]  # its name
    rounded: Callable[[Array], Array]  # a product, rounded even where a sum follows
    # (new, old, message) -> new. Raises ValueError(message) where new holds a NaN and old does not:
    # at once, or when values are known, or never if the framework cannot.
    refuse_nan: Callable[[Array, Array, str], Array]
    # XLA multiplies by the reciprocal of what divides several numbers: there it must be hidden.
    divide: Callable[[Array, Array], Array] = operator.truediv


class Settings(NamedTuple):
    """How to quantize: what `FakeQuantize` is given, checked."""

    bits: int
    symmetric: bool
    axis: int | None
    limits: str | tuple[float, float]
    decay: float
    delay: int

    @property
    def largest(self) -> int:
        """The largest q."""
        return int(2 ** (self.bits - self.symmetric)) - 1

    @property
    def least(self) -> int:
        """The least q."""
        return -self.largest if self.symmetric else 0

    def __str__(self) -> str:
        """Return what constructs the same: bits, and what is not as by default."""
        default = settings()
        bits, *rest = self._asdict().items()
        shown = [str(bits[1])]
        shown += [f"{key}={value!r}" for key, value in rest if value != getattr(default, key)]
        return ", ".join(shown)

    @property
    def has_state(self) -> bool:
        """Whether what was seen before has a part in the result."""
        return self.limits == MOVING or self.delay > 0


def settings(
    bits: Any = 8,
    symmetric: Any = False,
    axis: Any = None,
    limits: Any = MINMAX,
    decay: Any = 0.99,
    delay: Any = 0,
) -> Settings:
    """Check what `FakeQuantize` is given; the defaults are those of every framework."""
    name = "FakeQuantize"
    bits = _spec.integer(name, "bits", bits)
    if not 2 <= bits <= 16:
        _spec.fail(ValueError, name, "bits", "lie in [2, 16]", f"{bits}")
    delay = _spec.integer(name, "delay", delay)
    if delay < 0:
        _spec.fail(ValueError, name, "delay", "not be negative", f"{delay}")
    return Settings(
        bits,
        _spec.flag(name, "symmetric", symmetric),
        None if axis is None else _spec.integer(name, "axis", axis),
        _limits(name, limits),
        _spec.fraction(name, "decay", decay, "It is the weight of the old limits."),
        delay,
    )


def _limits(name: str, limits: Any) -> str | tuple[float, float]:
    if isinstance(limits, str):
        return _spec.one_of(name, "limits", limits, (MINMAX, MOVING))
    expected = f"be {MINMAX!r}, {MOVING!r}, or two finite numbers, low < high"
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        _spec.fail(TypeError, name, "limits", expected, repr(limits))
    if not low < high or high - low == float("inf"):
        _spec.fail(ValueError, name, "limits", expected, f"({low}, {high})")
    return low, high


class State(NamedTuple):
    """What has been seen: limits, that broadcast to x, and how often, a scalar integer."""

    low: Array
    high: Array
    steps: Array


def state_shape(s: Settings, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the limits, for x of this shape."""
    if s.axis is None:
        return ()
    axis = _spec.axis_of("FakeQuantize", "axis", s.axis, shape)
    return tuple(n if i == axis else 1 for i, n in enumerate(shape))


def refuse_shape(shape: tuple[int, ...], seen: tuple[int, ...]) -> NoReturn:
    """Refuse x whose limits have another shape than those seen, which broadcasting might hide."""
    expected = f"have a shape whose limits are those seen before, of shape {seen}"
    _spec.fail(ValueError, "FakeQuantize", "x", expected, f"{shape}")


def quantize(
    ops: Ops, s: Settings, x: Array, state: State | None, training: Any
) -> tuple[Array, State | None]:
    """Return x, fake quantized, and the state as it is afterwards.

    In training the state sees x first. `training` is a bool, or a boolean scalar of the framework.
    `state` is None where the settings need none.
    """
    wide = _wide(ops, x)
    if state is not None:
        new = _observed(ops, s, _seen(ops, s, wide), state)
        state = State(*(choose(ops, training, *pair) for pair in zip(new, state, strict=True)))
    y = ops.cast(fake_quantize(ops, s, wide, *_limits_of(ops, s, wide, state)), ops.dtype(x))
    return _after_delay(ops, s, state, y, x), state


def gradient(ops: Ops, s: Settings, x: Array, dy: Array, state: State | None) -> Array:
    """Return the gradient of x, of a call that left this state."""
    wide = _wide(ops, x)
    q, _, _ = _unclipped(ops, s, wide, *_limits_of(ops, s, wide, state))
    dx = ops.where((q >= s.least) & (q <= s.largest), dy, ops.scalar(0, dy))
    return _after_delay(ops, s, state, dx, dy)


def codes(ops: Ops, s: Settings, x: Array, state: State | None) -> tuple[Array, Array, Array]:
    """Return q of x, clipped, as a real; and step and zero, so that y = (q - zero) * step."""
    wide = _wide(ops, x)
    q, step, zero = _unclipped(ops, s, wide, *_limits_of(ops, s, wide, state))
    least, largest = ops.scalar(s.least, wide), ops.scalar(s.largest, wide)
    return ops.minimum(ops.maximum(q, least), largest), step, zero


def _after_delay(ops: Ops, s: Settings, state: State | None, new: Array, old: Array) -> Array:
    if state is None or not s.delay:
        return new
    return ops.where(state.steps > s.delay, new, old)


def _limits_of(ops: Ops, s: Settings, x: Array, state: State | None) -> tuple[Array, Array]:
    """Return the limits that quantize x; its own are those of what is finite in it."""
    low, high = _seen(ops, s, ops.where(ops.isfinite(x), x, ops.scalar(0, x)))
    if state is None or s.limits != MOVING:
        return low, high
    known = state.steps > 0  # before anything was seen, x itself is all there is
    return ops.where(known, state.low, low), ops.where(known, state.high, high)


def _wide(ops: Ops, x: Array) -> Array:
    return ops.cast(x, "float64" if ops.dtype(x) == "float64" else "float32")


def _seen(ops: Ops, s: Settings, x: Array) -> tuple[Array, Array]:
    """Return the limits of x, of each index of the axis if there is one, or fixed ones."""
    if not isinstance(s.limits, str):
        low, high = s.limits
        return ops.scalar(low, x), ops.scalar(high, x)
    kept = state_shape(s, tuple(x.shape))
    axes = tuple(i for i, n in enumerate(kept or (1,) * len(x.shape)) if n == 1)
    x = ops.stop_gradient(x)
    return ops.reshape(ops.amin(x, axes), kept), ops.reshape(ops.amax(x, axes), kept)


def _observed(ops: Ops, s: Settings, seen: tuple[Array, Array], state: State) -> State:
    """Return the state after one more step; what is not finite leaves the limits alone."""
    steps = state.steps + 1
    if s.limits != MOVING:
        return State(state.low, state.high, steps)
    first, finite = state.steps < 1, ops.isfinite(seen[0]) & ops.isfinite(seen[1])

    def averaged(old: Array, now: Array) -> Array:
        now = ops.cast(now, ops.dtype(old))
        mixed = old + ops.rounded((now - old) * (1 - s.decay))
        return ops.where(finite, ops.where(first, now, mixed), old)

    return State(averaged(state.low, seen[0]), averaged(state.high, seen[1]), steps)


def grid(ops: Ops, s: Settings, low: Array, high: Array) -> tuple[Array, Array]:
    """Return the step between two values, and the q that stands for 0, as a real."""
    nothing = ops.scalar(0, low)
    low, high = ops.minimum(low, nothing), ops.maximum(high, nothing)
    largest = ops.scalar(s.largest, low)
    if s.symmetric:
        step = ops.divide(ops.maximum(-low, high), largest)
    else:
        # The difference first might overflow.
        above, below = ops.divide(high, largest), ops.divide(-low, largest)
        step = _normal(ops, above) + _normal(ops, below)
    step = _normal(ops, step)
    if s.symmetric:
        return step, nothing
    return step, ops.round(ops.divide(-low, ops.where(step > 0, step, ops.scalar(1, step))))


def _normal(ops: Ops, x: Array) -> Array:
    """Return x, and 0 for what some frameworks take for 0: see the top of this file."""
    tiny = _SMALLEST_NORMAL[ops.dtype(x)]
    return ops.where((x < tiny) & (x > -tiny), ops.scalar(0, x), x)


_SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}


def fake_quantize(ops: Ops, s: Settings, x: Array, low: Array, high: Array) -> Array:
    """Return x as `bits` bits between the limits have it: see the top of this file."""
    constant = ops.stop_gradient(x)
    q, step, zero = _unclipped(ops, s, constant, low, high)
    least, largest = ops.scalar(s.least, x), ops.scalar(s.largest, x)
    y = (ops.minimum(ops.maximum(q, least), largest) - zero) * step
    # Not every framework's maximum keeps NaN. (In graphs of TensorFlow 1 `==` is `is`.)
    y = ops.where(constant <= constant, y, constant)
    passed = ops.where((q >= least) & (q <= largest), x, ops.scalar(0, x))
    return y + (passed - ops.stop_gradient(passed))  # 0, with the gradient of x


def _unclipped(
    ops: Ops, s: Settings, x: Array, low: Array, high: Array
) -> tuple[Array, Array, Array]:
    """Return the q of x before it is clipped, and step and zero."""
    low, high = (ops.cast(limit, ops.dtype(x)) for limit in (low, high))
    step, zero = grid(ops, s, low, high)
    q = ops.round(ops.divide(_normal(ops, x), ops.where(step > 0, step, ops.scalar(1, x)))) + zero
    return q, step, zero


def choose(ops: Ops, condition: Any, new: Array, old: Array) -> Array:
    """Return new where the condition holds, else old; without an op where that is known."""
    if isinstance(condition, bool):
        return new if condition else old
    return ops.where(condition, new, old)
