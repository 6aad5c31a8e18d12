"""Train a ResNet-50 on a CPU, before and after `fusebn.torch.fuse`.

    pip install 'fusebn[cli,torch]'
    python examples/resnet_cpu.py                          # batch 16, 224x224, float32
    python examples/resnet_cpu.py --dtype bfloat16         # the same under autocast
    python examples/resnet_cpu.py --batch 4 --size 64 --steps 5

Two copies of one network train on the same random images, in turns, a step each; the second went
through one line, ``model = fusebn.torch.fuse(model)``. What is printed is the loss and the time of
every step, side by side, and the medians. The losses agree to rounding: the two compute the same.

`fusebn bench --torch --part resnet` measures the same with more care: in processes of their own,
with memory, with another allocator and with torch.compile.
"""

from __future__ import annotations

from copy import deepcopy
from statistics import median
from time import perf_counter

import click
import torch
from torch import Tensor, nn

import fusebn.torch
from fusebn.cli.bench.resnet import ResNet50, channels_last

CLASSES = 1000


class Training:
    """A network, its optimizer, and how long its steps took."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        # So slow that roundings stay what they are: this is about time.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on a batch, and return its loss."""
        start = perf_counter()
        half = self._dtype != torch.float32
        with torch.autocast("cpu", self._dtype if half else torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(self._model(images), labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.seconds.append(perf_counter() - start)
        return loss.item()


@click.command()
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=2))
@click.option("--size", default=224, show_default=True, type=click.IntRange(min=33))
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=2))
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"])
)
def main(batch: int, size: int, steps: int, dtype: str) -> None:
    """Train a ResNet-50 on random images, before and after fusebn.torch.fuse, side by side."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,))
    plain = channels_last(ResNet50(CLASSES))
    fused = fusebn.torch.fuse(deepcopy(plain))

    kind = getattr(torch, dtype)
    before, after = Training(plain, kind), Training(fused, kind)
    click.echo(f"{batch} images of {size}x{size}, {dtype}, {torch.get_num_threads()} threads")
    click.echo(f"{'step':>4}{'loss':>12}{'fused':>10}{'seconds':>14}{'fused':>8}")
    for step in range(1, steps + 1):
        losses = before.step(images, labels), after.step(images, labels)
        shown = "".join(f"{loss:10.5f}" for loss in losses)
        click.echo(f"{step:>4}  {shown}{before.seconds[-1]:14.3f}{after.seconds[-1]:8.3f}")
    # The first step of each fetches memory and plans the convolutions.
    one, other = (median(training.seconds[1:]) for training in (before, after))
    click.echo(f"median{one:34.3f}{other:8.3f}   {one / other:.2f} times as fast")


if __name__ == "__main__":
    main()
