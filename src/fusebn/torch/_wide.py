"""Buffers that stay float32 in a module of half precision."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


class Wide:
    """What comes before ``torch.nn.Module`` where buffers are averages.

    In half precision an average stalls: a step of less than half a unit in the last place, 2**-9 of
    the value in bfloat16, is lost.
    """

    _wide: ClassVar[tuple[str, ...]]  # the names of those buffers
    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = [self._buffers.get(name) for name in self._wide]
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, old in zip(self._wide, before, strict=True):
            new = self._buffers.get(name)
            if new is not None and old is not None and _is_half(new):
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _widen(self) -> None:
        """Make those that are of half precision float32."""
        for name in self._wide:
            buffer = self._buffers[name]
            if buffer is not None and _is_half(buffer):
                self._buffers[name] = buffer.float()


def _is_half(tensor: Any) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
