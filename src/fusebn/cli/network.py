"""A network with batch normalization, written as a user of fusebn would write one.

::

    images -> Dense -> BatchNorm + ReLU -> Dense -> BatchNorm + ReLU -> Dense -> logits
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusebn import BatchNorm, load, save

Array = NDArray[Any]

WIDTHS = (64, 256, 128, 10)
DECAY = 0.9  # An average over about ten batches keeps up with weights that still move.


class Dense:
    """``y = x @ weight``, without a bias: the offset of the normalization that follows is one."""

    def __init__(self, weight: Array) -> None:
        self.weight = weight

    def __call__(self, x: Array) -> Array:
        """Return y, and keep x for `backward`."""
        self._x = x
        return x @ self.weight

    def backward(self, dy: Array) -> tuple[Array, Array]:
        """Return the gradients of x and of the weight."""
        return dy @ self.weight.T, self._x.T @ dy


class Network:
    """Hidden layers, each a Dense and a BatchNorm with ReLU, and a Dense for the logits."""

    def __init__(self, hidden: list[tuple[Dense, BatchNorm]], last: Dense) -> None:
        self.hidden, self.last = hidden, last

    @classmethod
    def new(cls, rng: np.random.Generator) -> Network:
        """Return an untrained network; its weights are drawn as He et al. (2015) advise."""
        *hidden, last = (
            Dense(rng.normal(0, np.sqrt(2 / rows), (rows, columns)).astype(np.float32))
            for rows, columns in pairwise(WIDTHS)
        )
        norms = [BatchNorm(width, decay=DECAY, activation="relu") for width in WIDTHS[1:-1]]
        return cls(list(zip(hidden, norms, strict=True)), last)

    def __call__(self, x: Array, *, training: bool, update: bool | None = None) -> Array:
        """Return the logits; the two switches are those of :class:`fusebn.BatchNorm`."""
        for dense, norm in self.hidden:
            x = norm(dense(x), training=training, update=update)
        return self.last(x)

    def backward(self, dlogits: Array) -> Iterator[tuple[Any, Any]]:
        """Yield each parameter with its gradient, after a call."""
        dx, dweight = self.last.backward(dlogits)
        yield self.last.weight, dweight
        for dense, norm in reversed(self.hidden):
            gradient = norm.backward(dx)
            dx, dweight = dense.backward(gradient.dx)
            yield norm.scale, gradient.dscale
            yield norm.offset, gradient.doffset
            yield dense.weight, dweight

    def save(self, path: Path) -> None:
        """Write the network to a safetensors file."""
        layers: dict[str, Any] = {"last": self.last.weight}
        for i, (dense, norm) in enumerate(self.hidden):
            layers |= {f"dense{i}": dense.weight, f"norm{i}": norm}
        save(path, layers)

    @classmethod
    def load(cls, path: Path) -> Network:
        """Return the network that `save` wrote."""
        layers = load(path)
        depth = len(layers) // 2
        hidden = [(Dense(layers[f"dense{i}"]), layers[f"norm{i}"]) for i in range(depth)]
        return cls(hidden, Dense(layers["last"]))
