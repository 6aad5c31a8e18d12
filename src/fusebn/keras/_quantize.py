"""`FakeQuantize` as a layer of Keras, with its state in weights."""

from typing import Any

import keras

from fusebn import _quantization
from fusebn._dispatch import adapter_of
from fusebn._quantization import State
from fusebn._transforms import Transform

__all__ = ["FakeQuantize"]

_NAME = "FakeQuantize"


@keras.saving.register_keras_serializable(package="fusebn")
class FakeQuantize(keras.layers.Layer, Transform):
    """:class:`fusebn.quantize.FakeQuantize` as a layer, whatever the backend.

    Formula, arguments and bits are those of that class.

    Parameters
    ----------
    bits : int in [2, 16]
    symmetric, axis, limits, decay, delay
        By keyword, as there.
    **kwargs
        `name`, `dtype`, ... as for any layer. The inputs keep their own type; where `dtype` is
        "float64", so have the limits, else they are float32.

    Call arguments
    --------------
    inputs : tensor of float16, bfloat16, float32 or float64
    training : bool, or scalar boolean tensor, optional
        Whether the state observes the inputs first. None is what the model is doing.

    Attributes
    ----------
    low, high : weights, with moving limits
        Of rank 0, or with an `axis` of the rank of the inputs, 1 but on that axis.
    steps : weight, with moving limits or a delay
        How often it was called in training, int32.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.

    Examples
    --------
    >>> import keras
    >>> from fusebn.keras import FakeQuantize
    >>> four = FakeQuantize(4, symmetric=True, limits="moving", decay=0.5)
    >>> y = four(keras.ops.array([-7.0, 3.0]), training=True)
    >>> y = four(keras.ops.array([-9.0, 3.4]))     # by the limits that training saw
    >>> keras.ops.convert_to_numpy(y)
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
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.settings = _quantization.settings(bits, symmetric, axis, limits, decay, delay)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that construct one like this."""
        config: dict[str, Any] = {**super().get_config(), **self.settings._asdict()}
        if not isinstance(self.settings.limits, str):
            config["limits"] = list(self.settings.limits)
        return config

    def build(self, input_shape: Any) -> None:
        """Make the weights, for inputs of this shape."""
        if not self.settings.has_state:
            return
        shape = _quantization.state_shape(self.settings, tuple(input_shape))
        if self.settings.limits == _quantization.MOVING:
            dtype = "float64" if self.variable_dtype == "float64" else "float32"
            self.low, self.high = (self._state(name, shape, dtype) for name in ("low", "high"))
        self.steps = self._state("steps", (), "int32")

    def _state(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return self.add_weight(
            shape=shape,
            name=name,
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            autocast=False,
        )

    def compute_output_spec(self, inputs: Any, training: Any = None) -> Any:
        """Return what a call with symbolic tensors yields."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Return the inputs, fake quantized: see the class."""
        ops = adapter_of(_NAME, inputs, "inputs").array_ops
        if not self.settings.has_state:
            y, _ = _quantization.quantize(ops, self.settings, inputs, None, False)
            return y
        if not keras.ops.is_tensor(training) or keras.backend.backend() == "torch":
            training = bool(training)
        steps = self.steps.value
        limits = (steps, steps) if self.low is None else (self.low.value, self.high.value)
        old = State(*limits, steps)
        y, new = _quantization.quantize(ops, self.settings, inputs, old, training)
        if new is not None and training is not False:
            self._take(new)
        return y

    def _take(self, new: State) -> None:
        self.steps.assign(new.steps)
        if self.low is not None:
            self.low.assign(new.low)
            self.high.assign(new.high)
