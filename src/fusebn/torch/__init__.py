"""Batch normalization for PyTorch: its own functions and modules, on fused kernels.

`functional` has ``torch.nn.functional.batch_norm`` and what can be done in the same pass.
"""

from fusebn import _spec

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    _spec.missing("fusebn.torch", "torch")

from fusebn.torch.functional import batch_norm

__all__ = ["batch_norm"]
