"""`fusebn demo`: train on real data, show what matters, write a report."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fusebn.cli import digits, findings, report
from fusebn.cli.findings import Finding, percent
from fusebn.cli.network import WIDTHS
from fusebn.cli.watch import watch


def run(seed: int, epochs: int, path: Path, console: Console) -> None:
    """Run the demo; write the report to `path` and the trained network beside it."""
    # The matrices are small: threads of BLAS would gain nothing, and wait long on a busy machine.
    with threadpool_limits(1, user_api="blas"):
        _run(seed, epochs, path, console)


def _run(seed: int, epochs: int, path: Path, console: Console) -> None:
    started = perf_counter()
    training, held_out = digits.split(seed)
    sizes = f"{len(training.labels):,} for training, {len(held_out.labels)} held out"
    layers = " - ".join(map(str, WIDTHS))
    console.print(
        f"[bold]fusebn demo[/bold], seed {seed}\n"
        f"Handwritten digits: {sizes}.\n"
        f"Dense layers {layers}, between them batch normalization and ReLU.\n",
        highlight=False,
    )
    network, history = watch(
        "training", training, held_out, epochs=epochs, seed=seed, update=True, console=console
    )
    forgetful, _ = watch(
        "no update", training, held_out, epochs=epochs, seed=seed, update=False, console=console
    )
    exact = history.population[-1]
    by_mean = np.argsort(exact.mean)
    channels = [int(by_mean[int(q * len(by_mean))]) for q in (0.04, 0.36, 0.68, 0.96)]
    shown = [
        findings.moving_statistics(network, exact, channels),
        findings.inference_leaves_no_trace(network, held_out),
        findings.forgotten_update(network, forgetful, training, held_out),
        findings.batch_size_one(network, held_out),
        findings.reloaded(network, held_out, path.with_suffix(".safetensors")),
    ]
    summary = report.Summary(seed, epochs, history.accuracy[-1], training, held_out)
    report.write(path, summary, network, history, channels, shown)
    console.print(
        f"\n[bold green]{percent(summary.accuracy)} of the held-out digits recognized[/] "
        f"in inference mode, seed {seed}.",
        highlight=False,
    )
    for finding in shown:
        _print(finding, console)
    console.print(f"Done in {perf_counter() - started:.1f} seconds.", highlight=False)


def _print(finding: Finding, console: Console) -> None:
    console.print(f"\n[bold]{finding.title}[/bold]", highlight=False)
    console.print(finding.lesson, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(finding.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in finding.rows:
        table.add_row(*row)
    console.print(table)
