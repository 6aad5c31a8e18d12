"""The network of the demo, whatever trains it: its shape, and what the report asks of it.

::

    images -> Dense -> batch norm + ReLU -> Dense -> batch norm + ReLU -> Dense -> logits

(With PyTorch, JAX and Keras it is a small convolutional one: see `images`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fusebn import Moments

Array = NDArray[Any]

WIDTHS = (64, 256, 128, 10)
DENSE = f"Dense layers {' - '.join(map(str, WIDTHS))}, between them batch normalization and ReLU."
DECAY = 0.9  # An average over about ten batches keeps up with weights that still move.
EPSILON = 1e-3
CORRECTION = 1  # The moving variance divides by n - 1.

CHUNK = 500


def _itself(images: Array) -> Array:
    return images


class First(NamedTuple):
    """A copy of the first layer: its weight, and the moving statistics of what comes out of it."""

    weight: Array
    moving_mean: Array
    moving_variance: Array
    rows: Callable[[Array], Array] = _itself  # from images to what the weight multiplies

    def out(self, images: Array) -> Array:
        """Return what comes out: rows of channels."""
        return self.rows(images) @ self.weight

    def population(self, images: Array) -> Moments:
        """Return the exact moments that the moving statistics approach; any number of images."""
        return sum((Moments.of(self.out(x), axes=0) for x in chunks(images)), Moments())


class Network(Protocol):
    """A network that can be watched and judged."""

    def first(self) -> First:
        """Return the first layer as it is now."""

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """Return the logits in either mode, without updating anything."""

    def state(self) -> dict[str, bytes]:
        """Return all that the normalizations hold, by name."""


def chunks(images: Array) -> list[Array]:
    """Cut images into parts that fit in memory, however many there are."""
    return [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]


def predict(network: Network, images: Array) -> Array:
    """Return the digit that each image shows, in inference mode."""
    digits: Array = network.logits(images).argmax(axis=1)
    return digits


def accuracy(network: Network, images: Array, labels: Array, *, training: bool = False) -> float:
    """Return the share of images that are recognized."""
    return float(np.mean(network.logits(images, training=training).argmax(axis=1) == labels))
