"""The last act: the normalizations' variables in a few bits, fine-tuned so, then folded away.

One network runs in floating point or with so many bits: its `bits` may be set at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

import fusebn
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.network import Array, First, Network, accuracy
from fusebn.cli.demo.schedule import RATE
from fusebn.cli.demo.watch import Course, watch

BITS = (8, 4)
VARIABLES = ("scale", "offset", "moving_mean", "moving_variance")
# The network is trained: it only has to adapt.
_RATE = RATE / 30


class Quantizable(Network, Protocol):
    """A trained network whose normalizations may run with fewer bits."""

    bits: int  # 0: in floating point

    def train(self, digits: Digits, epochs: int, seed: int, *, rate: float) -> Iterator[float]:
        """Train, and yield the loss of each step."""

    def folded(self, images: Array) -> Array:
        """Return the logits of the same network without normalizations."""


class Tuned(NamedTuple):
    """What came of so many bits: the accuracies, and the logits with and without folding."""

    bits: int
    in_float: float
    quantized: float
    fine_tuned: float
    logits: Array
    folded: Array


class Quantization(NamedTuple):
    """The last act of a study."""

    first: First  # the layer whose variables are shown
    tuned: Sequence[Tuned]
    findings: Sequence[Finding]


def quantization(
    first: First,
    trained: Callable[[], Quantizable],
    course: Course,
    how: str,
    folding: str,
    bits: Sequence[int] = BITS,
) -> Quantization:
    """Fine-tune with each number of bits, from a network as it was `trained`; then fold.

    `how` and `folding` say how the framework does it.
    """
    images, labels = course.training
    some = course._replace(training=Digits(images[::2], labels[::2]), epochs=1)
    tuned = [_tuned(number, trained(), some) for number in bits]
    return Quantization(first, tuned, [_fine_tuning(tuned, how), _folding(tuned, folding)])


def _tuned(bits: int, network: Quantizable, course: Course) -> Tuned:
    held_out = course.held_out
    in_float = accuracy(network, *held_out)
    network.bits = bits
    quantized = accuracy(network, *held_out)
    losses = network.train(course.training, course.epochs, course.seed + 1, rate=_RATE)
    history = watch(f"{bits} bits", network, losses, course)
    logits, folded = network.logits(held_out.images), network.folded(held_out.images)
    return Tuned(bits, in_float, quantized, history.accuracy[-1], logits, folded)


def _fine_tuning(tuned: Sequence[Tuned], how: str) -> Finding:
    return Finding(
        "Quantized fine-tuning, switched on at run time",
        f"Scale, offset, moving mean and moving variance of every normalization pass through "
        f"fusebn.quantize.FakeQuantize; the kernels stay fused. {how} The accuracy with so many "
        f"bits at once, and after a short training with them on half of the digits.",
        ("bits", "floating point", "quantized", "fine-tuned"),
        [
            (str(one.bits), *map(percent, (one.in_float, one.quantized, one.fine_tuned)))
            for one in tuned
        ],
    )


def _folding(tuned: Sequence[Tuned], how: str) -> Finding:
    return Finding(
        "Folded: no normalization is left",
        f"In inference a normalization is one factor and one shift for each channel, which the "
        f"layer before it takes over, as the quantized variables have them. {how}",
        ("bits", "same predictions", "largest difference of a logit"),
        [
            (
                str(one.bits),
                f"{np.count_nonzero(one.logits.argmax(1) == one.folded.argmax(1))} "
                f"of {len(one.logits)}",
                f"{np.abs(one.logits - one.folded).max():.1e}",
            )
            for one in tuned
        ],
    )


def folded_dense(
    images: Array, hidden: Sequence[tuple[Array, Mapping[str, Any]]], last: Array
) -> Array:
    """Return the logits of Dense layers that have taken over the normalizations behind them."""
    x = images
    for weight, norm in hidden:
        kernel, bias = fusebn.fold(weight, None, norm, kind="dense", layout="tensorflow")
        x = np.maximum(x @ kernel + bias, 0)
    logits: Array = x @ last
    return logits
