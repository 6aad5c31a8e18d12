"""Training: the loss, the optimizer, and the loop that a user of fusebn would write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.network import Array
from fusebn.cli.demo.numpy.network import Network
from fusebn.cli.demo.schedule import RATE, batches


def train(
    network: Network,
    digits: Digits,
    epochs: int,
    seed: int,
    *,
    update: bool = True,
    rate: float = RATE,
) -> Iterator[float]:
    """Train, and yield the loss of each step.

    `update` False is a mistake made for show: batches normalize, but no moving average learns.
    """
    adam = Adam()
    for (images, labels), now in batches(digits, epochs, seed, rate):
        logits = network(images, training=True, update=update)
        loss, dlogits = cross_entropy(logits, labels)
        adam.step(now, network.backward(dlogits))
        yield loss


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean loss of a batch, and the gradient of its logits."""
    rows = np.arange(len(labels))
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), dlogits / len(labels)


class Adam:
    """Kingma and Ba (2015)."""

    def __init__(self) -> None:
        self._step = 0
        self._averages: list[tuple[Array, Array]] = []

    def step(self, rate: float, gradients: Iterable[tuple[Array, Array]]) -> None:
        """Move each parameter, in place, against its gradient."""
        self._step += 1
        rate *= np.sqrt(1 - 0.999**self._step) / (1 - 0.9**self._step)
        for i, (parameter, gradient) in enumerate(gradients):
            if i == len(self._averages):
                self._averages.append((np.zeros_like(parameter), np.zeros_like(parameter)))
            mean, square = self._averages[i]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            parameter -= np.float32(rate) * mean / (np.sqrt(square) + 1e-8)
