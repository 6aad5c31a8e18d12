"""The demo with TensorFlow: a graph, a session, a placeholder for is_training, a Saver."""

from __future__ import annotations

import os
from pathlib import Path

from fusebn.cli.output import hushed

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with hushed():  # whatever that level, it greets whoever imports it
    import tensorflow as tf

from fusebn.cli.demo.findings import batch_size_one, inference_leaves_no_trace
from fusebn.cli.demo.network import DENSE
from fusebn.cli.demo.quantized import quantization
from fusebn.cli.demo.tensorflow.findings import forgotten_updates, one_op_a_layer, restored
from fusebn.cli.demo.tensorflow.network import Network
from fusebn.cli.demo.tensorflow.quantized import Quantizable
from fusebn.cli.demo.watch import Course, Study, watch

FRAMEWORK = f"TensorFlow {tf.__version__}"
EPOCHS = 20
NETWORK = DENSE
MODEL = ".ckpt"


def study(course: Course, model: Path) -> Study:
    """Train, save the model, and show what there is to see."""
    training, held_out, epochs, seed, _ = course
    network, forgetful, in_place = Network(seed), Network(seed), Network(seed, None)
    history = watch("training", network, network.train(training, epochs, seed), course)
    losses = forgetful.train(training, epochs, seed, update=False)
    watch("no update", forgetful, losses, course)
    watch("in place", in_place, in_place.train(training, epochs, seed), course)
    quantizable = Quantizable(seed)

    def as_trained() -> Quantizable:
        quantizable.restore(model)
        quantizable.bits = 0
        return quantizable

    return Study(
        network,
        history,
        [
            one_op_a_layer(network),
            inference_leaves_no_trace(
                network,
                network.infer,
                held_out,
                "The layers' variables, while is_training is False and UPDATE_OPS run anyway.",
            ),
            forgotten_updates(network, forgetful, in_place, training, held_out),
            batch_size_one(network, held_out),
            restored(network, quantizable, held_out, model),
        ],
        quantization(
            network.first(),
            as_trained,
            course,
            "The number of bits is a placeholder: one graph trains and infers in floating point "
            "and with any of them.",
            "fusebn.fold, by the variables of a session.",
        ),
    )
