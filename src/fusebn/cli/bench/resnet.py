"""ResNet-50, written out: what the benchmark and ``examples/resnet_cpu.py`` train.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015,
https://arxiv.org/abs/1512.03385, with the strides where torchvision has them (ResNet v1.5), its
names and its first weights: https://docs.pytorch.org/vision/main/models/resnet.html

The last scale of each block begins at 0 (Goyal et al., 2017, https://arxiv.org/abs/1706.02677;
torchvision's ``zero_init_residual``). With 1 the first steps amplify roundings to some percent of
the loss, between any two kernels, and nothing could be compared.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

EXPANSION = 4  # a bottleneck's output over its width


class Bottleneck(nn.Module):
    """Three convolutions, each with its batch norm, and a shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block takes."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += identity
        y: Tensor = self.relu(x)
        return y


def stage(channels: int, width: int, count: int, stride: int = 2) -> nn.Sequential:
    """Return blocks of one width; the first takes so many channels, and every stride-th pixel."""
    first = Bottleneck(channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * width, width) for _ in range(count - 1)))


class ResNet50(nn.Module):
    """The network: images [N, 3, H, W] to logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(64, 64, 3, 1)
        self.layer2 = stage(256, 128, 4)
        self.layer3 = stage(512, 256, 6)
        self.layer4 = stage(1024, 512, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def channels_last(model: M) -> M:
    """Return the model with its weights in the order that convolutions on a CPU like best."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
