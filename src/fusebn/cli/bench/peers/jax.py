"""JAX under `jit`: the formulas as Flax writes them, for XLA to fuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data, Verb


class Jax:
    """The peer."""

    def __init__(self, threads: int) -> None:  # XLA takes the cores the process may use
        self.jax: Any = importlib.import_module("jax")
        self.jax.config.update("jax_enable_x64", True)
        self.np: Any = importlib.import_module("jax.numpy")
        self.version = self.jax.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self.wide = np.float64 if case.dtype == "float64" else np.float32
        self.axes = tuple(i for i in range(len(case.dims)) if i != case.axis)
        spread = [1] * len(case.dims)
        spread[case.axis] = -1
        self.tensors = [self.jax.device_put(tensor) for tensor in data[:3]]
        self.vectors = [self.jax.device_put(vector.reshape(spread)) for vector in data[3:]]

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        x, dy, residual = self.tensors
        scale, offset, mean, variance = self.vectors
        arguments = [x, scale, offset]
        if verb.backward:
            arguments = [dy, *arguments, *self.jax.jit(self._moments)(x)]
        elif not verb.training:
            arguments += [mean, variance]
        extra = [residual] if verb.residual else []
        compute, wait = self.jax.jit(self._function(verb)), self.jax.block_until_ready
        return lambda: wait(compute(extra, *arguments))

    def _function(self, verb: Verb) -> Callable[..., Any]:
        """Return the verb as a function of arrays."""

        def preactivation(extra: Any, x: Any, scale: Any, offset: Any, *statistics: Any) -> Any:
            mean, variance = statistics or self._moments(x)
            z = (self._float(x) - mean) * (scale * self.jax.lax.rsqrt(variance + EPSILON)) + offset
            return z + sum(map(self._float, extra))

        def forward(extra: Any, x: Any, *rest: Any) -> Any:
            z = preactivation(extra, x, *rest)
            return (self.jax.nn.relu(z) if verb.activation else z).astype(x.dtype)

        def backward(
            extra: Any, dy: Any, x: Any, scale: Any, offset: Any, mean: Any, variance: Any
        ) -> Any:
            g = self._float(dy)
            if verb.activation:
                z = preactivation(extra, x, scale, offset, mean, variance)
                g = self.np.where(z > 0, g, 0)
            rstd = self.jax.lax.rsqrt(variance + EPSILON)
            xhat = (self._float(x) - mean) * rstd
            mean_g = g.mean(self.axes, keepdims=True)
            mean_g_xhat = (g * xhat).mean(self.axes, keepdims=True)
            dx = (scale * rstd * (g - mean_g - xhat * mean_g_xhat)).astype(x.dtype)
            count = x.size / scale.size
            gradients = dx, mean_g_xhat * count, mean_g * count
            return (*gradients, g.astype(x.dtype)) if verb.residual else gradients

        return backward if verb.backward else forward

    def _moments(self, x: Any) -> tuple[Any, Any]:
        """E[x^2] - E[x]^2, clipped: Flax's default, one pass over x and the fastest there is."""
        x = self._float(x)
        mean = x.mean(self.axes, keepdims=True)
        variance = (x * x).mean(self.axes, keepdims=True) - mean * mean
        return mean, self.np.maximum(variance, 0)

    def _float(self, x: Any) -> Any:
        return x.astype(self.wide)

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        if not verb.backward:
            return {"y": np.asarray(result)}
        answer = {"dx": np.asarray(result[0])}
        if verb.residual:
            answer["dresidual"] = np.asarray(result[3])
        return answer


create = Jax
