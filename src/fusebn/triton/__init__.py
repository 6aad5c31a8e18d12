"""The four verbs on a GPU, in Triton: moments, normalize, backward_sums, backward.

They take PyTorch's tensors and promise what `csrc/core/batch_norm.h` promises. Their callers are in
``fusebn.torch``; nothing here knows a module or an argument rule.

No GPU has run them yet: what is known of them is what Triton's interpreter computes and what its
compiler makes. Nothing about their speed has been measured.
"""

from fusebn.triton._fused import forward, gradient
from fusebn.triton._verbs import (
    Block,
    Flowing,
    Normalization,
    Returned,
    Statistics,
    backward,
    backward_sums,
    moments,
    normalize,
)

__all__ = [
    "Block",
    "Flowing",
    "Normalization",
    "Returned",
    "Statistics",
    "backward",
    "backward_sums",
    "forward",
    "gradient",
    "moments",
    "normalize",
]
