"""The kernels in Triton's interpreter, on a CPU: programs run one after the other, in Python."""

from triton.runtime import interpreter

from fusebn.triton import _fused as fused
from fusebn.triton import _verbs as verbs

__all__ = ["fused", "verbs"]

_patch = interpreter._patch_lang_tensor


def _with_index(tensor, *rest):
    """Let range() have the interpreter's numbers, which are arrays of length 1: NumPy 2.4 minds."""
    undo = _patch(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.item())
    return undo


interpreter._patch_lang_tensor = _with_index
