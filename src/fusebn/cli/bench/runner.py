"""The measuring: check, then let everybody take turns.

Ours, the floors and the peers alternate, round after round, so that whatever else the machine does
falls on all of them. A ratio is taken inside a round, and the median of the rounds is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from time import perf_counter
from typing import NamedTuple

from fusebn.cli.bench.answers import Truth, Wrong, sampled
from fusebn.cli.bench.cases import VERBS, Case, Verb, data_of, layouts_of
from fusebn.cli.bench.ours import Ours
from fusebn.cli.bench.results import Record, Run, Spread
from fusebn.cli.bench.timing import turn
from fusebn.cli.bench.worker import Unable, Worker

# Calls in a turn; the median of them is the turn's time.
CALLS = 3

Turn = Callable[[int], float]
Key = tuple[str, str]  # who, and with which memory


class Plan(NamedTuple):
    """What to measure."""

    shapes: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    verbs: tuple[str, ...]
    rounds: int
    deadline: float | None = None  # of perf_counter: no case begins after it

    def cases(self) -> list[Case]:
        """Return the cases, those with the same data together."""
        return [
            Case(shape, layout, dtype)
            for dtype in self.dtypes
            for shape in self.shapes
            for layout in layouts_of(shape)
            if layout in self.layouts or len(layouts_of(shape)) == 1
        ]


def measure(plan: Plan, workers: list[Worker]) -> Iterator[Record | None]:
    """Yield a record for each case and verb, or None where the time is up."""
    for case in plan.cases():
        if plan.deadline is not None and perf_counter() > plan.deadline:
            yield from [None] * len(plan.verbs)
            continue
        data = data_of(case)
        ours, truth = Ours(case, data), Truth(case, data)
        unable: dict[Key, str] = {}
        for worker in workers:
            try:
                worker.load(case)
            except Unable as reason:
                unable[worker.peer, worker.memory] = str(reason)
        for name in plan.verbs:
            if plan.deadline is not None and perf_counter() > plan.deadline:
                yield None
                continue
            verb = VERBS[name]
            record = Record(case.shape, case.layout, case.dtype, name, case.bytes)
            try:
                for answer in ours.answers(verb):
                    truth.check(verb, sampled(answer, case))
            except Wrong as reason:
                record.wrong = str(reason)
            else:
                able = [w for w in workers if (w.peer, w.memory) not in unable]
                _refuse(record, unable)
                peers = _prepared(record, verb, truth, able)
                _race(record, ours, verb, peers, plan.rounds)
            yield record


def _prepared(record: Record, verb: Verb, truth: Truth, workers: list[Worker]) -> dict[Key, Turn]:
    """Return the turns of the peers that can do the verb, and do it right."""
    turns: dict[Key, Turn] = {}
    for worker in workers:
        try:
            if answer := worker.prepare(verb):
                truth.check(verb, answer, peer=True)
                turns[worker.peer, worker.memory] = partial(worker.turn, verb)
        except Wrong as reason:
            _refuse(record, {(worker.peer, worker.memory): f"wrong answer: {reason}"})
        except Unable as reason:
            _refuse(record, {(worker.peer, worker.memory): str(reason)})
    return turns


def _refuse(record: Record, reasons: dict[Key, str]) -> None:
    for (peer, memory), reason in reasons.items():
        record.refused[f"{peer} {memory}"] = reason.partition("\n")[0][:200]


def _race(record: Record, ours: Ours, verb: Verb, peers: dict[Key, Turn], rounds: int) -> None:
    floors = ours.floors(verb)
    calls = {("floor", store): call for store, call in floors.items()}
    calls |= {("fusebn", "warm"): ours.warm(verb), ("fusebn", "fresh"): ours.fresh(verb)}

    def of(call: Callable[[], object]) -> Turn:
        return lambda count: turn(call, count)

    turns = {key: of(call) for key, call in calls.items()} | peers
    seconds = take_turns(turns, rounds)
    spreads = {key: Spread.of(values) for key, values in seconds.items()}
    best = min(floors, key=lambda store: spreads["floor", store].median)
    record.floor = best
    floor = seconds["floor", best]
    for (who, memory), values in seconds.items():
        if who == "floor" and memory != best:
            continue
        mine = seconds["fusebn", "fresh" if memory == "fresh" else "warm"]
        record.runs.append(
            Run(
                who,
                "warm" if who == "floor" else memory,
                spreads[who, memory],
                ratio(values, floor),
                ratio(values, mine),
            )
        )


def take_turns(turns: dict[Key, Turn], rounds: int) -> dict[Key, list[float]]:
    """Return the seconds of everybody's turn in each round."""
    seconds: dict[Key, list[float]] = {key: [] for key in turns}
    order, chance = list(turns), Random(0)
    for _ in range(rounds):
        chance.shuffle(order)  # nobody always finds the caches as the same neighbour left them
        for key in order:
            seconds[key].append(turns[key](CALLS))
    return seconds


def ratio(above: list[float], below: list[float]) -> Spread:
    """Return the ratio inside the rounds."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
