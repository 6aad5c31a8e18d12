"""Training steps in TensorFlow: measured in turns, each answer checked, and what was found.

All ways run in one process for each kind of memory, so that they share TensorFlow's threads and its
allocator. A step is one forward and backward pass in a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from fusebn.cli.bench.answers import Answer, Truth, Wrong
from fusebn.cli.bench.cases import STEPS, VERBS, Step, data_of
from fusebn.cli.bench.results import SCHEMA, Spread, mean
from fusebn.cli.bench.runner import Key, Plan, Turn, ratio, take_turns
from fusebn.cli.bench.worker import Unable, Worker

PEER = "tensorflow_steps"  # the module under peers/


@dataclass
class StepRun:
    """One way in one case."""

    step: str
    memory: str  # "fresh": as a user gets it; "warm": from an allocator that recycles
    seconds: Spread
    over_ours: Spread | None  # the ratio to the step it is against; None if that is missing


@dataclass
class StepRecord:
    """One case."""

    shape: str
    layout: str
    dtype: str
    wrong: str | None = None  # an answer of ours was wrong, and so nothing was measured
    runs: list[StepRun] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # step and memory -> why

    def run(self, step: str, memory: str) -> StepRun | None:
        """Return the run of a step."""
        return next((run for run in self.runs if (run.step, run.memory) == (step, memory)), None)


@dataclass
class StepRow:
    """Geometric means over the shapes measured, of one step's ratio to ours."""

    dtype: str
    layout: str
    memory: str
    shapes: int
    over_ours: dict[str, float]


@dataclass
class StepResults:
    """All that a command found."""

    machine: dict[str, Any]
    version: str  # TensorFlow's
    rounds: int
    records: list[StepRecord] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        rows = [asdict(row) for row in summary(self)]
        return {"schema": SCHEMA, "steps": True, **asdict(self), "summary": rows}


def summary(results: StepResults) -> list[StepRow]:
    """Return a row for each type, layout and kind of memory, in the order they were run."""
    right = [record for record in results.records if record.runs]
    keys = dict.fromkeys(
        (record.dtype, record.layout, run.memory) for record in right for run in record.runs
    )
    rows = []
    for dtype, layout, memory in keys:
        mine = [record for record in right if (record.dtype, record.layout) == (dtype, layout)]
        ratios = {
            step: [
                run.over_ours.median
                for record in mine
                if (run := record.run(step, memory)) and run.over_ours
            ]
            for step in STEPS
        }
        means = {step: mean(values) for step, values in ratios.items() if values}
        rows.append(StepRow(dtype, layout, memory, len(mine), means))
    return rows


def measure(plan: Plan, workers: list[Worker]) -> Iterator[StepRecord]:
    """Yield a record for each case."""
    for case in plan.cases():
        if plan.deadline is not None and perf_counter() > plan.deadline:
            return
        record = StepRecord(case.shape, case.layout, case.dtype)
        truth = Truth(case, data_of(case))
        turns: dict[Key, Turn] = {}
        try:
            for worker in workers:
                worker.load(case)
                for step in STEPS.values():
                    if turn := _prepared(record, step, truth, worker):
                        turns[step.name, worker.memory] = turn
        except Wrong as reason:
            record.wrong = str(reason)
        else:
            _race(record, turns, plan.rounds)
        yield record


def _prepared(record: StepRecord, step: Step, truth: Truth, worker: Worker) -> Turn | None:
    """Return the turns of a step that gives the right answer. Wrong is raised for ours alone."""
    try:
        _check(truth, worker.prepare(step, keep=True) or {}, peer=not step.ours)
        return partial(worker.turn, step)
    except (Wrong, Unable) as reason:
        if step.ours and isinstance(reason, Wrong):
            raise Wrong(f"{step.title}: {reason}") from None
        record.refused[f"{step.name} {worker.memory}"] = str(reason).partition("\n")[0][:200]
        return None


def _check(truth: Truth, answer: Answer, peer: bool) -> None:
    for verb in ("forward", "backward"):
        truth.check(VERBS[verb], answer, peer=peer)


def _race(record: StepRecord, turns: dict[Key, Turn], rounds: int) -> None:
    seconds = take_turns(turns, rounds)
    for (name, memory), values in seconds.items():
        ours = seconds.get((STEPS[name].against, memory))
        record.runs.append(
            StepRun(name, memory, Spread.of(values), None if ours is None else ratio(values, ours))
        )
