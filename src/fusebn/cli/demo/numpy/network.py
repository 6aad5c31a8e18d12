"""The network as a user of fusebn would write it with NumPy alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusebn import BatchNorm, load, save
from fusebn.cli.demo.network import CORRECTION, DECAY, EPSILON, WIDTHS, Array, First


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
        norms = [
            BatchNorm(width, decay=DECAY, epsilon=EPSILON, correction=CORRECTION, activation="relu")
            for width in WIDTHS[1:-1]
        ]
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

    # What the report asks of a network.

    def first(self) -> First:
        """See :class:`fusebn.cli.demo.network.Network`."""
        dense, norm = self.hidden[0]
        return First(dense.weight.copy(), norm.moving_mean.copy(), norm.moving_variance.copy())

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """See :class:`fusebn.cli.demo.network.Network`."""
        return self(images, training=training, update=False)

    def state(self) -> dict[str, bytes]:
        """See :class:`fusebn.cli.demo.network.Network`."""
        states = [norm.state_dict() for _, norm in self.hidden]
        return {
            f"norm{i}": b"".join(state[key].tobytes() for key in sorted(state))
            for i, state in enumerate(states)
        }
