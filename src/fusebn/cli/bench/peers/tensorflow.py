"""TensorFlow: the fused operation and its gradient; chains in a `tf.function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Array, Case, Data, Verb


class TensorFlow:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.tf: Any = importlib.import_module("tensorflow")
        self.tf.config.threading.set_intra_op_parallelism_threads(threads)
        self.version = self.tf.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer. The operation knows ranks 4 and 5: a shorter shape gets extents of 1."""
        self.case, tf = case, self.tf
        last = case.layout == "channels-last"
        self.format = {True: ("NHWC", "NDHWC"), False: ("NCHW", "NCDHW")}[last][case.rank == 5]
        self.dims = list(case.dims)
        while len(self.dims) < 4:
            self.dims.insert(1 if last else len(self.dims), 1)
        self.x, self.dy, self.residual = (
            tf.reshape(tf.constant(tensor), self.dims) for tensor in data[:3]
        )
        self.scale, self.offset, self.mean, self.variance = (tf.constant(v) for v in data[3:])

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        return self._backward(verb) if verb.backward else self._forward(verb)

    def _forward(self, verb: Verb) -> Callable[[], Any]:
        tf = self.tf
        given = [] if verb.training else [self.mean, self.variance]

        def normalize(x: Any, residual: Any, *parameters: Any) -> Any:
            y = tf.compat.v1.nn.fused_batch_norm(
                x,
                *parameters,
                epsilon=EPSILON,
                data_format=self.format,
                is_training=verb.training,
            )[0]
            if verb.residual:
                y = y + residual
            return tf.nn.relu(y) if verb.activation else y

        run = tf.function(normalize) if verb.activation else normalize
        return lambda: run(self.x, self.residual, self.scale, self.offset, *given)

    def _backward(self, verb: Verb) -> Callable[[], Any]:
        tf = self.tf
        statistics = tf.raw_ops.FusedBatchNormV3(
            x=self.x,
            scale=self.scale,
            offset=self.offset,
            mean=[],
            variance=[],
            epsilon=EPSILON,
            data_format=self.format,
            is_training=True,
        )[3:]
        y = self._forward(verb)() if verb.activation else None

        def gradient(dy: Any, y: Any, x: Any, scale: Any, *statistics: Any) -> Any:
            g = tf.raw_ops.ReluGrad(gradients=dy, features=y) if verb.activation else dy
            dx = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=g,
                x=x,
                scale=scale,
                reserve_space_1=statistics[0],
                reserve_space_2=statistics[1],
                reserve_space_3=statistics[2],
                epsilon=EPSILON,
                data_format=self.format,
                is_training=True,
            )[0]
            return (dx, g) if verb.residual else (dx,)

        run = tf.function(gradient) if verb.activation else gradient
        return lambda: run(self.dy, y, self.x, self.scale, *statistics)

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        if not verb.backward:
            return {"y": self._array(result)}
        return dict(zip(("dx", "dresidual"), map(self._array, result), strict=False))

    def _array(self, tensor: Any) -> Array:
        return np.asarray(tensor.numpy()).reshape(self.case.dims)


create = TensorFlow
