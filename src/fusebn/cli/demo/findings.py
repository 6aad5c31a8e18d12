"""What people get wrong about batch normalization, each shown in numbers on a trained network.

Here is what any framework's network can show; the rest stands beside each network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fusebn import Moments
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.network import CHUNK, CORRECTION, Array, First, Network

_BATCH_SIZES = (1, 2, 4, 16, 64)
_BACKGROUNDS = (0, 100, 1000, 10_000)


class Finding(NamedTuple):
    """A table and the sentence it proves; the terminal and the report show the same."""

    title: str
    lesson: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.1f} %"


def moving_statistics(first: First, exact: Moments, channels: Sequence[int]) -> Finding:
    """Compare the first layer's moving statistics with those of the whole training set."""
    variance = exact.variance(CORRECTION)
    gap = np.median(np.abs(first.moving_mean - exact.mean) / np.sqrt(variance))
    ratio = np.median(np.abs(first.moving_variance / variance - 1))
    return Finding(
        "Moving statistics become the population's",
        f"fusebn.Moments gives the exact values: {exact.count:,.0f} images in chunks of {CHUNK}, "
        f"merged. For half of the {len(variance)} channels of the first layer the moving mean is "
        f"within {gap:.2f} standard deviations and the moving variance within {percent(ratio)}.",
        ("channel", "moving mean", "population", "moving variance", "population"),
        [
            (
                str(c),
                f"{first.moving_mean[c]:.3f}",
                f"{exact.mean[c]:.3f}",
                f"{first.moving_variance[c]:.3f}",
                f"{variance[c]:.3f}",
            )
            for c in channels
        ],
    )


def inference_leaves_no_trace(
    network: Network, infer: Callable[[Array], object], digits: Digits, lesson: str
) -> Finding:
    """Count the bytes of the normalizations' state that inference changes."""
    before = network.state()
    for image in digits.images:
        infer(image[None])
    infer(digits.images)
    after = network.state()
    return Finding(
        "Inference changes nothing",
        f"{lesson} Compared bit for bit before and after {len(digits.images)} images one by one "
        f"and then all at once.",
        ("state", "bytes", "changed"),
        [
            (name, f"{len(old):,}", str(sum(a != b for a, b in zip(old, after[name], strict=True))))
            for name, old in before.items()
        ],
    )


def batch_size_one(network: Network, digits: Digits) -> Finding:
    """Compare both modes where the batch is small."""

    def share_right(size: int, training: bool) -> str:
        starts = range(0, len(digits.labels), size)
        logits = [network.logits(digits.images[i : i + size], training=training) for i in starts]
        return percent(float(np.mean(np.concatenate(logits).argmax(axis=1) == digits.labels)))

    return Finding(
        "Training mode at inference, batch size 1",
        "In training mode a batch of one is normalized by itself: nothing is left of it, and every "
        "image gets the same answer. In inference mode the batch size does not matter.",
        ("batch size", "training mode", "inference mode"),
        [
            (str(size), share_right(size, True), share_right(size, False))
            for size in (*_BATCH_SIZES, len(digits.labels))
        ],
    )


def folded_into(residual: bool, activation: str | None) -> str:
    """Name what `fuse` made a part of a batch norm."""
    parts = ["addition"] * residual + [activation or ""]
    return ", ".join(part for part in parts if part) or "nothing"


def far_from_zero(
    layers: Mapping[str, Callable[[Array], Array]], digits: Digits, lesson: str
) -> Finding:
    """Normalize pixels on brighter and brighter backgrounds: the standard deviation must be 1."""
    images = digits.images.reshape(-1, 8, 8, 1)

    def deviation(normalize: Callable[[Array], Array], background: int) -> str:
        return f"{np.std(normalize(images + np.float32(background)), dtype=np.float64):.4f}"

    return Finding(
        "A bright background",
        f"{lesson} The pixels of the held-out images, 0 to 1, with a number added, normalized by "
        f"one layer in training mode. Their standard deviation should stay the same.",
        ("added", *layers),
        [
            (f"{background:,}", *(deviation(layer, background) for layer in layers.values()))
            for background in _BACKGROUNDS
        ],
    )


def reloaded(title: str, lesson: str, sizes: dict[str, str], here: Array, there: Array) -> Finding:
    """Compare the logits of a network with those of the one that was read from its files."""
    same = np.count_nonzero(here.argmax(axis=1) == there.argmax(axis=1))
    return Finding(
        title,
        lesson,
        (*sizes, "same predictions", "largest difference of a logit"),
        [(*sizes.values(), f"{same} of {len(there)}", f"{np.abs(here - there).max():g}")],
    )
