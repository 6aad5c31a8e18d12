"""The tables of a suite of steps: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusebn.cli.bench.machine import described
from fusebn.cli.bench.report import LAYOUT, busy_machine, table_rows
from fusebn.cli.bench.steps import StepRecord, StepResults, StepRun, summary
from fusebn.cli.bench.suites import Step, Suite


def others(suite: Suite) -> dict[str, Step]:
    """Return the steps that have a ratio: their time, divided by that of the one of ours."""
    return {name: step for name, step in suite.steps.items() if step.against != name}


def line(suite: Suite, record: StepRecord) -> Text:
    """Return a case in a line, as soon as it is measured."""
    text = Text(f"{record.dtype:<9}{record.shape:>15} {LAYOUT[record.layout]:<6}")
    if record.wrong:
        return text.append(f"WRONG: {record.wrong}", "bold red")
    ours = record.run(_first(suite), "fresh")
    text.append(f"{_time(suite, ours):>9} {_UNITS[suite.tiny][1]}" if ours else f"{'-':>12}")
    for name in others(suite):
        run = record.run(name, "fresh")
        ratio = f"{run.over_ours.median:.2f}" if run and run.over_ours else "-"
        text.append(f"{ratio:>{_width(name)}}")
    return text


def heading(suite: Suite) -> Text:
    """Return what stands above the lines."""
    names = "".join(f"{name:>{_width(name)}}" for name in others(suite))
    return Text(f"{'':<9}{'':>15} {'ch.':<6}{_first(suite).partition('-')[0]:>12}{names}", "dim")


def _width(name: str) -> int:
    """Return a column's: so wide that five of them fit 80 columns."""
    return max(7, len(name) + 2)


def _first(suite: Suite) -> str:
    return next(step.name for step in suite.steps.values() if step.ours)


_UNITS = {False: (1e3, "ms", "milliseconds"), True: (1e6, "µs", "microseconds")}


def _time(suite: Suite, run: StepRun) -> str:
    return f"{_UNITS[suite.tiny][0] * run.seconds.median:.3f}"


def show(results: StepResults, console: Console) -> None:
    """Print the means over the shapes."""
    suite = results.suite
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in ("type", "ch.", "memory", "shapes"):
        table.add_column(column)
    for name in others(suite):
        table.add_column(f"{name}\n/ours", justify="right")
    for row in summary(results):
        ratios = [row.over_ours.get(name) for name in others(suite)]
        table.add_row(
            row.dtype,
            LAYOUT[row.layout],
            row.memory,
            str(row.shapes),
            *("-" if value is None else f"{value:.2f}" for value in ratios),
        )
    which = f"{suite.framework} {results.version}, means"
    console.print(f"\n[bold]{suite.title}[/][dim], {which}[/]")
    console.print(table)
    for name, step in suite.steps.items():
        console.print(f"[dim]{name:<15} {step.title}[/]")
    console.print(f"\n[dim]{suite.note}[/]")
    for fact in _facts(results):
        console.print(escape(fact))


def markdown(results: StepResults, option: str) -> str:
    """Return everything as a page."""
    suite = results.suite
    titles = [step.title for step in others(suite).values()]
    page = [
        f"# fusebn bench {option}: {suite.title[0].lower()}{suite.title[1:]}",
        "",
        f"{described(results.machine)}; {results.rounds} rounds. "
        f"{suite.framework} {results.version}.",
        "",
        *("```text", *suite.note.strip().split("\n"), "```"),
        "",
        "## Geometric means over the shapes: a step's time / ours",
        "",
    ]
    cells = [["type", "channels", "memory", "shapes", *titles]]
    for row in summary(results):
        ratios = [row.over_ours.get(name) for name in others(suite)]
        cells.append(
            [row.dtype, LAYOUT[row.layout], row.memory, str(row.shapes)]
            + ["" if value is None else f"**{value:.2f}**" for value in ratios]
        )
    page += [*table_rows(cells), "", *_facts(results)]
    brackets = " (in brackets: warm)" if "warm" in suite.memories else ""
    page += ["", f"## Each case: {_UNITS[suite.tiny][2]}, fresh{brackets}", ""]
    cells = [["type", "channels", "shape", *(step.title for step in suite.steps.values())]]
    for record in results.records:
        times = [_times(suite, record, name) for name in suite.steps]
        cells.append([record.dtype, LAYOUT[record.layout], record.shape, *times])
    return "\n".join([*page, *table_rows(cells)]) + "\n"


def _times(suite: Suite, record: StepRecord, step: str) -> str:
    if record.wrong:
        return "wrong"
    fresh, warm = (record.run(step, memory) for memory in ("fresh", "warm"))
    texts = [_time(suite, run) if run else "-" for run in (fresh, warm)]
    return f"{texts[0]} ({texts[1]})" if "warm" in suite.memories else texts[0]


def _facts(results: StepResults) -> Iterator[str]:
    """Say in words what no table shows."""
    steps = results.suite.steps
    for record in results.records:
        yield from _peaks(record, steps)
        yield from _curves(record, steps)
    reasons: dict[str, int] = {}
    for record in results.records:
        for step, reason in record.refused.items():
            key = f"{steps[step.partition(' ')[0]].title}: {reason}"
            reasons[key] = reasons.get(key, 0) + 1
    for reason, count in reasons.items():
        yield f"Not measured, {count} times: {reason}"
    if warning := busy_machine(results.machine):
        yield warning


def _peaks(record: StepRecord, steps: dict[str, Step]) -> Iterator[str]:
    peaks = [(run, run.peak) for run in record.runs if run.peak is not None]
    if peaks:
        yield f"Resident memory of the process in a step at most, {record.dtype}:"
    for run, peak in peaks:
        yield f"- {peak / 2**30:.2f} GiB, {steps[run.step].title}, {run.memory}"


def _curves(record: StepRecord, steps: dict[str, Step]) -> Iterator[str]:
    """Compare the losses with those of the way that came first."""
    curves = [(run, run.losses) for run in record.runs if run.losses is not None]
    if len(curves) < 2:
        return
    (_, first), *rest = curves
    yield (
        f"Loss, {record.dtype}: {first[0]:.4f} at first, {first[-1]:.4f} at step {len(first)}; "
        f"the largest difference of a loss is"
    )
    for run, losses in rest:
        error = max(abs(a - b) for a, b in zip(first, losses, strict=True))
        yield f"- {error:.1e}, {steps[run.step].title}, {run.memory}"
