"""Flax's batch norm and ours, jitted: a training step with all its gradients, or inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen

import fusebn.jax.linen as fbl
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.suites import Step


class Layers:
    """The peer. XLA takes the cores that the process may use, and our kernels its threads."""

    def __init__(self, threads: int) -> None:
        self.version = jax.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        self._case = case
        put = jax.device_put(data._asdict())
        self._tensors = [put[name] for name in ("x", "residual", "dy")]
        self._params = {"scale": put["scale"], "bias": put["offset"]}
        self._averages = {"mean": put["mean"], "var": put["variance"]}

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        if step.verbs == ("inference",):
            run, arguments = self._inference(step), self._tensors[:1]
        else:
            run, arguments = self._training(step), self._tensors
        compiled = jax.jit(run)
        # Arguments, not constants, which XLA would fold.
        held = (self._params, self._averages, step.name != "flax", *arguments)
        return lambda: jax.block_until_ready(compiled(*held))

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        y, *rest = result
        answer = {"y": y}
        if rest:
            (gradients, dx, dresidual), averages = rest
            answer |= {"dx": dx, "dscale": gradients["scale"], "doffset": gradients["bias"]}
            answer |= {"mean": averages["mean"], "variance": self._unbiased(averages["var"])}
            if "chain" in step.name:
                answer["dresidual"] = dresidual
        return {name: np.asarray(value) for name, value in answer.items()}

    def _unbiased(self, variance: Any) -> Any:
        """Return the variance that divides by n - 1; Flax's, and so ours there, divides by n."""
        n = self._case.block[0] * self._case.block[2]
        return np.asarray(variance).astype(np.float64) * (n / max(n - 1, 1))

    def _inference(self, step: Step) -> Callable[..., Any]:
        layer = self._layer(step)

        def run(params: Any, averages: Any, training: Any, x: Any) -> Any:
            variables = {"params": params, "batch_stats": averages}
            return (layer.apply(variables, x, use_running_average=True),)

        return run

    def _training(self, step: Step) -> Callable[..., Any]:
        layer, chain = self._layer(step), "chain" in step.name

        def forward(params: Any, averages: Any, average: Any, x: Any, residual: Any) -> Any:
            variables = {"params": params, "batch_stats": averages}
            options = {"use_running_average": average, "mutable": ["batch_stats"]}
            if step.ours and chain:
                options["residual"] = residual
            y, updated = layer.apply(variables, x, **options)
            if chain and not step.ours:
                y = linen.relu(y + residual)
            return y, updated["batch_stats"]

        def run(params: Any, averages: Any, training: Any, x: Any, residual: Any, dy: Any) -> Any:
            average = ~training if step.name == "flag" else False

            def of(params: Any, x: Any, residual: Any) -> Any:
                return forward(params, averages, average, x, residual)

            y, pullback, updated = jax.vjp(of, params, x, residual, has_aux=True)
            params, dx, dresidual = pullback(dy)
            return y, (params, dx, dresidual if chain else None), updated

        return run

    def _layer(self, step: Step) -> Any:
        """Return a layer whose running averages become the batch's statistics."""
        options: dict[str, Any] = {"axis": self._case.axis, "momentum": 0.0, "epsilon": EPSILON}
        options["dtype"] = self._tensors[0].dtype
        if self._case.dtype == "float64":
            options["param_dtype"] = options["dtype"]
        if not step.ours:
            return linen.BatchNorm(**options)
        return fbl.BatchNorm(**options, activation="relu" if "chain" in step.name else None)


create = Layers
