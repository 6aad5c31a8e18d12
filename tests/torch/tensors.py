"""NumPy arrays as tensors and back, bfloat16 included, which neither knows of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import cases
from conftest import Array


def tensor(array: Any, *, needs_gradient: bool = False) -> Tensor:
    """Return a copy of an array as a tensor."""
    array = np.array(array)
    if array.dtype == cases.BFLOAT16:
        made = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array)
    return made.to(torch.get_default_device()).requires_grad_(needs_gradient)


def array(tensor: Tensor | None) -> Array | None:
    """Return a tensor's values."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(cases.BFLOAT16)
    return tensor.numpy()


def arrays(results: Any) -> tuple[Any, ...]:
    """Return the values of several."""
    return tuple(array(result) for result in results)
