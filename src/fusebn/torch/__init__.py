"""Batch normalization for PyTorch: its own functions and modules, on fused kernels.

`functional` has ``torch.nn.functional.batch_norm`` and what can be done in the same pass,
`modules` the same as PyTorch's modules. `fuse` puts them into a whole model, `explain` says what
that came to and `unfuse` takes them out again. `fold` takes the batch norms out of a model for
inference, into the layers beside them; `qat` trains for inference in few bits.
"""

from fusebn import _spec

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    _spec.missing("fusebn.torch", "torch")

from fusebn.torch import _functions as _functions  # found by `fusebn`; compilers cannot import
from fusebn.torch import qat
from fusebn.torch._explain import explain
from fusebn.torch._fold import explain_fold, fold
from fusebn.torch._fuse import fuse, unfuse
from fusebn.torch.functional import batch_norm
from fusebn.torch.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    set_transforms_active,
)
from fusebn.torch.quantize import FakeQuantize
from fusebn.torch.sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FakeQuantize",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "batch_norm",
    "convert_sync_batchnorm",
    "explain",
    "explain_fold",
    "fold",
    "fuse",
    "qat",
    "set_transforms_active",
    "unfuse",
]
