"""The network with its normalizations in a few bits: how a user of TensorFlow 1 does it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from fusebn.cli.demo.network import EPSILON, WIDTHS, Array
from fusebn.cli.demo.quantized import BITS, VARIABLES, folded_dense
from fusebn.cli.demo.tensorflow.network import UPDATE_OPS, Network
from fusebn.quantize import FakeQuantize

# How tf.contrib named the variables.
_NAMES = dict(zip(VARIABLES, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True))


class Quantizable(Network):
    """One graph for floating point and for all numbers of bits: `bits` is fed."""

    def __init__(self, seed: int) -> None:
        self.bits = 0
        super().__init__(seed, UPDATE_OPS, self._quantizers)

    def _quantizers(self) -> dict[str, Any]:
        self._fed = bits = tf.compat.v1.placeholder_with_default(0, [], "bits")

        def quantized(vector: Any) -> Any:
            for choice in BITS:
                vector = tf.where(tf.equal(bits, choice), FakeQuantize(choice)(vector), vector)
            return vector

        return {
            "transforms": dict.fromkeys(VARIABLES, quantized),
            "transforms_active": bits > 0,
            "transform_batch_statistics": True,
        }

    def fed(self) -> dict[Any, Any]:
        """Return what is fed besides: the bits."""
        return {self._fed: self.bits}

    def folded(self, images: Array) -> Array:
        """See :class:`fusebn.cli.demo.quantized.Quantizable`."""
        values = self.session.run(self.variables)
        hidden = []
        for i in range(len(WIDTHS) - 2):
            norm = {
                name: FakeQuantize(self.bits)(values[f"hidden{i}/BatchNorm/{tf_name}"])
                for name, tf_name in _NAMES.items()
            }
            hidden.append((values[f"hidden{i}/kernel"], {**norm, "epsilon": EPSILON}))
        return folded_dense(images, hidden, values["last/kernel"])
