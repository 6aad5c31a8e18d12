"""PyTorch: the operations under `F.batch_norm` and its gradient; channels_last or contiguous."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import DTYPES, EPSILON, Array, Case, Data, Verb


class Torch:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.torch.set_num_threads(threads)
        self.torch.set_grad_enabled(False)
        self.version = self.torch.__version__
        self.aten = self.torch.ops.aten

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self.case = case
        self.x, self.dy, self.residual = map(self.tensor, (data.x, data.dy, data.residual))
        self.parameters = [self.torch.tensor(v) for v in (data.scale, data.offset)]
        self.moving = [self.torch.tensor(v) for v in (data.mean, data.variance)]

    def tensor(self, array: Array) -> Any:
        """Copy an array; channels are axis 1 whatever the memory order: strides tell the rest."""
        torch, dtype = self.torch, getattr(self.torch, self.case.dtype)
        tensor = torch.tensor(array.view(f"i{array.itemsize}")).view(dtype)
        return tensor.movedim(self.case.axis, 1)

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        return self.backward(verb) if verb.backward else self.forward(verb)

    def forward(self, verb: Verb) -> Callable[[], Any]:
        """Return the chain that torchvision's blocks run."""
        normalize, x, residual = self.torch.nn.functional.batch_norm, self.x, self.residual
        (scale, offset), (mean, variance) = self.parameters, self.moving

        def run() -> Any:
            y = normalize(x, mean, variance, scale, offset, verb.training, 0.0, EPSILON)
            if verb.residual:
                y += residual
            return y.relu_() if verb.activation else y

        return run

    def backward(self, verb: Verb) -> Callable[[], Any]:
        """Return what autograd would call, without autograd."""
        x, dy, scale, aten = self.x, self.dy, self.parameters[0], self.aten
        _, mean, rstd = self.torch.native_batch_norm(
            x, *self.parameters, None, None, True, 0.0, EPSILON
        )
        y = self.forward(verb)() if verb.activation else None

        def run() -> Any:
            g = dy if y is None else aten.threshold_backward(dy, y, 0)
            wanted = [True, True, True]
            gradients = aten.native_batch_norm_backward(
                g, x, scale, None, None, mean, rstd, True, EPSILON, wanted
            )
            return gradients[0], g

        return run

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        if not verb.backward:
            return {"y": self.array(result)}
        answer = {"dx": self.array(result[0])}
        if verb.residual:
            answer["dresidual"] = self.array(result[1])
        return answer

    def array(self, tensor: Any) -> Array:
        """Undo `tensor`."""
        tensor = tensor.movedim(1, self.case.axis).contiguous()
        dtype = DTYPES[self.case.dtype]
        integers: Array = tensor.view(getattr(self.torch, f"int{8 * dtype.itemsize}")).numpy()
        return np.ascontiguousarray(integers).view(dtype)


create = Torch
