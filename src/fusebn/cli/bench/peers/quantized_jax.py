"""Quantised blocks in Flax's linen, jitted, the flag an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen

import fusebn.jax.linen as fbl
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers import quantized
from fusebn.cli.bench.suites import Step
from fusebn.quantize import FakeQuantize


class Blocks:
    """The peer. XLA takes the cores that the process may use, and our kernels its threads."""

    def __init__(self, threads: int) -> None:
        self.version = jax.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._case = case
        put = jax.device_put(data._asdict())
        self._x, self._dy, self._averages = put["x"], put["dy"], (put["mean"], put["variance"])
        self._params = {
            "convolution": {"kernel": jax.device_put(quantized.kernel(case))},
            "norm": {"scale": put["scale"], "bias": put["offset"]},
        }

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        block = _Block(step.name)

        def run(params: Any, moving: Any, active: Any, x: Any, dy: Any) -> Any:
            def forward(params: Any, x: Any) -> Any:
                variables = {"params": params, "batch_stats": {"norm": moving}}
                y, updated = block.apply(variables, x, active, mutable=["batch_stats"])
                return y, updated["batch_stats"]

            y, pullback, updated = jax.vjp(forward, params, x, has_aux=True)
            gradients, dx = pullback(dy)
            return y, dx, gradients, updated

        moving = dict(zip(("mean", "var"), self._averages, strict=True))
        compiled, held = jax.jit(run), (self._params, moving, True, self._x, self._dy)
        ready: Callable[[Any], Any] = jax.block_until_ready
        return lambda: ready(compiled(*held))

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        return quantized.answer(np.asarray(result[0]), result[1], self._case.axis)


class _Block(linen.Module):
    step: str

    @linen.compact
    def __call__(self, x: Any, active: Any) -> Any:
        z = linen.Conv(x.shape[-1], (3, 3), use_bias=False, name="convolution")(x)
        options = quantized.options(
            self.step, lambda: FakeQuantize(quantized.BITS, symmetric=True), active
        )
        flag = {"transforms_active": options.pop("transforms_active")} if options else {}
        norm = fbl.BatchNorm(epsilon=EPSILON, activation="relu", name="norm", **options)
        return norm(z, use_running_average=False, **flag)


create = Blocks
