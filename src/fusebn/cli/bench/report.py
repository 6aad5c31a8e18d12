"""The tables: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusebn.cli.bench.machine import described
from fusebn.cli.bench.peers import PEERS
from fusebn.cli.bench.results import Record, Results, Row, Run, summary

# Eighty columns hold every peer.
SHORT = {
    "torch": "Torch",
    "tensorflow": "TF",
    "jax": "JAX",
    "keras": "Keras",
    "onnxruntime": "ORT",
    # on a GPU
    "fusebn-2": "two launches",
    "eager": "PyTorch",
    "compile": "compile",
}
LAYOUT = {"channels-last": "last", "channels-first": "first"}
FLOOR = """\
floor  the same reads and writes with our threads and no arithmetic: training
       forward reads x, then copies it; inference copies; backward reads dy and
       x, then reads both and writes dx; a residual is read or copied besides.
       Stores are plain or streamed, and what is read is asked for early or
       not, whichever is fastest.
warm   output memory that was used before (ours: out=; peers: an allocator
       that recycles)
fresh  as a user gets it, the output's memory fetched and given back
"""


# ---- the terminal ----


def line(record: Record) -> Text:
    """Return a case in a line, as soon as it is measured."""
    text = Text(f"{record.shape:>15} {LAYOUT[record.layout]:<5} {record.verb:<22}")
    ours, floor = record.run("fusebn"), record.run("floor")
    if ours is None or floor is None:
        return text.append(f"WRONG: {record.wrong}", "bold red")
    text.append(f"{1e3 * floor.seconds.median:8.3f}{1e3 * ours.seconds.median:8.3f} ms ")
    text.append(f"{ours.over_floor.median:6.2f}", _colour(ours.over_floor.median))
    return text.append(f" ±{_half(ours):.2f}", "dim")


def heading(dtype: str) -> Text:
    """Return what stands above the lines of an element type."""
    columns = f"{'ch.':<5} {'verb':<22}{'floor':>8}{'ours':>8}     ours/floor"
    return Text(f"\n{dtype:>15} {columns}", "dim")


def show(results: Results, console: Console) -> None:
    """Print the means, and what else was found."""
    rows = summary(results)
    for dtype, group in groupby(rows, key=lambda row: row.dtype):
        mine = list(group)
        count = max(row.shapes for row in mine)
        shapes = "1 shape" if count == 1 else f"geometric means over {count} shapes"
        for title, memory in (("warm memory", "warm"), ("fresh outputs", "fresh")):
            console.print(f"\n[bold]{dtype}, {title}[/][dim], {shapes}[/]")
            console.print(means_table(mine, results, memory))
    if rows:
        console.print(f"\n[dim]{FLOOR}[/]")
    for fact in _facts(results):
        console.print(escape(fact))


def busy_machine(machine: dict[str, Any]) -> str | None:
    """Warn of numbers that are worth little."""
    if (machine["load"] or 0) <= machine["cores"] / 4:
        return None
    return (
        f"This machine was busy before it began: load {machine['load']:.1f} on {machine['cores']} "
        "cores. All times suffer, those of libraries that wait at barriers most."
    )


def means_table(rows: list[Row], results: Results, memory: str) -> Table:
    """Return the means of an element type."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("verb", no_wrap=True)
    table.add_column("ch.", style="dim")
    table.add_column("ours\n/floor", justify="right")
    if memory == "warm":
        table.add_column("\nworst", justify="right", style="dim")
    shown = _peers(rows, results)
    for peer in shown:
        table.add_column(f"{SHORT.get(peer, results.title(peer))}\n/ours", justify="right")
    for row in rows:
        over_floor = row.over_floor if memory == "warm" else row.over_floor_fresh
        over_ours = row.over_ours if memory == "warm" else row.over_ours_fresh
        ours = over_floor.get("fusebn")
        cells = [Text(row.verb), Text(LAYOUT[row.layout])]
        cells.append(Text(f"{ours:.2f}", _colour(ours)) if ours else Text("-", "dim"))
        if memory == "warm":
            cells.append(Text(_number(row.worst) or "-"))
        for peer in shown:
            ratio = over_ours.get(peer)
            good = "green" if ratio and ratio >= 1 else "red"
            cells.append(Text("-", "dim") if ratio is None else Text(f"{ratio:.2f}", good))
        table.add_row(*cells)
    return table


def _peers(rows: list[Row], results: Results) -> list[str]:
    return [
        p for p in results.peers if any(p in row.over_ours | row.over_ours_fresh for row in rows)
    ]


def _colour(ratio: float) -> str:
    return "green" if ratio <= 1.25 else "yellow" if ratio <= 1.5 else "red"


def _half(run: Run) -> float:
    return (run.over_floor.high - run.over_floor.low) / 2


def _facts(results: Results) -> Iterator[str]:
    """Say in words what no table shows."""
    if results.overhead:
        yield "Microseconds a call on an array of 8x4:"
        for name, seconds in results.overhead.items():
            yield f"  {1e6 * seconds:6.1f}  {name}"
    if results.busy:
        busy = results.busy
        yield f"Forward of {busy['shape']} beside a loop that holds one core, milliseconds:"
        for name, step in (("median", ""), ("worst step", "worst_")):
            alone, beside = (1e3 * busy[step + where] for where in ("alone", "beside"))
            yield f"  {alone:6.2f} alone, {beside:6.2f} beside it: {beside / alone:.2f} x, {name}"
    refused: dict[tuple[str, str], int] = {}
    for record in results.records:
        for peer, reason in record.refused.items():
            key = peer.partition(" ")[0], reason
            refused[key] = refused.get(key, 0) + 1
    for (peer, reason), count in refused.items():
        yield f"Not measured, {PEERS[peer][0]}, {count} times: {reason}"
    if warning := busy_machine(results.machine):
        yield warning
    if results.left_out:
        total = len(results.records) + results.left_out
        yield f"No time was left for {results.left_out} of {total} cases."


# ---- Markdown ----


def markdown(results: Results) -> str:
    """Return everything as a page."""
    versions = [f"{PEERS[peer][0]} {version}" for peer, version in results.peers.items()]
    page = [
        "# fusebn bench",
        "",
        described(results.machine) + f"; {results.rounds} rounds. "
        f"Peers: {', '.join(versions) or 'none'}.",
        "",
        *FLOOR.strip().split("\n"),
    ]
    page[4:] = ["```text", *page[4:], "```"]
    for dtype, group in groupby(summary(results), key=lambda row: row.dtype):
        mine = list(group)
        peers = _peers(mine, results)
        means = "Geometric means over the shapes; a peer's time / ours, warm (in brackets: fresh)."
        page += ["", f"## {dtype}", "", means, ""]
        head = ["verb", "channels", "shapes", "ours / floor", "worst", "ours fresh / floor"]
        cells = [[*head, *(PEERS[peer][0] for peer in peers)]]
        for row in mine:
            cells.append(
                [
                    row.verb,
                    LAYOUT[row.layout],
                    str(row.shapes),
                    f"**{row.over_floor['fusebn']:.2f}**",
                    _number(row.worst),
                    _number(row.over_floor_fresh.get("fusebn")),
                    *(_pair(row.over_ours.get(p), row.over_ours_fresh.get(p)) for p in peers),
                ]
            )
        page += table_rows(cells)
    page += ["", "## Besides", "", "```text", *_facts(results), "```"]
    for dtype, records in groupby(results.records, key=lambda record: record.dtype):
        page += ["", f"## {dtype}, each case", "", "Milliseconds, warm (in brackets: fresh).", ""]
        page += table_rows(_details(list(records), results))
    return "\n".join(page) + "\n"


def _details(records: list[Record], results: Results) -> list[list[str]]:
    peers = [p for p in results.peers if any(r.run(p, m) for r in records for m in _MEMORIES)]
    names = [PEERS[peer][0] for peer in peers]
    cells = [["shape", "channels", "verb", "floor", "ours", "ours / floor", "quartiles", *names]]
    for record in records:
        ours, floor = record.run("fusebn"), record.run("floor")
        row = [record.shape, LAYOUT[record.layout], record.verb]
        if ours is None or floor is None:
            cells.append([*row, f"wrong: {record.wrong}", "", "", "", *("" for _ in peers)])
            continue
        ratio = ours.over_floor
        row += [f"{1e3 * floor.seconds.median:.3f}", _times(record, "fusebn")]
        row += [f"**{ratio.median:.2f}**", f"{ratio.low:.2f} to {ratio.high:.2f}"]
        cells.append([*row, *(_times(record, peer) for peer in peers)])
    return cells


_MEMORIES = ("warm", "fresh")


def _times(record: Record, who: str) -> str:
    runs = [record.run(who, memory) for memory in _MEMORIES]
    warm, fresh = (1e3 * run.seconds.median if run else None for run in runs)
    return _pair(warm, fresh, digits=3)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _pair(warm: float | None, fresh: float | None, digits: int = 2) -> str:
    return f"{_number(warm, digits)} ({_number(fresh, digits)})" if warm or fresh else ""


def table_rows(cells: Iterable[list[str]]) -> list[str]:
    """Return a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * lines[0].count(" | ") + " --- |")
    return lines
