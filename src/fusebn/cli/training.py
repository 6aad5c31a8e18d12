"""Training: the loss, the optimizer, and the loop that a user of fusebn would write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from fusebn.cli.digits import Digits
from fusebn.cli.network import Array, Network

BATCH = 64
RATE = 0.003


def train(
    network: Network, digits: Digits, epochs: int, seed: int, *, update: bool = True
) -> Iterator[float]:
    """Train, and yield the loss of each step.

    `update` False is a mistake made for show: batches normalize, but no moving average learns.
    """
    rng = np.random.default_rng(seed)
    steps = steps_per_epoch(digits)
    adam = Adam(epochs * steps)
    for _ in range(epochs):
        order = rng.permutation(len(digits.labels))
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            logits = network(digits.images[batch], training=True, update=update)
            loss, dlogits = cross_entropy(logits, digits.labels[batch])
            adam.step(network.backward(dlogits))
            yield loss


def steps_per_epoch(digits: Digits) -> int:
    """Return the number of full batches; what is left of an epoch waits for the next."""
    return len(digits.labels) // BATCH


def predict(network: Network, images: Array) -> Array:
    """Return the digit that each image shows, in inference mode."""
    digits: Array = network(images, training=False).argmax(axis=1)
    return digits


def accuracy(network: Network, digits: Digits) -> float:
    """Return the share of digits that are recognized in inference mode."""
    return float(np.mean(predict(network, digits.images) == digits.labels))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean loss of a batch, and the gradient of its logits."""
    rows = np.arange(len(labels))
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), dlogits / len(labels)


class Adam:
    """Kingma and Ba (2015), with a rate that falls to 0 along half a cosine."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._averages: list[tuple[Array, Array]] = []

    def step(self, gradients: Iterable[tuple[Array, Array]]) -> None:
        """Move each parameter, in place, against its gradient."""
        rate = RATE * (1 + np.cos(np.pi * self._step / self._steps)) / 2
        self._step += 1
        rate *= np.sqrt(1 - 0.999**self._step) / (1 - 0.9**self._step)
        for i, (parameter, gradient) in enumerate(gradients):
            if i == len(self._averages):
                self._averages.append((np.zeros_like(parameter), np.zeros_like(parameter)))
            mean, square = self._averages[i]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            parameter -= np.float32(rate) * mean / (np.sqrt(square) + 1e-8)
