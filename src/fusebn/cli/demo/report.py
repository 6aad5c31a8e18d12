"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import fusebn
from fusebn.cli.demo import figures
from fusebn.cli.demo.digits import Digits
from fusebn.cli.demo.findings import Finding, percent
from fusebn.cli.demo.network import First
from fusebn.cli.demo.quantized import Quantization
from fusebn.cli.demo.schedule import BATCH
from fusebn.cli.demo.watch import History


class Summary(NamedTuple):
    """What the head of the report says."""

    framework: str
    seed: int
    epochs: int
    accuracy: float
    training: Digits
    held_out: Digits


def write(
    path: Path,
    summary: Summary,
    first: First,
    history: History,
    channels: list[int],
    shown: list[Finding],
    last_act: Quantization | None,
) -> None:
    """Write the page: the figures, and the same tables as in the terminal."""
    template = resources.files("fusebn.cli.demo").joinpath("report.html").read_text("utf-8")
    convergence, *mistakes = shown
    facts = fusebn.info()
    page = Template(template).substitute(
        accuracy=percent(summary.accuracy),
        framework=summary.framework,
        seed=summary.seed,
        epochs=summary.epochs,
        training=f"{len(summary.training.labels):,}",
        held_out=len(summary.held_out.labels),
        version=facts["version"],
        instruction_set=facts["instruction_set"],
        threads=facts["threads"],
        batch=BATCH,
        learning="\n".join(figures.learning(history)),
        convergence="\n".join(figures.convergence(history, channels)),
        convergence_lesson=escape(convergence.lesson),
        convergence_table=_table(convergence),
        activations="\n".join(figures.activations(first, summary.training.images)),
        mistakes="\n".join(_section(finding) for finding in mistakes),
        quantization=_quantization(last_act) if last_act else "",
    )
    path.write_text(page, "utf-8")


def _section(finding: Finding) -> str:
    return (
        f"<section><h2>{escape(finding.title)}</h2><p>{escape(finding.lesson)}</p>"
        f"{_table(finding)}</section>"
    )


def _quantization(last_act: Quantization) -> str:
    tuning, folding = last_act.findings
    pair = "\n".join(figures.quantization(last_act))
    return (
        f"<section><h2>{escape(tuning.title)}</h2><p>{escape(tuning.lesson)}</p>"
        f'<div class="pair">{pair}</div>{_table(tuning)}</section>{_section(folding)}'
    )


def _table(finding: Finding) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in finding.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in finding.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'
