"""ResNet-50 and its blocks in PyTorch: as they are, after `fuse`, after `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

import fusebn.torch as fbt
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import Case, Data, parse
from fusebn.cli.bench.peers.torch import Torch
from fusebn.cli.bench.resnet import EXPANSION, Bottleneck, ResNet50, channels_last
from fusebn.cli.bench.suites import Step
from fusebn.cli.resident import resident

CLASSES = 1000
LOSSES = 20
RATE, MOMENTUM = 1e-4, 0.9  # so slow that roundings stay what they are


class Networks:
    """The peer: images of 3 channels train the whole network, others go through one block."""

    def __init__(self, threads: int) -> None:
        # It makes tensors of arrays, and arrays of tensors. Our threads follow PyTorch's.
        self._peer = Torch(threads)
        self.version = self._peer.version
        torch.set_grad_enabled(True)

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        self._peer.load(case, data)
        self._networks: dict[str, Training | _Inference] = {}

    def call(self, step: Step) -> Callable[[], Any]:
        """See Peer."""
        case, x = self._peer.case, self._peer.x.float()
        training = parse(case.shape)[-1] == 3
        network = (Training if training else _Inference)(step.name, case.dtype, x)
        self._networks[step.name] = network
        return network.step

    def answer(self, step: Step, result: Any) -> Answer:
        """See Peer: the losses of the first steps, or the block's output; and the memory."""
        network = self._networks[step.name]
        if isinstance(network, Training):
            rest = [network.step().item() for _ in range(LOSSES - 1)]
            answer = {"losses": np.array([float(result), *rest])}
            if found := resident(network.step):
                answer["peak"] = np.array([found.peak], np.float64)
            return answer
        return {"y": self._peer.array(result.to(self._peer.x.dtype))}


class Training:
    """A network that is trained on one batch, where the images are."""

    def __init__(self, way: str, dtype: str, images: Any) -> None:
        torch.manual_seed(0)
        model = channels_last(ResNet50(CLASSES)).to(images.device)
        self._model = changed(model, way)
        self._optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
        self._images, self._dtype = images, dtype
        self._labels = torch.arange(len(images), device=images.device) % CLASSES

    def step(self) -> Any:
        """Train on the batch once; return the loss."""
        with precision(self._dtype, self._images.device.type):
            logits = self._model(self._images)
            loss = nn.functional.cross_entropy(logits, self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


class _Inference:
    """A bottleneck block that lets images through."""

    def __init__(self, way: str, dtype: str, images: Any) -> None:
        torch.manual_seed(0)
        channels = images.shape[1]
        model = channels_last(Bottleneck(channels, channels // EXPANSION))
        self._model = changed(model.eval(), way)
        self._images, self._dtype = images, dtype

    def step(self) -> Any:
        """Return what comes out."""
        with torch.inference_mode(), precision(self._dtype):
            return self._model(self._images)


def changed(model: nn.Module, way: str) -> Any:
    """Return the model as a step's name says."""
    if way in ("fusebn", "both"):
        model = fbt.fuse(model)
    return torch.compile(model) if way in ("compile", "both") else model


def precision(dtype: str, device: str = "cpu") -> AbstractContextManager[object]:
    """Return what a forward pass runs in: autocast to a half type, or nothing."""
    return torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")


create = Networks
