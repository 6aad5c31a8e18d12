"""Batch normalization for Keras 3: its own layer, on fused kernels, whatever the backend.

`BatchNormalization` is ``keras.layers.BatchNormalization`` and what can be done in the same pass.
`fuse` puts it into a whole model, `explain` says what that comes to. `fold` makes a model for
inference without batch norms, `explain_fold` says of which. `FakeQuantize` is a transform of the
layer's variables.
"""

from fusebn import _spec

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    _spec.missing("fusebn.keras", "keras")

from fusebn.keras._explain import explain
from fusebn.keras._fold import explain_fold, fold
from fusebn.keras._fuse import fuse
from fusebn.keras._quantize import FakeQuantize
from fusebn.keras.layers import BatchNormalization

__all__ = ["BatchNormalization", "FakeQuantize", "explain", "explain_fold", "fold", "fuse"]
