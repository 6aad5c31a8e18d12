"""`fusebn info`: a table of what runs here."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what :func:`fusebn.info` returns."""
    machine = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    machine.add_column(style="dim")
    machine.add_column()
    machine.add_row("version", facts["version"])
    others = [name for name in facts["instruction_sets"] if name != facts["instruction_set"]]
    also = f" [dim](also built: {', '.join(others)})[/dim]" if others else ""
    machine.add_row("instruction set", facts["instruction_set"] + also)
    machine.add_row("threads", str(facts["threads"]))
    for level, size in facts["caches"].items():
        machine.add_row(f"{level} cache", _size(size))
    console.print(machine)

    frameworks = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("framework", "found", "support"):
        frameworks.add_column(heading)
    for name, found in facts["frameworks"].items():
        style = None if found["version"] else "dim"
        frameworks.add_row(name, found["version"] or "not found", found["support"], style=style)
    console.print(frameworks)


def _size(size: int) -> str:
    """Return bytes in the largest unit that divides them."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} bytes"
