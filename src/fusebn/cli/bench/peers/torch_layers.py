"""PyTorch's batch norm and ours, called through autograd as their users call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import fusebn.torch as fbt
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers.torch import Torch
from fusebn.cli.bench.suites import Step

MOMENTUM = 0.1
MODULES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
TENSORS = ("y", "dx", "dresidual")  # of the shape of x

Call = Callable[[], Any]


class Layers:
    """The peer."""

    def __init__(self, threads: int) -> None:
        # It makes tensors of arrays, and arrays of tensors. Our threads follow PyTorch's.
        self._peer = Torch(threads)
        self.version = self._peer.version
        torch.set_grad_enabled(True)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._peer.load(case, data)
        for tensor in (self._peer.x, self._peer.residual, *self._peer.parameters):
            tensor.requires_grad_()
        self._norms: dict[str, _Norm] = {}

    def call(self, step: Step) -> Call:
        """See Peer."""
        norm = self._norms[step.name] = _Norm(step, self._peer)
        once = norm.call()

        def many() -> Any:
            with torch.set_grad_enabled(norm.training):
                for _ in range(step.calls - 1):
                    once()
                return once()

        return many

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        norm = self._norms[step.name]
        arrays = dict(
            zip(norm.returns, result if type(result) is tuple else (result,), strict=True)
        )
        if "y" in arrays and norm.training:
            arrays |= norm.statistics()
        return {
            name: self._peer.array(value.detach()) if name in TENSORS else value.detach().numpy()
            for name, value in arrays.items()
        }


class _Norm:
    """A batch norm, ours or PyTorch's, and the ways to call it."""

    def __init__(self, step: Step, peer: Torch) -> None:
        self._step, self._peer = step, peer
        self.training = "inference" not in step.verbs
        self._function = fbt.batch_norm if step.ours else functional.batch_norm
        modules: Any = fbt if step.ours else torch.nn
        create = getattr(modules, MODULES[peer.x.ndim])
        self._module = create(peer.x.shape[1], EPSILON, MOMENTUM).train(self.training)
        # The module's own parameters: a step asks for their gradients.
        with torch.no_grad():
            for name, value in zip(
                ("weight", "bias", "running_mean", "running_var"),
                (*peer.parameters, *peer.moving),
                strict=True,
            ):
                getattr(self._module, name).copy_(value)
        self.returns: tuple[str, ...] = ("y",)

    def call(self) -> Call:
        """Return what the step times."""
        match self._step.name.removeprefix("fusebn-"):
            case "call" | "eval":
                return self._functional()
            case "forward" | "M.call" | "M.eval":
                return self._forward()
            case "backward":
                return self._backward()
            case "step":
                return self._both(self._forward())
            case _:
                return self._both(self._chain(), self._peer.residual)

    def statistics(self) -> dict[str, Any]:
        """Return the batch's, as they move averages that were 0."""
        module = self._module
        with torch.no_grad():
            module.running_mean.zero_()
            module.running_var.zero_()
        self.call()()
        return {
            "mean": module.running_mean / MOMENTUM,
            "variance": module.running_var / MOMENTUM,
        }

    def _functional(self) -> Call:
        function, training, x, module = self._function, self.training, self._peer.x, self._module
        running = module.running_mean, module.running_var
        parameters = module.weight, module.bias
        return lambda: function(x, *running, *parameters, training, MOMENTUM, EPSILON)

    def _forward(self) -> Call:
        module, x = self._module, self._peer.x
        return lambda: module(x)

    def _chain(self) -> Call:
        module, x, residual = self._module, self._peer.x, self._peer.residual
        if self._step.ours:
            return lambda: module(x, residual, activation="relu")

        def chain() -> Any:
            y = module(x)
            y += residual
            return y.relu_()

        return chain

    def _backward(self) -> Call:
        """Return the backward pass alone, over one graph again and again."""
        y, dy, inputs = self._module(self._peer.x), self._peer.dy, self._inputs()
        self.returns = ("dx", "dscale", "doffset")
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def _both(self, forward: Call, *besides: Any) -> Call:
        dy, inputs = self._peer.dy, (*self._inputs(), *besides)
        self.returns = ("y", "dx", "dscale", "doffset", "dresidual")[: 1 + len(inputs)]

        def both() -> Any:
            y = forward()
            return (y, *torch.autograd.grad(y, inputs, dy))

        return both

    def _inputs(self) -> tuple[Any, ...]:
        """Return what gradients are asked for."""
        return self._peer.x, self._module.weight, self._module.bias


create = Layers
