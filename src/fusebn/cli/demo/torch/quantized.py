"""The network with its normalizations in a few bits: how a user of PyTorch does it."""

from __future__ import annotations

import torch
from torch import Tensor

import fusebn.torch as fbt
from fusebn.cli.demo.network import Array
from fusebn.cli.demo.quantized import VARIABLES
from fusebn.cli.demo.torch.network import Network, tensor_of
from fusebn.quantize import FakeQuantize


class Quantizable(Network):
    """A copy of a trained network, with quantizers that are off at first."""

    def __init__(self, network: Network) -> None:
        super().__init__(seed=0, fused=True)
        self.model.load_state_dict(network.model.state_dict())
        self._quantize, self._active = FakeQuantize(8), torch.tensor(False)
        fbt.set_transforms_active(self.model, self._active)
        for norm in self.norms().values():
            assert isinstance(norm, fbt.BatchNorm2d)
            norm.transforms = dict.fromkeys(VARIABLES, self._quantized)
            norm.transform_batch_statistics = True

    def _quantized(self, vector: Tensor) -> Tensor:
        quantized: Tensor = self._quantize(vector)
        return quantized

    @property
    def bits(self) -> int:
        """How many the variables of the normalizations have; 0 in floating point."""
        return self._quantize.settings.bits if self._active else 0

    @bits.setter
    def bits(self, bits: int) -> None:
        self._active.fill_(bits > 0)
        if bits:
            self._quantize = FakeQuantize(bits)

    def folded(self, images: Array) -> Array:
        """See :class:`fusebn.cli.demo.quantized.Quantizable`."""
        model = fbt.fold(self.model.eval())
        with torch.no_grad():
            logits: Array = model(tensor_of(images)).numpy()
        return logits
