"""The kernels in Triton's interpreter, on a CPU: programs run one after the other, in Python.

Importing this imports them so. What is to be compiled is compiled in a process of its own.
"""

import triton
from triton.runtime import interpreter

triton.knobs.runtime.interpret = True
from fusebn.triton import _fused as fused  # noqa: E402
from fusebn.triton import _verbs as verbs  # noqa: E402

triton.knobs.runtime.interpret = False

__all__ = ["fused", "verbs"]

_patch = interpreter._patch_lang_tensor


def _with_index(tensor, *rest):
    """Let range() have the interpreter's numbers, which are arrays of length 1: NumPy 2.4 minds."""
    undo = _patch(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.item())
    return undo


interpreter._patch_lang_tensor = _with_index
