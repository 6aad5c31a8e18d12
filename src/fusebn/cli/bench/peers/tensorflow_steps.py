"""Training steps in TensorFlow, ours and its own: one graph, one session, one process.

A step runs y, the statistics, and the gradients of x, scale and offset, and fetches nothing; called
so, a session costs less than a `tf.function`. Tensors are variables, which no optimizer of graphs
can fold. The moving statistics are not updated: that is the same small work for everybody.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import fusebn
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers.tensorflow import TensorFlow
from fusebn.cli.bench.suites import TENSORFLOW, Step


class Steps:
    """The peer. TensorFlow's own functions know ranks 4 and 5, so everybody gets these."""

    def __init__(self, threads: int) -> None:
        self._peer = TensorFlow(threads)
        self.version = self._peer.version
        self._tf = self._peer.tf
        self._nn = importlib.import_module("fusebn.tensorflow").nn
        self._config = self._tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads)
        self._session: Any = None
        fusebn.set_num_threads(threads)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        if self._session is not None:
            self._session.close()
        self._peer.load(case, data)
        tf, v1, peer = self._tf, self._tf.compat.v1, self._peer
        values = [peer.dy, peer.x, peer.scale, peer.offset, peer.mean, peer.variance]
        self._targets: dict[str, list[Any]] = {}
        with tf.Graph().as_default():
            fed = [v1.placeholder(value.dtype, value.shape) for value in values]
            variables = [v1.Variable(tensor, use_resource=True) for tensor in fed]
            dy, x, scale, offset, *moving = (variable.read_value() for variable in variables)
            self._is_training = v1.placeholder(tf.bool, [])
            for name in TENSORFLOW.steps:
                y, *statistics = getattr(self, f"_{name}")(x, scale, offset, *moving)
                gradients = tf.gradients(y, [x, scale, offset], dy)
                self._targets[name] = [y, *gradients, *statistics]
            self._session = v1.Session(config=self._config)
            feed = {tensor: value.numpy() for tensor, value in zip(fed, values, strict=True)}
            self._session.run([variable.initializer for variable in variables], feed)

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        operations = [tensor.op for tensor in self._targets[step.name]]
        run = self._session.make_callable(operations, [self._is_training])
        return lambda: run(True)

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer; the statistics are compared where they are the fused op's."""
        fetched = self._session.run(self._targets[step.name], {self._is_training: True})
        answer = dict(
            zip(("y", "dx", "dscale", "doffset", "mean", "variance"), fetched, strict=True)
        )
        for name in ("y", "dx"):
            answer[name] = answer[name].reshape(self._peer.case.dims)
        if step.name == "moments":
            del answer["mean"], answer["variance"]
        return answer

    def _fusebn(self, x: Any, scale: Any, offset: Any, *moving: Any) -> Any:
        return self._nn.fused_batch_norm(
            x, scale, offset, epsilon=EPSILON, data_format=self._peer.format
        )

    def _flag(self, x: Any, scale: Any, offset: Any, *moving: Any) -> Any:
        return self._nn.fused_batch_norm(
            x, scale, offset, *moving, EPSILON, self._peer.format, self._is_training
        )

    def _fused(self, x: Any, scale: Any, offset: Any, *moving: Any) -> Any:
        return self._tf.compat.v1.nn.fused_batch_norm(
            x, scale, offset, epsilon=EPSILON, data_format=self._peer.format
        )

    def _cond(self, x: Any, *parameters: Any) -> Any:
        fused = self._tf.compat.v1.nn.fused_batch_norm
        options = {"epsilon": EPSILON, "data_format": self._peer.format}
        return self._tf.cond(
            self._is_training,
            lambda: fused(x, *parameters[:2], **options),
            lambda: fused(x, *parameters, is_training=False, **options),
        )

    def _moments(self, x: Any, scale: Any, offset: Any, *moving: Any) -> Any:
        tf, channel = self._tf, self._peer.format.index("C")
        axes = [axis for axis in range(x.shape.rank) if axis != channel]
        mean, variance = tf.nn.moments(x, axes, keepdims=True)
        scale, offset = (
            tf.cast(tf.reshape(vector, mean.shape), x.dtype) for vector in (scale, offset)
        )
        y = tf.nn.batch_normalization(x, mean, variance, offset, scale, EPSILON)
        return y, mean, variance


create = Steps
