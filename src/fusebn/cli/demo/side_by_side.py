"""Two trainings in one table: what the networks learned, and what a step of each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from statistics import median
from time import perf_counter

import numpy as np

from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.watch import History
from fusebn.cli.resident import resident

LARGE = 1024  # images in a step that is timed: tensors of some MiB, as larger networks have
FIRST = 20  # losses that are compared
_ROUNDS = 8

Step = Callable[[], object]


def side_by_side(
    title: str,
    lesson: str,
    histories: Mapping[str, History],
    steps: Mapping[str, Step],
    exact: Iterable[float],
    *,
    gives_back: bool = True,
) -> Finding:
    """Compare trainings from the same seed, and one step of each on LARGE images.

    `exact` has the losses of the same training in float64. Where the framework does not give memory
    back to the system after a step (`gives_back`), what a step takes cannot be seen.
    """
    losses = np.array(list(islice(exact, FIRST)))
    seconds, memory = (
        _seconds(steps),
        {name: _memory(step) if gives_back else "-" for name, step in steps.items()},
    )
    return Finding(
        title,
        f"{lesson} Off is the largest distance of the first {FIRST} losses from those of the same "
        f"training in float64. Time and memory are those of a training step of {LARGE} images, in "
        f"turns: the median, and the most memory that a step took.",
        ("network", "held out", "last loss", "off", "a step", "its memory"),
        [
            (
                name,
                percent(history.accuracy[-1]),
                f"{np.mean(_last_epoch(history)):.4f}",
                f"{np.abs(history.loss[:FIRST] - losses).max():.0e}",
                f"{1e3 * seconds[name]:.1f} ms",
                memory[name],
            )
            for name, history in histories.items()
        ],
    )


def _last_epoch(history: History) -> list[float]:
    return history.loss[-(len(history.loss) // len(history.accuracy)) :]


def _seconds(steps: Mapping[str, Step]) -> dict[str, float]:
    for step in steps.values():
        step()  # some compile at first
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            start = perf_counter()
            step()
            seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def _memory(step: Step) -> str:
    found = resident(step)
    return f"{(found.peak - found.before) / 2**20:.0f} MiB" if found else "-"
