"""The demo with Keras 3: a residual network as it is, and after `fusebn.keras.fuse`."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from fusebn.cli.output import hushed

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with hushed():  # whatever that level, TensorFlow greets whoever imports it
    import keras

    import fusebn.keras  # noqa: F401

    keras.utils.set_random_seed(0)  # which imports TensorFlow, whatever the backend

from fusebn.cli.demo.findings import inference_leaves_no_trace
from fusebn.cli.demo.images import EPOCHS, RESIDUAL
from fusebn.cli.demo.keras.findings import (
    before_and_after,
    bright_background,
    one_layer,
    padding_alone,
    saved_and_loaded,
)
from fusebn.cli.demo.keras.network import Network
from fusebn.cli.demo.watch import Course, Study, watch

__all__ = ["EPOCHS", "FRAMEWORK", "MODEL", "NETWORK", "study"]

_BACKEND = keras.backend.backend()
FRAMEWORK = f"Keras {keras.__version__} on {_BACKEND} {import_module(_BACKEND).__version__}"
NETWORK = RESIDUAL
MODEL = ".keras"


def study(course: Course, model: Path) -> Study:
    """Train, save the model, and show what there is to see."""
    training, held_out, epochs, seed, _ = course
    if _BACKEND == "torch":  # its threads would gain nothing, and wait long on a busy machine
        import_module(_BACKEND).set_num_threads(1)
    networks = Network(seed), Network(seed, fused=True)
    before, after = (
        watch(name, network, network.train(training, epochs, seed), course)
        for name, network in zip(("as it is", "fused"), networks, strict=True)
    )
    network = networks[1]
    return Study(
        network,
        after,
        [
            before_and_after((before, after), course),
            one_layer(network),
            inference_leaves_no_trace(
                network, network.infer, held_out, "The weights of each batch norm."
            ),
            bright_background(held_out),
            padding_alone(held_out),
            saved_and_loaded(network, held_out, model),
        ],
    )
