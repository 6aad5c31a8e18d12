"""Training with somebody watching: a progress bar, and a record of what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fusebn import Moments
from fusebn.cli.digits import Digits
from fusebn.cli.findings import percent, population
from fusebn.cli.network import Array, Network
from fusebn.cli.training import accuracy, steps_per_epoch, train


@dataclass
class History:
    """Of each step the loss, and the first layer's moving statistics after it; of each epoch the
    held-out accuracy in inference mode, and what those statistics should be by then.
    """

    loss: list[float] = field(default_factory=list)
    moving_mean: list[Array] = field(default_factory=list)
    moving_variance: list[Array] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    population: list[Moments] = field(default_factory=list)


def watch(
    title: str,
    digits: Digits,
    held_out: Digits,
    *,
    epochs: int,
    seed: int,
    update: bool,
    console: Console,
) -> tuple[Network, History]:
    """Train a new network; return it and its history."""
    network, history = Network.new(np.random.default_rng(seed)), History()
    _, norm = network.hidden[0]
    steps = steps_per_epoch(digits)
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]}"),
        TextColumn("held out [bold]{task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        bar = progress.add_task(title, total=epochs * steps, epoch=0, loss="-", accuracy="-")
        for step, loss in enumerate(train(network, digits, epochs, seed, update=update), 1):
            history.loss.append(loss)
            history.moving_mean.append(norm.moving_mean.copy())
            history.moving_variance.append(norm.moving_variance.copy())
            progress.advance(bar)
            if step % steps == 0:
                history.accuracy.append(accuracy(network, held_out))
                history.population.append(population(network, digits.images))
                progress.update(
                    bar,
                    epoch=step // steps,
                    loss=f"{np.mean(history.loss[-steps:]):.4f}",
                    accuracy=percent(history.accuracy[-1]),
                )
    return network, history
