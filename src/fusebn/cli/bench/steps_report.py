"""The tables of training steps in TensorFlow: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusebn.cli.bench.cases import STEPS
from fusebn.cli.bench.machine import described
from fusebn.cli.bench.report import LAYOUT, busy_machine, table_rows
from fusebn.cli.bench.steps import StepRecord, StepResults, summary

# What the ratios are of: the time of a step, divided by that of ours.
OTHERS = {name: step for name, step in STEPS.items() if step.against != name}
NOTE = """\
A step is forward and backward in a tf.compat.v1 session. A ratio is the time of
a step divided by that of fusebn with is_training=True; two ops in a cond are
divided by fusebn with a tensor, which does the same.
fresh  as a user gets it, the outputs' memory fetched and given back
warm   memory that was used before, from an allocator that recycles
"""


def line(record: StepRecord) -> Text:
    """Return a case in a line, as soon as it is measured."""
    text = Text(f"{record.dtype:<9}{record.shape:>15} {LAYOUT[record.layout]:<6}")
    if record.wrong:
        return text.append(f"WRONG: {record.wrong}", "bold red")
    ours = record.run("fusebn", "fresh")
    text.append(f"{1e3 * ours.seconds.median:9.3f} ms" if ours else f"{'-':>12}")
    for name in OTHERS:
        run = record.run(name, "fresh")
        text.append(f"{run.over_ours.median:9.2f}" if run and run.over_ours else f"{'-':>9}")
    return text


def heading() -> Text:
    """Return what stands above the lines."""
    names = "".join(f"{name:>9}" for name in OTHERS)
    return Text(f"{'':<9}{'':>15} {'ch.':<6}{'fusebn':>12}{names}", "dim")


def show(results: StepResults, console: Console) -> None:
    """Print the means over the shapes."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in ("type", "ch.", "memory", "shapes"):
        table.add_column(column)
    for name in OTHERS:
        table.add_column(f"{name}\n/ours", justify="right")
    for row in summary(results):
        ratios = [row.over_ours.get(name) for name in OTHERS]
        table.add_row(
            row.dtype,
            LAYOUT[row.layout],
            row.memory,
            str(row.shapes),
            *("-" if value is None else f"{value:.2f}" for value in ratios),
        )
    console.print(f"\n[bold]Training steps[/][dim], TensorFlow {results.version}, means[/]")
    console.print(table)
    for name, step in STEPS.items():
        console.print(f"[dim]{name:<8} {step.title}[/]")
    console.print(f"\n[dim]{NOTE}[/]")
    for fact in _facts(results):
        console.print(escape(fact))


def markdown(results: StepResults) -> str:
    """Return everything as a page."""
    titles = [step.title for step in OTHERS.values()]
    page = [
        "# fusebn bench --tensorflow",
        "",
        f"{described(results.machine)}; {results.rounds} rounds. TensorFlow {results.version}.",
        "",
        *("```text", *NOTE.strip().split("\n"), "```"),
        "",
        "## Geometric means over the shapes: a step's time / ours",
        "",
    ]
    cells = [["type", "channels", "memory", "shapes", *titles]]
    for row in summary(results):
        ratios = [row.over_ours.get(name) for name in OTHERS]
        cells.append(
            [row.dtype, LAYOUT[row.layout], row.memory, str(row.shapes)]
            + ["" if value is None else f"**{value:.2f}**" for value in ratios]
        )
    page += [*table_rows(cells), "", *_facts(results)]
    page += ["", "## Each case: milliseconds, fresh (in brackets: warm)", ""]
    cells = [["type", "channels", "shape", *(step.title for step in STEPS.values())]]
    for record in results.records:
        times = [_times(record, name) for name in STEPS]
        cells.append([record.dtype, LAYOUT[record.layout], record.shape, *times])
    return "\n".join([*page, *table_rows(cells)]) + "\n"


def _times(record: StepRecord, step: str) -> str:
    if record.wrong:
        return "wrong"
    fresh, warm = (record.run(step, memory) for memory in ("fresh", "warm"))
    texts = [f"{1e3 * run.seconds.median:.3f}" if run else "-" for run in (fresh, warm)]
    return f"{texts[0]} ({texts[1]})"


def _facts(results: StepResults) -> Iterator[str]:
    """Say in words what no table shows."""
    reasons: dict[str, int] = {}
    for record in results.records:
        for step, reason in record.refused.items():
            key = f"{STEPS[step.partition(' ')[0]].title}: {reason}"
            reasons[key] = reasons.get(key, 0) + 1
    for reason, count in reasons.items():
        yield f"Not measured, {count} times: {reason}"
    if warning := busy_machine(results.machine):
        yield warning
