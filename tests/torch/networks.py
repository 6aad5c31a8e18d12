"""Small networks of the kinds that `fuse` must know, written as their authors write them.

``NETWORKS`` has a function for each that makes one, and the shape of its input. They are in
float64, their parameters and running statistics away from where they start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devices import seeded


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


# ---- ResNet: https://arxiv.org/abs/1512.03385, as in torchvision ----


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = convolution(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = convolution(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = convolution(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class FunctionalBlock(BasicBlock):
    """The block of many tutorials: functions, and the shortcut last."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(torch.add(shortcut, out))


class ResNet(nn.Module):
    def __init__(self, block: type[Any]) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = convolution(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.layer(block, 4, 1)
        self.layer2 = self.layer(block, 6, 2)
        self.fc = nn.Linear(6 * block.expansion, 5)

    def layer(self, block: type[Any], planes: int, stride: int) -> nn.Module:
        outputs = planes * block.expansion
        downsample = nn.Sequential(
            convolution(self.inplanes, outputs, 1, stride), nn.BatchNorm2d(outputs)
        )
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = outputs
        return nn.Sequential(first, block(outputs, planes, 1, None))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


# ---- ResNet with pre-activation: https://arxiv.org/abs/1603.05027 ----


class PreActivation(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.shortcut = convolution(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


# ---- DenseNet: https://arxiv.org/abs/1608.06993 ----


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = convolution(inputs, 2 * growth, 1)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = convolution(2 * growth, growth)
        self.drop_rate = 0.0

    def bottleneck(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        new = self.conv2(self.relu2(self.norm2(self.bottleneck(features))))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    transition = nn.Sequential(
        nn.BatchNorm2d(14), nn.ReLU(inplace=True), convolution(14, 6, 1), nn.AvgPool2d(2)
    )
    return nn.Sequential(
        convolution(3, 6),
        DenseBlock(2, 6, 4),
        transition,
        DenseBlock(2, 6, 4),
        nn.BatchNorm2d(14),
        nn.ReLU(inplace=True),
    )


# ---- MobileNetV2: https://arxiv.org/abs/1801.04381 ----


class ConvBNReLU(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, size: int = 3, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.use_res_connect = inputs == outputs
        self.conv = nn.Sequential(
            ConvBNReLU(inputs, hidden, 1),
            ConvBNReLU(hidden, hidden, 3, hidden),
            convolution(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


# ---- as EfficientNet: https://arxiv.org/abs/1905.11946 ----


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.fc2 = nn.Conv2d(2, channels, 1)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return torch.sigmoid(scale) * x


class MBConv(nn.Module):
    """With stochastic depth, https://arxiv.org/abs/1603.09382, whose draws are made by torch."""

    def __init__(self, inputs: int, outputs: int, drop: float = 0.3) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.expand = convolution(inputs, hidden, 1)
        self.bn0 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU(inplace=True)
        self.se = SqueezeExcitation(hidden)
        self.project = convolution(hidden, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.drop = drop
        self.skips = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inputs = x
        x = self.act(self.bn0(self.expand(x)))
        x = self.se(self.act(self.bn1(self.depthwise(x))))
        x = self.bn2(self.project(x))
        if self.skips:
            if self.training and self.drop:
                keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop)
                x = x / (1 - self.drop) * keep
            x = x + inputs
        return x


# ---- U-Net: https://arxiv.org/abs/1505.04597 ----


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            convolution(inputs, outputs),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(inplace=True),
            convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList([DoubleConv(3, 4), DoubleConv(4, 6)])
        self.bottom = DoubleConv(6, 8)
        self.ups = nn.ModuleList([nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)])
        self.joins = nn.ModuleList([DoubleConv(12, 6), DoubleConv(8, 4)])
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        return self.out(x)


# ---- as in timm: a batch norm with its activation, and places for what regularizes ----


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = convolution(3, 3)
        self.bn1 = BatchNormAct2d(3)
        self.conv2 = convolution(3, 3)
        self.bn2 = nn.BatchNorm2d(3)
        self.drop_block = nn.Identity()
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv1(x))
        x = self.drop_block(self.bn2(self.conv2(x)))
        x += shortcut
        return self.act2(x)


# ---- forwards that are hard to trace ----


class Dynamic(nn.Module):
    """Its control flow depends on a value; the stem inside it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = convolution(4, 4)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.bn(self.conv(x))
        return F.relu(out) if x.mean() > 0.4 else out


class Flagged(nn.Module):
    """What it does hangs on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = convolution(3, 4)
        self.bn = nn.BatchNorm2d(4)
        self.activate = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return F.relu(out) if self.activate else out


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet, basic": (lambda: ResNet(BasicBlock), (4, 3, 8, 8)),
    "resnet, bottleneck": (lambda: ResNet(Bottleneck), (4, 3, 8, 8)),
    "resnet, functional": (lambda: ResNet(FunctionalBlock), (4, 3, 8, 8)),
    "pre-activation": (
        lambda: nn.Sequential(PreActivation(3, 4), PreActivation(4, 4)),
        (4, 3, 6, 6),
    ),
    "densenet": (densenet, (4, 3, 6, 6)),
    "mobilenet": (
        lambda: nn.Sequential(
            ConvBNReLU(3, 4), InvertedResidual(4, 4), InvertedResidual(4, 6), InvertedResidual(6, 6)
        ),
        (4, 3, 6, 6),
    ),
    "efficientnet": (
        lambda: nn.Sequential(MBConv(3, 4), MBConv(4, 4), MBConv(4, 4, drop=0.0)),
        (4, 3, 6, 6),
    ),
    "u-net": (UNet, (2, 3, 8, 8)),
    "timm": (lambda: nn.Sequential(TimmBlock(), TimmBlock()), (4, 3, 6, 6)),
    "mlp": (mlp, (8, 6)),
    "dynamic": (Dynamic, (4, 3, 6, 6)),
    "flagged": (Flagged, (4, 3, 6, 6)),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network and an input for it, the same every time."""
    make, shape = NETWORKS[name]
    generator = seeded(0)
    model = make().double()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.normal_(0, 0.3, generator=generator)
                if key.endswith("running_var"):
                    value.abs_().add_(0.5)
    return model, torch.randn(shape, generator=generator, dtype=torch.float64)
