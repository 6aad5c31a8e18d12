"""What a run on a device found: the CPU's form, and what is known of a device besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fusebn.cli.bench.cases import RESNET50
from fusebn.cli.bench.device.traffic import COUNTS, at_batch
from fusebn.cli.bench.machine import described
from fusebn.cli.bench.results import Record, Results, Run
from fusebn.cli.bench.steps import StepResults


@dataclass
class DeviceRun(Run):
    """One contestant in one case. Its memory is the framework's allocator's, which recycles."""

    how: str = "graph"  # or "calls": it could not be captured, and its launches are in its time


@dataclass
class DeviceRecord(Record):
    """One case and verb. Floors are bytes divided by the speed of a copy, in seconds."""

    one_sweep: float = 0.0  # `over_floor` is over this one
    two_sweeps: float = 0.0
    held: bool = False  # whether ours does it in one launch, and reads memory once
    slab: int = 0  # bytes of the strip that would be held, of all arrays that backward reads
    backend: str | None = None  # whose kernel PyTorch's eager batch norm is
    notes: dict[str, str] = field(default_factory=dict)  # contestant -> why it was not captured


@dataclass
class Sum:
    """A verb over all 53 batch norms of ResNet-50, in seconds."""

    dtype: str
    layout: str
    batch: int
    verb: str
    one_sweep: float
    two_sweeps: float
    seconds: dict[str, float]  # of those who could do each of them


@dataclass
class Goal:
    """What was to be reached, and what was."""

    name: str
    target: str
    measured: str | None = None
    met: bool | None = None  # None: not measured


@dataclass
class DeviceResults(Results):
    """All that a command found on a device. `peers` are names of contestants, and versions."""

    titles: dict[str, str] = field(default_factory=dict)
    chip: dict[str, Any] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    training: StepResults | None = None

    def title(self, who: str) -> str:
        """See Results."""
        return self.titles.get(who, who)

    def cases(self) -> list[DeviceRecord]:
        """Return the records, as what they are."""
        return [record for record in self.records if isinstance(record, DeviceRecord)]

    @property
    def footnote(self) -> str:
        """See Results."""
        return (
            "1 is the least that must be moved, at the speed of a copy: everything read once.\n"
            "CUDA events around replayed graphs, tensors from memory. Geometric means over "
            f"shapes.\n{described(self.machine)}"
        )

    def as_json(self) -> dict[str, Any]:
        """See Results."""
        found = super().as_json()
        found["training"] = self.training.as_json() if self.training else None
        return {**found, "device": True, "sums": [asdict(row) for row in sums(self)]}


def sums(results: DeviceResults) -> Iterator[Sum]:
    """Yield a row for each type, layout, batch and verb of which every shape was measured."""
    records = {(r.dtype, r.layout, r.verb, r.shape): r for r in results.cases() if r.runs}
    kinds = dict.fromkeys(key[:3] for key in records)
    batches = dict.fromkeys(int(key[3].partition("x")[0]) for key in records)
    for dtype, layout, verb in kinds:
        for batch in batches:
            found = [
                (records.get((dtype, layout, verb, at_batch(shape, batch))), COUNTS[shape])
                for shape in RESNET50
            ]
            every = [(record, count) for record, count in found if record]
            if len(every) == len(found):
                yield _sum(batch, every)


def _sum(batch: int, every: list[tuple[DeviceRecord, int]]) -> Sum:
    first = every[0][0]
    seconds: dict[str, float] = {}
    for who in (run.who for run in first.runs):
        runs = [(record.run(who), count) for record, count in every]
        if all(run for run, _ in runs):
            seconds[who] = sum(run.seconds.median * count for run, count in runs if run)
    one, two = (
        sum(getattr(record, floor) * count for record, count in every)
        for floor in ("one_sweep", "two_sweeps")
    )
    return Sum(first.dtype, first.layout, batch, first.verb, one, two, seconds)
