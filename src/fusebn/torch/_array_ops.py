"""What the definition of fake quantization needs, on tensors: see `fusebn._quantization.Ops`."""

from collections.abc import Callable

import torch
from torch import Tensor

from fusebn._quantization import Ops
from fusebn.torch._arguments import ELEMENTS, name_of
from fusebn.torch._ops import is_plain

# By dtype: compilers look into a dict, but make no text of a dtype.
_NAMES = {dtype: name_of(dtype) for dtype in ELEMENTS}


def _over(reduced: Callable[..., Tensor], x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Reduce axes; over none of them it is x, where PyTorch would take all."""
    return reduced(x, axes) if axes else x


def _refuse_nan(new: Tensor, old: Tensor, message: str) -> Tensor:
    """Raise where it can be told: on a CPU, not within ``torch.func``.

    Other devices would have to be waited for. A compiled program raises RuntimeError.
    """
    if not new.is_cpu:
        return new
    if torch.compiler.is_compiling():
        torch._assert_async((new == new).logical_or(old != old).all(), message)
    elif is_plain(new) and bool(new.isnan().any()) and bool((new.isnan() & ~old.isnan()).any()):
        raise ValueError(message)
    return new


array_ops = Ops(
    where=torch.where,
    round=torch.round,
    minimum=torch.minimum,
    maximum=torch.maximum,
    amin=lambda x, axes: _over(torch.amin, x, axes),
    amax=lambda x, axes: _over(torch.amax, x, axes),
    isfinite=torch.isfinite,
    reshape=torch.reshape,
    stop_gradient=lambda x: x.detach(),
    cast=lambda x, dtype: x if _NAMES.get(x.dtype) == dtype else x.to(getattr(torch, dtype)),
    scalar=lambda value, like: like.new_full((), value),
    dtype=lambda x: _NAMES[x.dtype],
    rounded=lambda x: x,  # every operation is, in a compiled program too
    refuse_nan=_refuse_nan,
)
