"""`FakeQuantize` as a module, whose buffers are its state."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fusebn import _quantization
from fusebn._quantization import State
from fusebn._transforms import Transform
from fusebn.torch import _calls
from fusebn.torch._arguments import tensor_of
from fusebn.torch._array_ops import array_ops
from fusebn.torch._wide import Wide

__all__ = ["FakeQuantize"]

_NAME = "FakeQuantize"
_LIMITS = ("low", "high")


class FakeQuantize(Wide, Transform, torch.nn.Module):
    """:class:`fusebn.quantize.FakeQuantize` as a module: the same arguments, the same bits.

    ::

        y = (clip(round(x / step) + zero, least, largest) - zero) * step

        affine      step = (high - low) / (2**bits - 1),  zero = round(-low / step)
                    least, largest = 0, 2**bits - 1
        symmetric   step = max(-low, high) / (2**(bits - 1) - 1),  zero = 0
                    -least = largest = 2**(bits - 1) - 1

    with low = min(low, 0) and high = max(high, 0). The gradient of y is that of x where nothing was
    clipped, else 0.

    Parameters
    ----------
    bits : int in [2, 16]
    symmetric : bool
        See above. By keyword, as all that follow.
    axis : int, optional
        Each index of this axis has limits of its own. None: one pair for all of x.
    limits : "minmax", "moving" or (low, high)
        Where low and high come from: the least and largest of x itself, each time; their moving
        averages over what was seen in training; or fixed numbers.
    decay : float in [0, 1]
        Weight of the old limits in the moving ones. The first step takes what it sees. What is not
        finite changes nothing.
    delay : int
        For so many steps of training, x is observed and returned as it is.

    Attributes
    ----------
    low, high : Tensor
        The moving limits, where there are any: float32, also after ``half()``. Of shape () without
        an axis. With one they broadcast to x, and have no elements before the first step.
    steps : int64 Tensor of rank 0
        How often it was called in training: with moving limits or a delay.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit: bits out of range, limits that are empty or not finite.

    Notes
    -----
    Without moving limits and delay the state_dict is empty. A call that activation checkpointing
    repeats within a backward observes nothing. ``torch.compile`` takes it whole; with moving
    limits of an axis it compiles once more after the first step, when their shape is known.

    As in Jacob et al., 2018, https://arxiv.org/abs/1712.05877; the gradient is the straight-through
    estimator of Bengio, Leonard and Courville, 2013, https://arxiv.org/abs/1308.3432.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> x = torch.tensor([0.0, 0.9, 1.1, 3.0])
    >>> fbt.FakeQuantize(2)(x)
    tensor([0., 1., 1., 3.])
    >>> layer = fbt.BatchNorm1d(4, transforms={"scale": fbt.FakeQuantize(4, limits="moving")})
    >>> _ = layer(x.repeat(2, 1))
    >>> layer.transforms["scale"].high
    tensor(1.)
    """

    low: Tensor
    high: Tensor
    steps: Tensor
    _wide: ClassVar[tuple[str, ...]] = _LIMITS

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
        super().__init__()
        self.settings = _quantization.settings(bits, symmetric, axis, limits, decay, delay)
        if self.settings.limits == _quantization.MOVING:
            unknown = () if self.settings.axis is None else (0,)
            for name in _LIMITS:
                self.register_buffer(name, torch.zeros(unknown, dtype=torch.float32))
        if self.settings.has_state:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def has_state(self) -> bool:
        """Whether what was seen before has a part in the result."""
        return self.settings.has_state

    def extra_repr(self) -> str:
        """Return the arguments that construct one like this."""
        return str(self.settings)

    def forward(self, x: Tensor, *, training: bool | Tensor | None = None) -> Tensor:
        """Return x, fake quantized: its shape and dtype.

        Parameters
        ----------
        x : Tensor of float16, bfloat16, float32 or float64
        training : bool, or boolean Tensor of rank 0, optional
            Whether the state observes x first. None: in the module's training mode.
        """
        if _calls.is_symbol(x):
            given = {} if training is None else {"training": training}
            node: Tensor = _calls.node(self, (x,), given)
            return node
        x = tensor_of(_NAME, "x", x)
        training = self.training if training is None else training
        training = _calls.condition(_NAME, "training", training, x)
        if not self.settings.has_state:
            return _quantization.quantize(array_ops, self.settings, x, None, False)[0]  # type: ignore[no-any-return]
        if _calls.is_recomputation():
            training = False  # it has been observed, so this is what was computed then
        y, new = _quantization.quantize(array_ops, self.settings, x, self._state(x), training)
        if training is not False:
            self._take(new)
        return y  # type: ignore[no-any-return]

    # ---- the state ----

    def _state(self, x: Tensor) -> State:
        """Return the state as it broadcasts to x, before the first step too."""
        if self.settings.limits != _quantization.MOVING:
            nothing = torch.zeros_like(self.steps, dtype=torch.float32)
            return State(nothing, nothing, self.steps)
        shape = _quantization.state_shape(self.settings, tuple(x.shape))
        low, high = self.low, self.high
        if low.shape == shape:
            return State(low, high, self.steps)
        if low.numel():
            _quantization.refuse_shape(tuple(x.shape), tuple(low.shape))
        return State(low.new_zeros(shape), high.new_zeros(shape), self.steps)

    @torch.no_grad()
    def _take(self, new: Any) -> None:
        self.steps.copy_(new.steps)
        if self.settings.limits != _quantization.MOVING:
            return
        for old, limit in ((self.low, new.low), (self.high, new.high)):
            if old.shape != limit.shape:
                old.data = torch.empty_like(limit)  # the same buffer, to those who hold it
            old.copy_(limit)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for name in _LIMITS if self.settings.axis is not None else ():
            saved, own = state_dict.get(prefix + name), self._buffers.get(name)
            if isinstance(saved, Tensor) and own is not None and saved.shape != own.shape:
                own.data = own.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
