"""`FakeQuantize` with its state in TensorFlow's variables."""

from typing import Any

import tensorflow as tf

from fusebn import _quantization, _spec
from fusebn._quantization import State
from fusebn._transforms import Transform
from fusebn.tensorflow._arguments import training_flag
from fusebn.tensorflow._array_ops import array_ops
from fusebn.tensorflow._autograph import unconverted
from fusebn.tensorflow._functions import stat_type, tensor_of

__all__ = ["FakeQuantize"]

_NAME = "FakeQuantize"


class FakeQuantize(tf.Module, Transform):  # type: ignore[misc]
    """:class:`fusebn.quantize.FakeQuantize`, with what it has seen in ``tf.Variable`` objects.

    Formula, arguments and bits are those of that class, in eager execution, in a ``tf.function``,
    under XLA, and in a graph of ``tf.compat.v1``.

    Parameters
    ----------
    bits : int in [2, 16]
    symmetric, axis, limits, decay, delay
        By keyword, as there.
    name : str, optional
        Of the variables' scope; None is "fake_quantize".

    Attributes
    ----------
    low, high : tf.Variable, or None
        The moving limits, float32, or float64 for float64 x; of rank 0, or with an `axis` of the
        rank of x, 1 but on that axis. None before the first call, and where `limits` is another.
    steps : tf.Variable, or None
        How often it was called in training, int64. None before the first call, and where it does
        not matter: without moving limits or a delay.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit; x has another shape than the limits are for, or an unknown rank.

    Notes
    -----
    The variables are made by the first call, since they are shaped by x; ``tf.train.Checkpoint``
    restores them also where they are made later. In a ``tf.compat.v1`` graph they are among its
    ``GLOBAL_VARIABLES``, and they are updated when the result is run; another graph needs another
    FakeQuantize. Those of a layer's transforms are named by the layer, ``bn/transforms/scale/low``;
    where it is called again with ``reuse=True`` it is to be given the same objects. Under a
    ``tf.distribute`` strategy each replica observes what it is given.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fusebn.tensorflow import FakeQuantize
    >>> four = FakeQuantize(4, symmetric=True, limits="moving", decay=0.5)
    >>> y = four(tf.constant([-7.0, 3.0]), training=True)
    >>> four(tf.constant([-9.0, 3.4])).numpy()     # by the limits that training saw
    array([-7.,  3.], dtype=float32)
    """

    low: Any = None
    high: Any = None
    steps: Any = None

    def __init__(
        self,
        bits: int = 8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        limits: str | tuple[float, float] = "minmax",
        decay: float = 0.99,
        delay: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._place: str | None = None
        self.settings = _quantization.settings(bits, symmetric, axis, limits, decay, delay)

    @unconverted
    def __call__(self, x: Any, *, training: Any = False) -> Any:
        """Return x, fake quantized: its shape and dtype.

        Parameters
        ----------
        x : tensor of float16, bfloat16, float32 or float64
        training : bool, or scalar boolean tensor
            Whether the state observes x first. A tensor is read at run time.
        """
        x = tensor_of(_NAME, "x", x)
        if x.shape.rank is None:
            fix = "Give it one by tf.ensure_shape."
            _spec.fail(ValueError, _NAME, "x", "have a known rank", "an unknown one", fix)
        training = training_flag(_NAME, "training", training)
        old = self._state(x) if self.settings.has_state else None
        y, new = _quantization.quantize(array_ops, self.settings, x, old, training)
        if new is None or training is False:
            return y
        with tf.control_dependencies(self._take(new)):
            return tf.identity(y)

    def belong_to(self, place: str) -> None:
        """Have variables that are still to be made named by a place, as "bn/transforms/scale"."""
        self._place = self._place or place

    def _state(self, x: Any) -> State:
        """Return the state, 0 where there is none yet."""
        shape = _quantization.state_shape(self.settings, tuple(x.shape))
        self._check_graph()
        if self.steps is None:
            self._make_variables(shape, stat_type(x))
        steps = tf.convert_to_tensor(self.steps)
        if self.low is None:
            nothing = tf.zeros([], stat_type(x))
            return State(nothing, nothing, steps)
        if not self.low.shape.is_compatible_with(shape):
            _quantization.refuse_shape(tuple(x.shape), tuple(self.low.shape))
        return State(tf.convert_to_tensor(self.low), tf.convert_to_tensor(self.high), steps)

    def _check_graph(self) -> None:
        if self.steps is None or tf.compat.v1.executing_eagerly_outside_functions():
            return
        if self.steps.graph is not tf.compat.v1.get_default_graph():
            fix = "Make another for each graph; a checkpoint takes the state along."
            expected = "be of the graph in which this FakeQuantize was first called"
            _spec.fail(ValueError, _NAME, "x", expected, "a tensor of another graph", fix)

    def _make_variables(self, shape: tuple[int, ...], dtype: Any) -> None:
        if None in shape:
            expected = f"have a known length on its axis {self.settings.axis}"
            _spec.fail(ValueError, _NAME, "x", expected, "an unknown one")
        scope = tf.name_scope(f"{self._place}/") if self._place else self.name_scope
        # Outside of the tf.function that is being traced, if one is.
        with tf.init_scope(), scope:
            if self.settings.limits == _quantization.MOVING:
                self.low = _variable("low", tf.zeros(shape, dtype))
                self.high = _variable("high", tf.zeros(shape, dtype))
            self.steps = _variable("steps", tf.zeros([], tf.int64))

    def _take(self, new: State) -> list[Any]:
        """Return the updates of the state; they are done already, but in a graph of v1."""
        pairs = [(self.steps, new.steps)]
        if self.low is not None:
            pairs += [(self.low, new.low), (self.high, new.high)]
        return [tf.compat.v1.assign(variable, value) for variable, value in pairs]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that construct one like this."""
        config: dict[str, Any] = self.settings._asdict()
        return config


def _variable(name: str, value: Any) -> Any:
    """Return a variable, of which each replica has its own, as it has of the layers' averages."""
    return tf.Variable(
        value,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
