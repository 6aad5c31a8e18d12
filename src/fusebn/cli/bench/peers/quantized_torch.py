"""Quantised blocks in PyTorch: eagerly, as they are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusebn.torch as fbt
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data
from fusebn.cli.bench.peers import quantized
from fusebn.cli.bench.peers.torch import Torch
from fusebn.cli.bench.resnet import channels_last
from fusebn.cli.bench.suites import Step
from fusebn.quantize import FakeQuantize


class Blocks:
    """The peer."""

    def __init__(self, threads: int) -> None:
        self._peer = Torch(threads)
        self.version = self._peer.version
        torch.set_grad_enabled(True)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._case, self._data = case, data
        self._peer.load(case, data)
        self._x = self._peer.x.detach().requires_grad_()

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        block, dy = self._block(step.name), self._peer.dy
        inputs = [self._x, *block.parameters()]

        def run() -> Any:
            y = block(self._x)
            return y.detach(), torch.autograd.grad(y, inputs, dy)[0]

        return run

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer."""
        y, dx = map(self._peer.array, result)
        return quantized.answer(y, dx, self._case.axis)

    def _block(self, step: str) -> Any:
        channels = self._case.block[1]
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        norm = fbt.BatchNorm2d(
            channels,
            EPSILON,
            activation="relu",
            **quantized.options(
                step, lambda: FakeQuantize(quantized.BITS, symmetric=True), torch.tensor(True)
            ),
        )
        with torch.no_grad():
            kernel = torch.from_numpy(quantized.kernel(self._case))
            convolution.weight.copy_(kernel.permute(3, 2, 0, 1))
            norm.weight.copy_(torch.from_numpy(self._data.scale))
            norm.bias.copy_(torch.from_numpy(self._data.offset))
        return channels_last(nn.Sequential(convolution, norm))


create = Blocks
