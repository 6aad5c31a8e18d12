"""What is printed of a device: the machine, lines, means, sums and goals; and the page."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusebn.cli.bench.device.chip import Chip
from fusebn.cli.bench.device.findings import DeviceRecord, DeviceResults, DeviceRun, Goal, sums
from fusebn.cli.bench.machine import described
from fusebn.cli.bench.report import LAYOUT, SHORT, means_table, table_rows
from fusebn.cli.bench.results import Run, summary

NOTE = """\
floor  the bytes that must be moved if memory is read once, divided by the speed
       of a copy; two sweeps are the bytes of a kernel that reads x twice
time   CUDA events around replays of a graph of calls, which go through copies
       of their tensors, so that none is found in the L2 cache
*      could not be captured: events around plain calls, launches and all
"""


# ---- the machine ----


def machine_facts(chip: Chip) -> Iterator[tuple[str, str]]:
    """Yield what was measured of a device, by name."""
    yield "device", f"{chip.name}, compute capability {chip.capability}"
    yield "multiprocessors", str(chip.processors)
    yield "L2 cache", f"{chip.l2 / 1e6:.0f} MB"
    yield "memory", f"{chip.memory / 1e9:.0f} GB"
    for name, speed in (("copy", chip.copy), ("read", chip.read), ("write", chip.write)):
        yield name, f"{speed / 1e12:.3f} TB/s"
    for name, seconds in chip.launches.items():
        yield f"launch, {name}", f"{1e6 * seconds:.2f} µs"
    for programs, seconds in chip.barriers.items():
        yield f"barrier of {programs} programs", f"{1e6 * seconds:.2f} µs"
    for size, speed in chip.rereads.items():
        yield f"read again, {size >> 20} MiB", f"{speed / 1e12:.3f} TB/s"
    for what, why in chip.unable.items():
        yield f"{what}, not measured", why


def show_machine(chip: Chip, console: Console) -> None:
    """Print the machine."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, fact in machine_facts(chip):
        table.add_row(name, escape(fact))
    console.print(table)


# ---- the terminal ----


def heading(dtype: str) -> Text:
    """Return what stands above the lines of an element type."""
    columns = f"{'ch.':<5} {'verb':<22}{'floor':>8}{'ours':>9}    /floor Torch"
    return Text(f"\n{dtype:>15} {columns}", "dim")


def line(record: DeviceRecord) -> Text:
    """Return a case in a line, as soon as it is measured."""
    text = Text(f"{record.shape:>15} {LAYOUT[record.layout]:<5} {record.verb:<22}")
    if record.wrong:
        return text.append(f"WRONG: {record.wrong}", "bold red")
    text.append(f"{1e6 * record.one_sweep:8.1f}")
    ours, torch = record.run("fusebn"), record.run("eager")
    if ours is None:
        return text.append(f"  not measured: {record.refused.get('fusebn')}", "red")
    text.append(f"{_time(ours):>9} µs {ours.over_floor.median:6.2f}")
    return text.append(f"{torch.over_ours.median:6.2f}" if torch and torch.over_ours else "     -")


def show(results: DeviceResults, console: Console) -> None:
    """Print the means, the sums, the goals, and what else was found."""
    for dtype, group in groupby(summary(results), key=lambda row: row.dtype):
        mine = list(group)
        shapes = max(row.shapes for row in mine)
        console.print(f"\n[bold]{dtype}[/][dim], geometric means, shapes: {shapes}[/]")
        console.print(means_table(mine, results, "warm"))
    console.print(f"\n[dim]{NOTE}[/]")
    for title, (head, *rows) in _sums(results):
        console.print(f"\n[bold]{title}[/][dim], milliseconds[/]")
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column > 1 else "left", no_wrap=not column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if results.records or results.training:
        console.print("\n[bold]Goals[/]")
        console.print(_goal_table(results.goals))
    for fact in _facts(results):
        console.print(escape(fact))


def _goal_table(goals: list[Goal]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("goal", "target", "measured", ""):
        table.add_column(column)
    for goal in goals:
        style = {True: "green", False: "red", None: "dim"}[goal.met]
        table.add_row(*_goal_cells(goal), style=style)
    return table


def _goal_cells(goal: Goal) -> list[str]:
    met = {True: "met", False: "missed", None: ""}[goal.met]
    return [goal.name, goal.target, goal.measured or "not measured", met]


def _sums(results: DeviceResults) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield what all batch norms of ResNet-50 take, a table for each type."""
    for dtype, group in groupby(sums(results), key=lambda row: row.dtype):
        rows = list(group)
        whose = [who for who in results.titles if any(who in row.seconds for row in rows)]
        titles = [SHORT.get(who, results.title(who)) for who in whose]
        cells = [["verb", "ch.", "batch", "one\nsweep", "two\nsweeps", *titles]]
        for row in rows:
            times = (row.one_sweep, row.two_sweeps, *(row.seconds.get(who) for who in whose))
            shown = ("-" if time is None else f"{1e3 * time:.2f}" for time in times)
            cells.append([row.verb, LAYOUT[row.layout], str(row.batch), *shown])
        yield f"All 53 of ResNet-50, {dtype}", cells


def _facts(results: DeviceResults) -> Iterator[str]:
    """Say in words what no table shows."""
    records = results.cases()
    backends = dict.fromkeys((r.dtype, r.layout, r.backend) for r in records if r.backend)
    for dtype, layout, backend in backends:
        yield f"PyTorch's batch norm in {dtype}, {layout}, is served by: {backend}"
    said: dict[str, int] = {}
    for record in records:
        for what, reasons in (("Not measured", record.refused), ("Not captured", record.notes)):
            for who, reason in reasons.items():
                text = f"{what}, {results.title(who)}: {reason}"
                said[text] = said.get(text, 0) + 1
    for text, count in said.items():
        yield f"{text} ({count} times)"
    if results.left_out:
        total = len(results.records) + results.left_out
        yield f"No time was left for {results.left_out} of {total} cases."


# ---- Markdown ----


def markdown(results: DeviceResults, chip: Chip) -> str:
    """Return everything as a page."""
    versions = ", ".join(f"{name} {version}" for name, version in chip.versions.items())
    page = ["# fusebn bench --device cuda", ""]
    page += [f"{described(results.machine)}; {results.rounds} rounds. {versions}.", ""]
    page += ["## The machine", "", *table_rows([["what", "measured"], *_pairs(chip)]), ""]
    if results.records:
        page += ["```text", *NOTE.strip().split("\n"), "```"]
    for dtype, group in groupby(summary(results), key=lambda row: row.dtype):
        head = ["verb", "channels", "shapes", "ours / floor", "worst"]
        cells = [[*head, *(f"{results.title(peer)} / ours" for peer in results.peers)]]
        for row in group:
            ours = row.over_floor.get("fusebn")
            numbers = [ours, row.worst, *(row.over_ours.get(peer) for peer in results.peers)]
            shown = ("" if number is None else f"{number:.2f}" for number in numbers)
            cells.append([row.verb, LAYOUT[row.layout], str(row.shapes), *shown])
        page += ["", f"## {dtype}: geometric means", "", *table_rows(cells)]
    page += ["", "## Goals", ""]
    page += table_rows(
        [["goal", "target", "measured", "met"], *(_goal_cells(goal) for goal in results.goals)]
    )
    for title, cells in _sums(results):
        page += ["", f"## {title}: milliseconds", "", *table_rows(_flat(cells))]
    if besides := list(_facts(results)):
        page += ["", "## Besides", "", "```text", *besides, "```"]
    for dtype, records in groupby(results.cases(), key=lambda record: record.dtype):
        page += ["", f"## {dtype}, each case: microseconds", ""]
        page += table_rows(_details(results, list(records)))
    return "\n".join(page) + "\n"


def _flat(cells: list[list[str]]) -> list[list[str]]:
    return [[cell.replace("\n", " ") for cell in row] for row in cells]


def _pairs(chip: Chip) -> list[list[str]]:
    return [list(pair) for pair in machine_facts(chip)]


def _details(results: DeviceResults, records: list[DeviceRecord]) -> list[list[str]]:
    whose = [who for who in results.titles if any(record.run(who) for record in records)]
    head = ["shape", "channels", "verb", "held", "one sweep", "two sweeps"]
    cells = [[*head, *(results.title(who) for who in whose)]]
    for record in records:
        floors = (f"{1e6 * seconds:.1f}" for seconds in (record.one_sweep, record.two_sweeps))
        row = [record.shape, LAYOUT[record.layout], record.verb, "yes" if record.held else "no"]
        if record.wrong:
            whole = [f"wrong: {record.wrong}", *("" for _ in whose[1:])]
            cells.append([*row, *floors, *whole[: len(whose)]])
            continue
        runs = (record.run(who) for who in whose)
        cells.append([*row, *floors, *(_time(run) if run else "" for run in runs)])
    return cells


def _time(run: Run) -> str:
    """Return microseconds, with a star where launches are in them."""
    star = "*" if isinstance(run, DeviceRun) and run.how != "graph" else ""
    return f"{1e6 * run.seconds.median:.1f}{star}"
