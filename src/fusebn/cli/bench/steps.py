"""The steps of a suite: measured in turns, each answer checked, and what was found.

All steps run in one process for each kind of memory, so that they share the framework's threads
and its allocator; those of a suite that measures memory too, in a process each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from fusebn.cli.bench.answers import Agreement, Answer, Truth, Wrong
from fusebn.cli.bench.cases import VERBS, Array, Case, data_of
from fusebn.cli.bench.results import SCHEMA, Spread, mean
from fusebn.cli.bench.runner import Key, Plan, Turn, ratio, take_turns
from fusebn.cli.bench.suites import Step, Suite
from fusebn.cli.bench.worker import Unable, Worker


@dataclass
class StepRun:
    """One way in one case."""

    step: str
    memory: str  # "fresh": as a user gets it; "warm": from an allocator that recycles
    seconds: Spread
    over_ours: Spread | None  # the ratio to the step it is against; None if that is missing
    peak: float | None = None  # bytes resident at most, where a step is a process
    losses: list[float] | None = None  # of the first steps, where a step trains a network


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
    """All that was found about a suite."""

    suite: Suite
    machine: dict[str, Any]
    version: str  # of the framework
    rounds: int
    records: list[StepRecord] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        rows = [asdict(row) for row in summary(self)]
        found = {**asdict(self), "suite": self.suite.name}
        return {"schema": SCHEMA, "steps": True, **found, "summary": rows}


class Crew(NamedTuple):
    """A worker, and the steps that are its own."""

    worker: Worker
    steps: tuple[Step, ...]


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
            for step in results.suite.steps
        }
        means = {step: mean(values) for step, values in ratios.items() if values}
        rows.append(StepRow(dtype, layout, memory, len(mine), means))
    return rows


def measure(suite: Suite, plan: Plan, crews: list[Crew]) -> Iterator[StepRecord]:
    """Yield a record for each case."""
    for case in plan.cases():
        if plan.deadline is not None and perf_counter() > plan.deadline:
            return
        yield _Measurement(suite, case).record(crews, plan.rounds)


class _Measurement:
    """A case under way: what the answers must be, who has a turn, what else was found."""

    def __init__(self, suite: Suite, case: Case) -> None:
        self._suite, self._case = suite, case
        self._truth = Truth(case, data_of(case)) if suite.oracle else Agreement(case)
        self._record = StepRecord(case.shape, case.layout, case.dtype)
        self._turns: dict[Key, Turn] = {}
        self._peaks: dict[Key, Array | None] = {}
        self._losses: dict[Key, Array | None] = {}

    def record(self, crews: list[Crew], rounds: int) -> StepRecord:
        """Return what was found."""
        try:
            for worker, steps in crews:
                self._load(worker, steps)
        except Wrong as reason:
            self._record.wrong = str(reason)
        else:
            self._race(rounds)
        return self._record

    def _load(self, worker: Worker, steps: tuple[Step, ...]) -> None:
        try:
            worker.load(self._case)
        except Unable as reason:
            for step in steps:
                self._refuse(step, worker, reason)
            return
        for step in steps:
            self._prepare(step, worker)

    def _prepare(self, step: Step, worker: Worker) -> None:
        """Give a turn to a step whose answer is right. Wrong is raised for ours alone."""
        try:
            answer = worker.prepare(step, keep=True) or {}
            peak = answer.pop("peak", None)
            self._check(step, answer)
        except (Wrong, Unable) as reason:
            if step.ours and isinstance(reason, Wrong):
                raise Wrong(f"{step.title}: {reason}") from None
            self._refuse(step, worker, reason)
            return
        key = step.name, worker.memory
        self._turns[key] = lambda count: worker.turn(step, count) / step.calls
        self._peaks[key], self._losses[key] = peak, answer.get("losses")

    def _check(self, step: Step, answer: Answer) -> None:
        if isinstance(self._truth, Agreement):
            return self._truth.check(answer)
        for verb in step.verbs:
            self._truth.check(VERBS[verb], answer, peer=not step.ours)

    def _refuse(self, step: Step, worker: Worker, reason: Exception) -> None:
        text = str(reason).partition("\n")[0][:200]
        self._record.refused[f"{step.name} {worker.memory}"] = text

    def _race(self, rounds: int) -> None:
        seconds = take_turns(self._turns, rounds)
        for (name, memory), values in seconds.items():
            ours = seconds.get((self._suite.steps[name].against, memory))
            over_ours = None if ours is None else ratio(values, ours)
            run = StepRun(name, memory, Spread.of(values), over_ours)
            if (peak := self._peaks[name, memory]) is not None:
                run.peak = float(peak[0])
            if (losses := self._losses[name, memory]) is not None:
                run.losses = losses.tolist()
            self._record.runs.append(run)
