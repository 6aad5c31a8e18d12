"""The demo with JAX: a residual network of Flax, with Flax's batch norms and with ours."""

from __future__ import annotations

from pathlib import Path

import jax

from fusebn.cli.demo.findings import batch_size_one, inference_leaves_no_trace
from fusebn.cli.demo.images import EPOCHS, RESIDUAL
from fusebn.cli.demo.jax.findings import (
    bright_background,
    flaxs_and_ours,
    loaded_without_fusebn,
    one_program,
)
from fusebn.cli.demo.jax.network import Network
from fusebn.cli.demo.watch import Course, Study, watch

__all__ = ["EPOCHS", "FRAMEWORK", "MODEL", "NETWORK", "study"]

FRAMEWORK = f"JAX {jax.__version__}"
NETWORK = RESIDUAL
MODEL = ".msgpack"


def study(course: Course, model: Path) -> Study:
    """Train, save the model, and show what there is to see."""
    training, held_out, epochs, seed, _ = course
    networks = Network(seed, ours=False), Network(seed, ours=True)
    flaxs, ours = (
        watch(name, network, network.train(training, epochs, seed), course)
        for name, network in zip(("Flax's", "ours"), networks, strict=True)
    )
    network = networks[1]
    return Study(
        network,
        ours,
        [
            flaxs_and_ours(networks, (flaxs, ours), course),
            one_program(networks, held_out),
            inference_leaves_no_trace(
                network,
                network.infer,
                held_out,
                "The parameters and batch_stats of each layer; what comes back is kept.",
            ),
            bright_background(held_out),
            batch_size_one(network, held_out),
            loaded_without_fusebn(network, held_out, model),
        ],
    )
