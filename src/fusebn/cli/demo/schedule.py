"""The schedule of training, whatever the framework: the batches, and the rate of each step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fusebn.cli.demo.digits import Digits

BATCH = 64
RATE = 0.003


def steps_per_epoch(digits: Digits) -> int:
    """Return the number of full batches; what is left of an epoch waits for the next."""
    return len(digits.labels) // BATCH


def batches(
    digits: Digits, epochs: int, seed: int, rate: float = RATE
) -> Iterator[tuple[Digits, float]]:
    """Yield the batch of each step, and its rate, which falls to 0 along half a cosine."""
    rng = np.random.default_rng(seed)
    steps, step = steps_per_epoch(digits), 0
    for _ in range(epochs):
        order = rng.permutation(len(digits.labels))
        for batch in order[: steps * BATCH].reshape(steps, BATCH):
            now = rate * (1 + np.cos(np.pi * step / (epochs * steps))) / 2
            yield Digits(digits.images[batch], digits.labels[batch]), float(now)
            step += 1
