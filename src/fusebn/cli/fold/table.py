"""What `fusebn fold` prints: each batch norm, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Row(Protocol):
    """A row of :class:`fusebn.onnx.FoldReport`."""

    @property
    def name(self) -> str:
        """The batch norm."""

    @property
    def layer(self) -> str | None:
        """What it was folded into."""

    @property
    def reason(self) -> str:
        """Why not."""


def show(rows: Iterable[Row], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("batch norm", "folded into", "kept, because"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = None if row.layer else "dim"
        # Names are a stranger's: no markup in them.
        table.add_row(Text(row.name), Text(row.layer or "-"), Text(row.reason), style=style)
    console.print(table)
