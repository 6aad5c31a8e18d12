"""What people get wrong about batch normalization, each shown in numbers on a trained network."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusebn import Moments
from fusebn.cli.digits import Digits
from fusebn.cli.network import Array, Network
from fusebn.cli.training import accuracy, predict

_CHUNK = 500
_BATCH_SIZES = (1, 2, 4, 16, 64)

# How a new process reads the network: model, images, and where the logits go.
_RELOAD = """
import sys
import numpy
from fusebn.cli.network import Network
network = Network.load(sys.argv[1])
numpy.save(sys.argv[3], network(numpy.load(sys.argv[2]), training=False))
"""


class Finding(NamedTuple):
    """A table and the sentence it proves; the terminal and the report show the same."""

    title: str
    lesson: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.1f} %"


def population(network: Network, images: Array) -> Moments:
    """Return the moments of what reaches the first normalization, over any number of images."""
    dense, _ = network.hidden[0]
    return sum((Moments.of(dense(chunk), axes=0) for chunk in _chunks(images)), Moments())


def recalibrate(network: Network, images: Array) -> None:
    """Set all moving statistics to those of the images, layer by layer, in one pass each."""
    inputs = _chunks(images)
    for dense, norm in network.hidden:
        inputs = [dense(x) for x in inputs]
        exact = sum((Moments.of(x, axes=0) for x in inputs), Moments())
        norm.moving_mean[...] = exact.mean
        norm.moving_variance[...] = exact.variance(norm.correction)
        inputs = [norm(x, training=False) for x in inputs]


def _chunks(images: Array) -> list[Array]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]


def moving_statistics(network: Network, exact: Moments, channels: list[int]) -> Finding:
    """Compare the first layer's moving statistics with those of the whole training set."""
    _, norm = network.hidden[0]
    variance = exact.variance(norm.correction)
    gap = np.median(np.abs(norm.moving_mean - exact.mean) / np.sqrt(variance))
    ratio = np.median(np.abs(norm.moving_variance / variance - 1))
    return Finding(
        "Moving statistics become the population's",
        f"fusebn.Moments gives the exact values: {exact.count:,.0f} images in chunks of {_CHUNK}, "
        f"merged. For half of the {norm.channels} channels of the first layer the moving mean is "
        f"within {gap:.2f} standard deviations and the moving variance within {percent(ratio)}.",
        ("channel", "moving mean", "population", "moving variance", "population"),
        [
            (
                str(c),
                f"{norm.moving_mean[c]:.3f}",
                f"{exact.mean[c]:.3f}",
                f"{norm.moving_variance[c]:.3f}",
                f"{variance[c]:.3f}",
            )
            for c in channels
        ],
    )


def inference_leaves_no_trace(network: Network, digits: Digits) -> Finding:
    """Count the bytes of the layers' state that inference changes."""

    def state() -> list[bytes]:
        states = [norm.state_dict() for _, norm in network.hidden]
        return [b"".join(state[key].tobytes() for key in sorted(state)) for state in states]

    before = state()
    for image in digits.images:
        network(image[None], training=False)
    network(digits.images, training=False)
    rows = [
        (str(i), f"{len(old):,}", str(sum(a != b for a, b in zip(old, new, strict=True))))
        for i, (old, new) in enumerate(zip(before, state(), strict=True), 1)
    ]
    return Finding(
        "Inference changes nothing",
        f"The whole state of each normalization, compared bit for bit before and after "
        f"{len(digits.images)} images one by one and then all at once.",
        ("normalization", "bytes of state", "bytes changed"),
        rows,
    )


def forgotten_update(
    network: Network, forgetful: Network, train: Digits, held_out: Digits
) -> Finding:
    """Show what a network loses whose moving statistics were never updated, and the cure."""
    (_, norm), (_, never) = network.hidden[0], forgetful.hidden[0]
    right, wrong = accuracy(network, held_out), accuracy(forgetful, held_out)
    logits = forgetful(held_out.images, training=True, update=False)
    in_training = float(np.mean(logits.argmax(axis=1) == held_out.labels))
    updates = str(never.num_updates)
    recalibrate(forgetful, train.images)
    cured = accuracy(forgetful, held_out)
    return Finding(
        "A forgotten update of the moving statistics",
        f"The same training from the same seed with update=False. Measured as it trains, with the "
        f"statistics of the batch, the network looks healthy. In inference mode it loses "
        f"{100 * (right - wrong):.1f} points. One pass of fusebn.Moments over the training images "
        f"repairs it without training.",
        ("network", "updates", "mode", "accuracy"),
        [
            ("updated at every step", str(norm.num_updates), "inference", percent(right)),
            ("update forgotten", updates, "training", percent(in_training)),
            ("update forgotten", updates, "inference", percent(wrong)),
            ("repaired by Moments", updates, "inference", percent(cured)),
        ],
    )


def batch_size_one(network: Network, digits: Digits) -> Finding:
    """Compare both modes where the batch is small."""

    def share_right(size: int, training: bool) -> float:
        starts = range(0, len(digits.labels), size)
        logits = [
            network(digits.images[i : i + size], training=training, update=False) for i in starts
        ]
        return float(np.mean(np.concatenate(logits).argmax(axis=1) == digits.labels))

    return Finding(
        "Training mode at inference, batch size 1",
        "In training mode a batch of one is normalized by itself: nothing is left of it, and every "
        "image gets the same answer. In inference mode the batch size does not matter.",
        ("batch size", "training mode", "inference mode"),
        [
            (str(size), percent(share_right(size, True)), percent(share_right(size, False)))
            for size in (*_BATCH_SIZES, len(digits.labels))
        ],
    )


def reloaded(network: Network, digits: Digits, model: Path) -> Finding:
    """Save the network, load it in a new process, and compare the predictions."""
    network.save(model)
    inputs, outputs = model.with_name("images.npy"), model.with_name("logits.npy")
    np.save(inputs, digits.images)
    command = [sys.executable, "-c", _RELOAD, str(model), str(inputs), str(outputs)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        there = np.load(outputs)
    finally:
        inputs.unlink()
        outputs.unlink(missing_ok=True)
    here = network(digits.images, training=False)
    same = np.count_nonzero(there.argmax(axis=1) == predict(network, digits.images))
    return Finding(
        "Saved, and loaded in a new process",
        "One safetensors file holds weights, statistics and their conventions (decay, epsilon, "
        "correction, number of updates); another Python reads it and judges the held-out digits.",
        ("bytes in the file", "same predictions", "largest difference of a logit"),
        [
            (
                f"{model.stat().st_size:,}",
                f"{same} of {len(there)}",
                f"{np.abs(here - there).max():g}",
            )
        ],
    )
