"""What a run found, as plain values: the form of the JSON file, and the means over shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import Any

from fusebn.cli.bench.machine import described
from fusebn.cli.bench.peers import PEERS

SCHEMA = 1
BIG = 32 << 20  # above it an allocator returns memory to the system


@dataclass
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass
class Run:
    """One contender in one case: ratios are medians of the ratios in each round."""

    who: str  # "floor", "fusebn" or a peer
    memory: str  # "warm": output memory that was used before; "fresh": as a user gets it
    seconds: Spread
    over_floor: Spread
    over_ours: Spread | None  # against ours with the same kind of memory; None if that is missing


@dataclass
class Record:
    """One case and verb."""

    shape: str
    layout: str
    dtype: str
    verb: str
    bytes: int  # of one tensor
    wrong: str | None = None  # our answer was wrong, and so nothing was measured
    floor: str | None = None  # how the fastest floor went about it
    runs: list[Run] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # peer -> why it was not measured

    def run(self, who: str, memory: str = "warm") -> Run | None:
        """Return a contender's run."""
        return next((run for run in self.runs if (run.who, run.memory) == (who, memory)), None)


@dataclass
class Results:
    """All that a command found."""

    machine: dict[str, Any]
    peers: dict[str, str]  # name -> version
    rounds: int
    records: list[Record] = field(default_factory=list)
    left_out: int = 0  # cases that --quick had no time for
    overhead: dict[str, float] | None = None  # call -> seconds, on a tiny array
    busy: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        return {"schema": SCHEMA, **asdict(self), "summary": [asdict(row) for row in summary(self)]}

    def title(self, peer: str) -> str:
        """Return what tables call a peer."""
        return PEERS[peer][0]

    @property
    def footnote(self) -> str:
        """What a plot says of its numbers."""
        return (
            "1 is what reading and writing the tensors takes, without arithmetic.\n"
            "Dark: warm memory; pale, in brackets: fresh outputs. Geometric means over shapes.\n"
            + described(self.machine)
        )


@dataclass
class Row:
    """Geometric means over the shapes measured."""

    dtype: str
    layout: str
    verb: str
    shapes: int
    over_floor: dict[str, float]  # "fusebn", a peer; of warm memory
    over_floor_fresh: dict[str, float]
    over_ours: dict[str, float]  # a peer
    over_ours_fresh: dict[str, float]
    over_ours_fresh_big: dict[str, float]  # of tensors above 32 MiB only
    worst: float | None  # ours over the floor, of any shape
    first_over_last: float | None  # ours, channels-first over channels-last, where both were run


def mean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summary(results: Results) -> list[Row]:
    """Return a row for each type, layout and verb, in the order they were run."""
    right = [record for record in results.records if record.runs]
    keys = dict.fromkeys((record.dtype, record.layout, record.verb) for record in right)
    return [_row(results, right, *key) for key in sorted(keys, key=_order(right))]


def _order(records: list[Record]) -> Any:
    ranks = [
        list(dict.fromkeys(getattr(record, name) for record in records))
        for name in ("dtype", "verb", "layout")
    ]
    return lambda key: (ranks[0].index(key[0]), ranks[1].index(key[2]), ranks[2].index(key[1]))


def _row(results: Results, records: list[Record], dtype: str, layout: str, verb: str) -> Row:
    mine = [r for r in records if (r.dtype, r.layout, r.verb) == (dtype, layout, verb)]

    def means(ratio: str, memory: str, least: int = 0) -> dict[str, float]:
        return {
            who: mean(ratios)
            for who in ("fusebn", *results.peers)
            if (ratios := list(_ratios([r for r in mine if r.bytes > least], who, memory, ratio)))
        }

    twins = {
        r.shape: r
        for r in records
        if (r.dtype, r.layout, r.verb) == (dtype, "channels-last", verb)
        and layout == "channels-first"
    }
    pairs = [
        run.seconds.median / twin.seconds.median
        for r in mine
        if r.shape in twins and (run := r.run("fusebn")) and (twin := twins[r.shape].run("fusebn"))
    ]
    return Row(
        dtype,
        layout,
        verb,
        len(mine),
        means("over_floor", "warm"),
        means("over_floor", "fresh"),
        means("over_ours", "warm"),
        means("over_ours", "fresh"),
        means("over_ours", "fresh", BIG),
        max(_ratios(mine, "fusebn", "warm", "over_floor"), default=None),
        mean(pairs) if pairs else None,
    )


def _ratios(records: list[Record], who: str, memory: str, ratio: str) -> Iterator[float]:
    for record in records:
        run = record.run(who, memory)
        if run and (spread := getattr(run, ratio)):
            yield spread.median
