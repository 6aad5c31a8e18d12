"""`fusebn demo`: train on real data, show what matters, write a report.

A folder here for each framework: the network as its users write it, and what they get wrong. The
digits, the schedule, the figures and the report are the same for all.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from time import perf_counter

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fusebn.cli.demo import digits, report
from fusebn.cli.demo.findings import Finding, moving_statistics, percent
from fusebn.cli.demo.watch import Course


def run(framework: str, seed: int, epochs: int | None, path: Path, console: Console) -> Path:
    """Run the demo; write the report to `path`; return where the trained network is, beside it."""
    started = perf_counter()
    # Before anything is printed: the framework may not be installed.
    chosen = import_module(f"fusebn.cli.demo.{framework}")
    epochs = epochs or chosen.EPOCHS
    training, held_out = digits.split(seed)
    sizes = f"{len(training.labels):,} for training, {len(held_out.labels)} held out"
    console.print(
        f"[bold]fusebn demo[/bold], {chosen.FRAMEWORK}, seed {seed}\n"
        f"Handwritten digits: {sizes}.\n"
        f"{chosen.NETWORK}\n",
        highlight=False,
    )
    model = path.with_suffix(chosen.MODEL)
    # The matrices are small: threads of BLAS would gain nothing, and wait long on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        study = chosen.study(Course(training, held_out, epochs, seed, console), model)
        first, exact = study.network.first(), study.history.population[-1]
        by_mean = np.argsort(exact.mean)
        channels = [int(by_mean[int(q * len(by_mean))]) for q in (0.04, 0.36, 0.68, 0.96)]
        shown = [moving_statistics(first, exact, channels), *study.findings]
        last_act = study.quantization
        accuracy = study.history.accuracy[-1]
        summary = report.Summary(chosen.FRAMEWORK, seed, epochs, accuracy, training, held_out)
        report.write(path, summary, first, study.history, channels, shown, last_act)
    console.print(
        f"\n[bold green]{percent(accuracy)} of the held-out digits recognized[/] "
        f"in inference mode, seed {seed}.",
        highlight=False,
    )
    for finding in [*shown, *(last_act.findings if last_act else ())]:
        _print(finding, console)
    console.print(f"Done in {perf_counter() - started:.1f} seconds.", highlight=False)
    return model


def _print(finding: Finding, console: Console) -> None:
    console.print(f"\n[bold]{finding.title}[/bold]", highlight=False)
    console.print(finding.lesson, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in finding.rows:
        table.add_row(*row)
    console.print(table)
