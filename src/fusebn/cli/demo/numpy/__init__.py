"""The demo with NumPy alone: `fusebn.BatchNorm`, forward and backward."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusebn.cli.demo.findings import batch_size_one, inference_leaves_no_trace
from fusebn.cli.demo.network import DENSE
from fusebn.cli.demo.numpy.findings import forgotten_update, reloaded
from fusebn.cli.demo.numpy.network import Network
from fusebn.cli.demo.numpy.quantized import Quantizable
from fusebn.cli.demo.numpy.training import train
from fusebn.cli.demo.quantized import BITS, quantization
from fusebn.cli.demo.watch import Course, Study, watch

FRAMEWORK = f"NumPy {np.__version__}"
EPOCHS = 20
NETWORK = DENSE
MODEL = ".safetensors"


def study(course: Course, model: Path) -> Study:
    """Train, save the model, and show what there is to see."""
    training, held_out, epochs, seed, _ = course
    network, forgetful = (Network.new(np.random.default_rng(seed)) for _ in range(2))
    history = watch("training", network, train(network, training, epochs, seed), course)
    losses = train(forgetful, training, epochs, seed, update=False)
    watch("no update", forgetful, losses, course)
    return Study(
        network,
        history,
        [
            inference_leaves_no_trace(
                network, network.logits, held_out, "The whole state of each normalization."
            ),
            forgotten_update(network, forgetful, training, held_out),
            batch_size_one(network, held_out),
            reloaded(network, held_out, model),
        ],
        quantization(
            network.first(),
            lambda: Quantizable(network),
            course,
            "transforms_active is an array of rank 0 that all layers read at each call.",
            "fusebn.fold, by what effective_variables() returns.",
            bits=(*BITS, 3),
        ),
    )
