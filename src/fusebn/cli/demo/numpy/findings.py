"""What the network in NumPy shows besides: updates that were forgotten, and a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from fusebn import Moments
from fusebn.cli.demo import findings
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.network import Array, accuracy, chunks
from fusebn.cli.demo.numpy.network import Network

# How a new process reads the network: model, images, and where the logits go.
_RELOAD = """
import sys
import numpy
from fusebn.cli.demo.numpy.network import Network
network = Network.load(sys.argv[1])
numpy.save(sys.argv[3], network(numpy.load(sys.argv[2]), training=False))
"""


def recalibrate(network: Network, images: Array) -> None:
    """Set all moving statistics to those of the images, layer by layer, in one pass each."""
    inputs = chunks(images)
    for dense, norm in network.hidden:
        inputs = [dense(x) for x in inputs]
        exact = sum((Moments.of(x, axes=0) for x in inputs), Moments())
        norm.moving_mean[...] = exact.mean
        norm.moving_variance[...] = exact.variance(norm.correction)
        inputs = [norm(x, training=False) for x in inputs]


def forgotten_update(
    network: Network, forgetful: Network, training: Digits, held_out: Digits
) -> Finding:
    """Show what a network loses whose moving statistics were never updated, and the cure."""
    (_, norm), (_, never) = network.hidden[0], forgetful.hidden[0]
    right, wrong = accuracy(network, *held_out), accuracy(forgetful, *held_out)
    in_training = accuracy(forgetful, *held_out, training=True)
    updates = str(never.num_updates)
    recalibrate(forgetful, training.images)
    cured = accuracy(forgetful, *held_out)
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
    return findings.reloaded(
        "Saved, and loaded in a new process",
        "One safetensors file holds weights, statistics and their conventions (decay, epsilon, "
        "correction, number of updates); another Python reads it and judges the held-out digits.",
        {"bytes in the file": f"{model.stat().st_size:,}"},
        network.logits(digits.images),
        there,
    )
