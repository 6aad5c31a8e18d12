"""The digits as images, for networks of convolutions: what those of all frameworks share.

::

    images -> convolution -> batch norm + ReLU -> two residual blocks -> mean -> Dense -> logits
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fusebn.cli.demo.network import Array

SIDE = 8  # pixels
WIDTHS = (16, 32)  # of the two blocks; the second halves the sides
RESIDUAL = "Convolutions with two residual blocks, batch normalization and ReLU."
EPOCHS = 5

# The rates of the schedule are Adam's; SGD takes larger ones. Not Adam: it scales every gradient to
# the size of its noise, the roundings too, and losses could not be compared.
OVER_ADAM = 30
NESTEROV = 0.9


def patches(images: Array) -> Array:
    """Return what the first convolution sees at each pixel, in rows."""
    padded = np.pad(images.reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)))
    return sliding_window_view(padded, (3, 3), axis=(1, 2)).reshape(-1, 9)
