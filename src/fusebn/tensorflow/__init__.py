"""Batch normalization for TensorFlow: its own functions and layers, on fused kernels.

`nn` has the functions of ``tf.nn`` and ``tf.compat.v1.nn``, `layers` the layers that
``tf.contrib.layers`` and ``tf.layers`` had, `moving_averages` their updates, `FakeQuantize` is a
transform for them. Under XLA, on a GPU,
and inside :func:`portable` the same functions are made of TensorFlow's own ops.
"""

from fusebn import _spec

try:
    import tensorflow as _tensorflow  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    _spec.missing("fusebn.tensorflow", "tensorflow")

from fusebn.tensorflow import layers, moving_averages, nn
from fusebn.tensorflow._ops import portable
from fusebn.tensorflow._quantize import FakeQuantize

__all__ = ["FakeQuantize", "layers", "moving_averages", "nn", "portable"]
