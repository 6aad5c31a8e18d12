"""What `explain` says of the batch norms of a model, for every framework: rows, and their table."""

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
        lines = [heads, tuple("-" * len(head) for head in heads)]
        lines += [(row.name or "(itself)", row.kind, folded(row), row.reason) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        lines[1] = tuple("-" * width for width in widths)
        shown = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(shown)

    __repr__ = __str__


def folded(row: Row) -> str:
    """Say what is folded into a batch norm."""
    parts = [part for part in ("residual" * row.residual, row.activation) if part]
    return " + ".join(parts) if parts else "nothing" if row.ours else "-"
