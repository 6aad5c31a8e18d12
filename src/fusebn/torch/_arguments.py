"""The rules for tensors, which functions and modules share: what the ops take is made here.

Errors are `_spec`'s. What only a tensor's values can tell, the ops check when they run.
"""

from typing import Any

import torch
from torch import Tensor

from fusebn import _spec

ELEMENTS = {getattr(torch, name): code for name, code in _spec.ELEMENT_TYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """Return the name that NumPy has for a dtype, "float32"."""
    return str(dtype).removeprefix("torch.")


def stat_type(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics of x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def tensor_of(operation: str, argument: str, value: Any) -> Tensor:
    """Return a tensor of an element type."""
    if not isinstance(value, Tensor):
        _spec.fail(TypeError, operation, argument, "be a tensor", type(value).__name__)
    if value.dtype not in ELEMENTS:
        _spec.element_type(operation, argument, name_of(value.dtype))
    return value


def on_device_of(x: Tensor, operation: str, argument: str, tensor: Tensor) -> Tensor:
    """Return a tensor that is where x is."""
    if tensor.device != x.device:
        _spec.same_device(operation, argument, str(tensor.device), str(x.device))
    return tensor


def like_x(operation: str, argument: str, value: Any, x: Tensor) -> Tensor:
    """Return a tensor of the shape, dtype and device of x."""
    tensor = on_device_of(x, operation, argument, tensor_of(operation, argument, value))
    if tensor.dtype is not x.dtype:
        _spec.same_type(operation, argument, name_of(tensor.dtype), name_of(x.dtype))
    _spec.same_shape(operation, argument, tuple(tensor.shape), tuple(x.shape))
    return tensor


def parameter(operation: str, argument: str, value: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating parameter of any shape as a tensor of `dtype` beside x."""
    if not isinstance(value, Tensor):
        value = _converted(operation, argument, value, x, dtype)
    return on_device_of(x, operation, argument, tensor_of(operation, argument, value)).to(dtype)


def _converted(operation: str, argument: str, value: Any, x: Tensor, dtype: Any) -> Tensor:
    # Python's numbers have the type they are used in; by way of float32 they would lose digits.
    numbers = isinstance(value, float | int | list | tuple)
    try:
        return torch.as_tensor(value, dtype=dtype if numbers else None, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        _spec.fail(TypeError, operation, argument, "be a tensor", type(value).__name__)


def vector(
    operation: str, argument: str, value: Any, x: Tensor, axis: int, dtype: torch.dtype
) -> Tensor | None:
    """Return a parameter of one value a channel."""
    if value is None:
        return None
    tensor = parameter(operation, argument, value, x, dtype)
    if tensor.shape != x.shape[axis : axis + 1]:
        shape = tuple(x.shape)
        _spec.channel_vector(operation, argument, tuple(tensor.shape), shape[axis], shape)
    return tensor


def position_weights(
    operation: str, argument: str, value: Any, x: Tensor, kept: set[int]
) -> Tensor:
    """Return weights that broadcast to the reduced positions, in the rank of x, 1 where kept.

    They may come in the shape of x with 1 for the kept axes, or in that of the others alone.
    """
    weights = (
        value if isinstance(value, Tensor) else _converted(operation, argument, value, x, None)
    )
    on_device_of(x, operation, argument, weights)
    if weights.is_floating_point() or weights.is_complex():
        tensor_of(operation, argument, weights)
    rank = x.ndim
    if weights.ndim != rank or any(weights.shape[i] != 1 for i in kept):
        others = [n for i, n in enumerate(x.shape) if i not in kept]
        mine = [1] * (len(others) - weights.ndim) + list(weights.shape)
        _check_broadcast(operation, argument, weights, mine, others)
        following = iter(mine)
        weights = weights.reshape([1 if i in kept else next(following) for i in range(rank)])
    else:
        target = [1 if i in kept else n for i, n in enumerate(x.shape)]
        _check_broadcast(operation, argument, weights, list(weights.shape), target)
    return weights.to(stat_type(x))


def _check_broadcast(
    operation: str, argument: str, weights: Tensor, mine: list[int], target: list[int]
) -> None:
    fits = len(mine) == len(target)
    if not fits or any(a not in (1, b) for a, b in zip(mine, target, strict=True)):
        expected = f"broadcast to {tuple(target)}, one weight for each position that is reduced"
        _spec.fail(ValueError, operation, argument, expected, f"shape {tuple(weights.shape)}")
