"""What is said of the batch norms of a model, for every framework: rows, and their table.

`explain` says what is fused into each, `explain_fold` which layer each can be folded into.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One batch norm in a report."""

    name: str
    """Where it is in the model."""
    kind: str
    """Its class."""
    ours: bool
    """Whether it runs on our kernels."""
    residual: bool
    """Whether a sum is folded into it."""
    activation: str | None
    """The activation that is folded into it."""
    reason: str
    """Why not more, or ""."""

    @property
    def fused(self) -> bool:
        """Whether anything is folded into it."""
        return self.residual or self.activation is not None


class Report(tuple[Row, ...]):
    """The rows of ``explain``; as a string, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return the table."""
        heads = ("batch norm", "class", "fused with", "not more, because")
        lines = ((row.name or "(itself)", row.kind, folded(row), row.reason) for row in self)
        return _table(heads, lines)

    __repr__ = __str__


def folded(row: Row) -> str:
    """Say what is folded into a batch norm."""
    parts = [part for part in ("residual" * row.residual, row.activation) if part]
    return " + ".join(parts) if parts else "nothing" if row.ours else "-"


class FoldRow(NamedTuple):
    """One batch norm in a report of folding."""

    name: str
    """Where it is in the model."""
    kind: str
    """Its class."""
    layer: str | None
    """The layer that it is folded into, or None."""
    reason: str
    """Why it is not, or ""."""


class FoldReport(tuple[FoldRow, ...]):
    """The rows of ``explain_fold``; as a string, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return the table."""
        heads = ("batch norm", "class", "folded into", "not, because")
        lines = ((row.name or "(itself)", row.kind, row.layer or "-", row.reason) for row in self)
        return _table(heads, lines)

    __repr__ = __str__


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = tuple("-" * width for width in widths)
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
