"""The network with its normalizations in a few bits: how a user of the NumPy layer does it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fusebn import BatchNorm
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.network import CORRECTION, DECAY, EPSILON, Array
from fusebn.cli.demo.numpy.network import Dense, Network
from fusebn.cli.demo.numpy.training import train
from fusebn.cli.demo.quantized import VARIABLES, folded_dense
from fusebn.quantize import FakeQuantize


class Bits:
    """A transform that has as many bits as it is told."""

    quantize = FakeQuantize(8)

    def __call__(self, vector: Array) -> Array:
        """Return a vector, quantized."""
        quantized: Array = self.quantize(vector)
        return quantized

    def gradient(self, vector: Array, gradient: Array) -> Array:
        """Return the gradient of the vector, given that of the result."""
        return self.quantize.gradient(vector, gradient)


class Quantizable(Network):
    """A copy of a trained network, with quantizers that are off at first."""

    def __init__(self, network: Network) -> None:
        self._bits, self._active = Bits(), np.array(False)
        hidden = [(Dense(dense.weight.copy()), self._norm(norm)) for dense, norm in network.hidden]
        super().__init__(hidden, Dense(network.last.weight.copy()))

    def _norm(self, trained: BatchNorm) -> BatchNorm:
        norm = BatchNorm(
            trained.channels,
            decay=DECAY,
            epsilon=EPSILON,
            correction=CORRECTION,
            activation="relu",
            transforms=dict.fromkeys(VARIABLES, self._bits),
            transforms_active=self._active,
            transform_batch_statistics=True,
        )
        norm.load_state_dict(trained.state_dict())
        return norm

    @property
    def bits(self) -> int:
        """How many the variables of the normalizations have; 0 in floating point."""
        return self._bits.quantize.settings.bits if self._active else 0

    @bits.setter
    def bits(self, bits: int) -> None:
        self._active[...] = bits > 0
        if bits:
            self._bits.quantize = FakeQuantize(bits)

    def train(self, digits: Digits, epochs: int, seed: int, *, rate: float) -> Iterator[float]:
        """See :class:`fusebn.cli.demo.quantized.Quantizable`."""
        return train(self, digits, epochs, seed, rate=rate)

    def folded(self, images: Array) -> Array:
        """See :class:`fusebn.cli.demo.quantized.Quantizable`."""
        hidden = [(dense.weight, norm.effective_variables()) for dense, norm in self.hidden]
        return folded_dense(images, hidden, self.last.weight)
