"""A case's data on the device, in as many copies as the clock goes through; and answers back."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusebn.cli.bench.answers import Answer, positions_of
from fusebn.cli.bench.cases import Array, Case, Data

TENSORS = ("y", "dx", "dresidual")  # of the shape of x


class Parameters(NamedTuple):
    """The vectors of a batch norm: float32 beside 16 bits, as in mixed precision."""

    scale: Tensor
    offset: Tensor
    mean: Tensor  # running
    variance: Tensor


class Tensors:
    """The tensors of a case: channels are axis 1, whatever the memory order."""

    def __init__(self, case: Case, data: Data, device: torch.device, copies: int) -> None:
        self.case, self.device, self.copies = case, device, copies
        self._data = data
        self.xs, self.dys, self.residuals = (
            self._copies(array) for array in (data.x, data.dy, data.residual)
        )
        for tensor in (*self.xs, *self.residuals):
            tensor.requires_grad_()

    def parameters(self) -> Parameters:
        """Return vectors that nobody else has: training moves two of them."""
        data = self._data
        vectors = (data.scale, data.offset, data.mean, data.variance)
        scale, offset, mean, variance = (torch.tensor(v, device=self.device) for v in vectors)
        return Parameters(scale.requires_grad_(), offset.requires_grad_(), mean, variance)

    def answer(self, arrays: dict[str, Tensor]) -> Answer:
        """Return what is checked of an answer: of large tensors a sample, taken on the device."""
        return {
            name: self._sampled(value) if name in TENSORS else value.detach().cpu().numpy()
            for name, value in arrays.items()
        }

    def _copies(self, array: Array) -> list[Tensor]:
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        integers = torch.from_numpy(array.view(f"i{array.itemsize}"))
        first = integers.to(self.device, copy=True).view(dtype).movedim(self.case.axis, 1)
        return [first, *(first.clone() for _ in range(self.copies - 1))]

    @cached_property
    def _positions(self) -> Tensor:
        return torch.from_numpy(np.asarray(positions_of(self.case))).to(self.device)

    def _sampled(self, tensor: Any) -> Array:
        in_order = tensor.detach().movedim(1, self.case.axis).reshape(-1)
        sample: Array = in_order[self._positions].double().cpu().numpy()
        return sample
