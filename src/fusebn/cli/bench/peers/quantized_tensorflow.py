"""Quantised blocks in TensorFlow: one graph, one session, the flag fed.

By hand is what one writes without this library: `tf.nn.moments`, the statistics that normalize
chosen by a cond, every variable through a cond and a quantizer, `tf.nn.batch_normalization`, ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

import fusebn
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers import quantized
from fusebn.cli.bench.suites import Step
from fusebn.quantize import FakeQuantize
from fusebn.tensorflow import layers

v1 = tf.compat.v1


class Blocks:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.version = tf.__version__
        self._config = v1.ConfigProto(intra_op_parallelism_threads=threads)
        self._session: Any = None
        fusebn.set_num_threads(threads)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        if self._session is not None:
            self._session.close()
        self._case, self._data = case, data
        self._targets: dict[str, list[Any]] = {}
        self._graph = tf.Graph()
        with self._graph.as_default():
            arrays = data.x, data.dy, quantized.kernel(case)
            fed = [v1.placeholder(array.dtype, array.shape) for array in arrays]
            held = [v1.Variable(tensor, trainable=False, use_resource=True) for tensor in fed]
            self._x, self._dy, self._kernel = (variable.read_value() for variable in held)
            self._active, self._training = (v1.placeholder(tf.bool, []) for _ in range(2))
        self._session = v1.Session(graph=self._graph, config=self._config)
        feed = dict(zip(fed, arrays, strict=True))
        self._session.run([variable.initializer for variable in held], feed)

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        with self._graph.as_default(), v1.variable_scope(step.name, use_resource=True) as scope:
            alone = step.name.endswith("alone")
            z = self._x if alone else tf.nn.conv2d(self._x, self._kernel, 1, "SAME")
            by_hand = step.name.startswith("hand")
            y = self._by_hand(z) if by_hand else self._layer(step.name, z)
            sources = [self._x, *v1.trainable_variables(f"{scope.name}/")]
            gradients = tf.gradients(y, sources if alone else [*sources, self._kernel], self._dy)
            updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS, f"{scope.name}/")
            mine = v1.global_variables(f"{scope.name}/")
            self._session.run([variable.initializer for variable in mine])
        self._targets[step.name] = [y, gradients[0]]
        operations = [y.op, *(gradient.op for gradient in gradients), *updates]
        run = self._session.make_callable(operations, [self._active, self._training])
        return lambda: run(True, True)

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        feed = {self._active: True, self._training: True}
        found = self._session.run(self._targets[step.name], feed)
        answer = quantized.answer(found[0], found[1], self._case.axis)
        if step.name.endswith("alone"):  # the others have to agree with each other, not with these
            return {f"{name} alone": array for name, array in answer.items()}
        return answer

    def _initializers(self) -> dict[str, Any]:
        given = {"gamma": self._data.scale, "beta": self._data.offset}
        return {name: v1.constant_initializer(vector) for name, vector in given.items()}

    def _layer(self, step: str, z: Any) -> Any:
        return layers.batch_norm(
            z,
            scale=True,
            epsilon=EPSILON,
            activation_fn=tf.nn.relu,
            is_training=self._training,
            param_initializers=self._initializers(),
            **quantized.options(
                step, lambda: FakeQuantize(quantized.BITS, symmetric=True), self._active
            ),
        )

    def _by_hand(self, z: Any) -> Any:
        quantize = FakeQuantize(quantized.BITS, symmetric=True)
        shape = [self._case.block[1]]
        initializers = self._initializers() | {
            "moving_mean": v1.zeros_initializer(),
            "moving_variance": v1.ones_initializer(),
        }
        gamma, beta, *moving = (
            v1.get_variable(name, shape, initializer=of, trainable=name in ("gamma", "beta"))
            for name, of in initializers.items()
        )
        statistics = list(tf.nn.moments(z, [0, 1, 2]))
        for average, batch in zip(moving, statistics, strict=True):
            update = v1.assign_sub(average, (average - batch) * 0.001)
            v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
        used = tf.cond(self._training, lambda: statistics, lambda: [v.read_value() for v in moving])
        scale, offset, mean, variance = (
            tf.cond(self._active, lambda v=v: quantize(v), lambda v=v: v)
            for v in (gamma.read_value(), beta.read_value(), *used)
        )
        return tf.nn.relu(tf.nn.batch_normalization(z, mean, variance, offset, scale, EPSILON))


create = Blocks
