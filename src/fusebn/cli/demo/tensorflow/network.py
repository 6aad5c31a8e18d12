"""The network as a graph with a session, as a user of TensorFlow 1 would write it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.network import CORRECTION, DECAY, EPSILON, WIDTHS, Array, First
from fusebn.cli.demo.schedule import RATE, batches
from fusebn.tensorflow import layers

v1 = tf.compat.v1

UPDATE_OPS = v1.GraphKeys.UPDATE_OPS

# The matrices are small: threads would gain nothing, and add their sums in any order.
_CONFIG = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)


def dense(x: Any, width: int) -> Any:
    """Return ``x @ kernel``, without a bias: the offset of a normalization that follows is one."""
    he = v1.variance_scaling_initializer(2.0, distribution="untruncated_normal")
    return x @ v1.get_variable("kernel", [x.shape[1], width], initializer=he)


class Network:
    """A graph that trains and infers, and a session with its variables."""

    def __init__(
        self,
        seed: int,
        updates_collections: str | None = UPDATE_OPS,
        quantizers: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        with tf.Graph().as_default() as self.graph:
            v1.set_random_seed(seed)
            self.images = v1.placeholder(tf.float32, [None, WIDTHS[0]], "images")
            self.labels = v1.placeholder(tf.int64, [None], "labels")
            self.rate = v1.placeholder(tf.float32, [], "rate")
            self.is_training = v1.placeholder_with_default(False, [], "is_training")

            options = quantizers()
            x = self.images
            for i, width in enumerate(WIDTHS[1:-1]):
                with v1.variable_scope(f"hidden{i}"):
                    x = layers.batch_norm(
                        dense(x, width),
                        decay=DECAY,
                        scale=True,
                        epsilon=EPSILON,
                        activation_fn=tf.nn.relu,
                        updates_collections=updates_collections,
                        is_training=self.is_training,
                        correction=CORRECTION,
                        **options,
                    )
            with v1.variable_scope("last"):
                self._logits = dense(x, WIDTHS[-1])

            self.variables = {v.op.name: v for v in v1.global_variables()}
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self.labels, self._logits)
            self.loss = tf.reduce_mean(losses)
            self.step = v1.train.AdamOptimizer(self.rate).minimize(self.loss)
            self.updates = v1.get_collection(UPDATE_OPS)
            self.saver = v1.train.Saver()
            self.session = v1.Session(config=_CONFIG)
            self.session.run(v1.global_variables_initializer())

    def train(
        self,
        digits: Digits,
        epochs: int,
        seed: int,
        *,
        update: bool = True,
        rate: float = RATE,
    ) -> Iterator[float]:
        """Train, and yield the loss of each step.

        `update` False is a mistake made for show: nobody runs UPDATE_OPS.
        """
        fetches = [self.loss, self.step, *(self.updates if update else [])]
        for batch, now in batches(digits, epochs, seed, rate):
            feed = {
                self.images: batch.images,
                self.labels: batch.labels,
                self.rate: now,
                self.is_training: True,
                **self.fed(),
            }
            yield float(self.session.run(fetches, feed)[0])

    def fed(self) -> dict[Any, Any]:
        """Return what is fed besides."""
        return {}

    def recalibrate(self, digits: Digits) -> None:
        """Run UPDATE_OPS, and nothing else, over the digits once."""
        for batch, _ in batches(digits, 1, 0):
            self.session.run(self.updates, {self.images: batch.images, self.is_training: True})

    def infer(self, images: Array) -> None:
        """Run all that could leave a trace in inference mode: UPDATE_OPS too."""
        self.session.run([self._logits, self.updates], {self.images: images})

    def ops(self) -> Counter[str]:
        """Return how many ops of each type the graph has, in the functions it calls too."""
        graph = self.graph.as_graph_def()
        inner = [node for function in graph.library.function for node in function.node_def]
        return Counter(node.op for node in [*graph.node, *inner])

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        with self.graph.as_default():
            try:
                self.saver.save(self.session, str(path), write_meta_graph=False, write_state=False)
            except tf.errors.OpError as error:  # a full disk, in TensorFlow's words
                # The reason is one line; before it may stand where, and after it which node.
                reason = error.message.partition("\n\t [[")[0].splitlines()[-1]
                raise OSError(reason) from error

    def restore(self, path: Path) -> None:
        """Take over the variables that `save` wrote."""
        with self.graph.as_default():
            self.saver.restore(self.session, str(path))

    # What the report asks of a network.

    def first(self) -> First:
        """See :class:`fusebn.cli.demo.network.Network`."""
        names = ("kernel", "BatchNorm/moving_mean", "BatchNorm/moving_variance")
        return First(*self.session.run([self.variables[f"hidden0/{name}"] for name in names]))

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """See :class:`fusebn.cli.demo.network.Network`."""
        feed = {self.images: images, self.is_training: training, **self.fed()}
        logits: Array = self.session.run(self._logits, feed)
        return logits

    def state(self) -> dict[str, bytes]:
        """See :class:`fusebn.cli.demo.network.Network`."""
        values = self.session.run(self.variables)
        return {name: values[name].tobytes() for name in values if "BatchNorm" in name}
