"""Training with somebody watching: a progress bar, and a record of what happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fusebn import Moments
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.network import Array, Network, accuracy
from fusebn.cli.demo.schedule import steps_per_epoch

if TYPE_CHECKING:
    from fusebn.cli.demo.quantized import Quantization


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


class Course(NamedTuple):
    """What all trainings of a run have in common."""

    training: Digits
    held_out: Digits
    epochs: int
    seed: int
    console: Console


def watch(title: str, network: Network, losses: Iterator[float], course: Course) -> History:
    """Train a network to the end of its losses, one of each step; return its history."""
    history, steps = History(), steps_per_epoch(course.training)
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=None),
        TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]}"),
        TextColumn("held out [bold]{task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=course.console, expand=True) as progress:
        total = course.epochs * steps
        bar = progress.add_task(title, total=total, epoch=0, loss="-", accuracy="-")
        for step, loss in enumerate(losses, 1):
            first = network.first()
            history.loss.append(loss)
            history.moving_mean.append(first.moving_mean)
            history.moving_variance.append(first.moving_variance)
            progress.advance(bar)
            if step % steps == 0:
                history.accuracy.append(accuracy(network, *course.held_out))
                history.population.append(first.population(course.training.images))
                progress.update(
                    bar,
                    epoch=step // steps,
                    loss=f"{np.mean(history.loss[-steps:]):.4f}",
                    accuracy=percent(history.accuracy[-1]),
                )
    return history


class Study(NamedTuple):
    """What a framework's demo comes back with."""

    network: Network
    history: History
    findings: list[Finding]
    quantization: Quantization | None = None  # the last act, where there is one
