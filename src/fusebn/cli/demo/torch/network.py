"""The network as a user of PyTorch would write it: there is no word of ours in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

import fusebn.torch as fbt
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.images import NESTEROV, OVER_ADAM, SIDE, WIDTHS, patches
from fusebn.cli.demo.network import DECAY, EPSILON, Array, First
from fusebn.cli.demo.schedule import RATE, batches


def convolution(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without a bias: that of the batch norm behind it is one."""
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """Return PyTorch's batch norm; its momentum is the weight of the new value."""
    return nn.BatchNorm2d(channels, eps=EPSILON, momentum=1 - DECAY)


class Block(nn.Module):
    """Two convolutions, and a shortcut around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.conv1, self.bn1 = convolution(channels, out, stride), norm(out)
        self.conv2, self.bn2 = convolution(out, out), norm(out)
        nn.init.zeros_(self.bn2.weight)  # each block begins as its shortcut: training starts calmly
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block takes."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + self.shortcut(x)
        z: Tensor = self.relu(y)
        return z


class Model(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        first, last = WIDTHS
        self.conv, self.bn, self.relu = convolution(1, first), norm(first), nn.ReLU()
        self.blocks = nn.Sequential(Block(first, first), Block(first, last))
        self.fc = nn.Linear(last, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.blocks(self.relu(self.bn(self.conv(images))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def tensor_of(images: Array) -> Tensor:
    """Return rows of pixels as images, channels last: there batch norms are fastest."""
    images_4d = torch.from_numpy(images).view(-1, 1, SIDE, SIDE)
    return images_4d.contiguous(memory_format=torch.channels_last)


class Network:
    """A model, ours after one line, with its training."""

    def __init__(
        self, seed: int, *, fused: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(seed)
        model = Model().to(dtype)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = fbt.fuse(model) if fused else model
        self._dtype = dtype
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=RATE, momentum=NESTEROV, nesterov=True
        )

    def train(
        self, digits: Digits, epochs: int, seed: int, *, rate: float = RATE
    ) -> Iterator[float]:
        """Train, and yield the loss of each step."""
        for batch, now in batches(digits, epochs, seed, rate):
            for group in self._optimizer.param_groups:
                group["lr"] = now * OVER_ADAM
            yield self.step(tensor_of(batch.images), torch.from_numpy(batch.labels))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on a batch, and return its loss."""
        self.model.train()
        loss = nn.functional.cross_entropy(self.model(images.to(self._dtype)), labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    def norms(self) -> dict[str, nn.BatchNorm2d]:
        """Return the batch norms by name."""
        found = self.model.named_modules()
        return {name: module for name, module in found if isinstance(module, nn.BatchNorm2d)}

    # What the report asks of a network.

    def first(self) -> First:
        """See :class:`fusebn.cli.demo.network.Network`."""
        weight, norm = self.model.conv.weight.detach(), self.model.bn
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return First(
            weight.flatten(1).T.numpy().copy(),
            norm.running_mean.numpy().copy(),
            norm.running_var.numpy().copy(),
            patches,
        )

    def logits(self, images: Array, *, training: bool = False) -> Array:
        """See :class:`fusebn.cli.demo.network.Network`."""
        # A copy learns in its place: in training mode a forward pass moves the statistics.
        model = deepcopy(self.model).train() if training else self.model.eval()
        with torch.no_grad():
            logits: Array = model(tensor_of(images)).numpy()
        return logits

    def state(self) -> dict[str, bytes]:
        """See :class:`fusebn.cli.demo.network.Network`."""
        return {
            name: b"".join(value.numpy().tobytes() for value in norm.state_dict().values())
            for name, norm in self.norms().items()
        }
