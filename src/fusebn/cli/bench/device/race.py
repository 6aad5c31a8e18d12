"""The measuring on a device: check each answer, then let everybody take turns.

As on a CPU (`runner`): rounds in which all have a turn, in any order; a ratio is taken inside a
round, its median over the rounds is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch

from fusebn.cli.bench.answers import Truth, Wrong
from fusebn.cli.bench.cases import VERBS, Case, Verb, data_of
from fusebn.cli.bench.device.chip import Chip
from fusebn.cli.bench.device.clock import Clock, Timed, copies_for
from fusebn.cli.bench.device.contestants import OURS, Contestant, Entry, backend_of, road_of
from fusebn.cli.bench.device.findings import DeviceRecord, DeviceRun
from fusebn.cli.bench.device.tensors import Tensors
from fusebn.cli.bench.device.traffic import traffic
from fusebn.cli.bench.inside import is_held
from fusebn.cli.bench.results import Spread
from fusebn.cli.bench.runner import Key, Plan, Turn, ratio, take_turns

_LINE = 128  # bytes of every row that are held at a time


def measure(
    plan: Plan, contestants: Sequence[Contestant], chip: Chip, clock: Clock, device: torch.device
) -> Iterator[DeviceRecord | None]:
    """Yield a record for each case and verb, or None where the time is up."""
    for case in plan.cases():
        if plan.deadline is not None and perf_counter() > plan.deadline:
            yield from [None] * len(plan.verbs)
            continue
        yield from _Measurement(case, chip, clock).records(plan, contestants, device)
        clock.clear()


class _Measurement:
    """A case under way."""

    def __init__(self, case: Case, chip: Chip, clock: Clock) -> None:
        self._case, self._chip, self._clock = case, chip, clock

    def records(
        self, plan: Plan, contestants: Sequence[Contestant], device: torch.device
    ) -> Iterator[DeviceRecord | None]:
        """Yield what was found about each verb, or None where the time is up."""
        verbs = [VERBS[name] for name in plan.verbs]
        data = data_of(self._case)
        truth = Truth(self._case, data)
        least = min(traffic(self._case, verb).one_sweep for verb in verbs)
        with self._clock.on():
            try:
                copies = copies_for(least, self._chip.l2)
                tensors = Tensors(self._case, data, device, copies)
            except torch.OutOfMemoryError as reason:
                for verb in verbs:
                    record = self._empty(verb)
                    record.refused = {who.name: _short(reason) for who in contestants}
                    yield record
                return
            for verb in verbs:
                if plan.deadline is not None and perf_counter() > plan.deadline:
                    yield None
                    continue
                yield self._record(verb, contestants, truth, tensors, plan.rounds)
                self._clock.clear()

    def _record(
        self,
        verb: Verb,
        contestants: Sequence[Contestant],
        truth: Truth,
        tensors: Tensors,
        rounds: int,
    ) -> DeviceRecord:
        record = self._empty(verb)
        record.backend = backend_of(self._case, tensors)
        timed: dict[str, Timed] = {}
        turns: dict[Key, Turn] = {}
        for who in contestants:
            try:
                with road_of(who):
                    entry = Entry(who, verb, tensors)
                    truth.check(verb, tensors.answer(entry.answer()), peer=not who.ours)
                    timed[who.name] = self._clock.prepare(entry.calls)
            except Wrong as reason:
                if who.ours:
                    record.wrong = f"{who.title}: {reason}"
                    return record
                record.refused[who.name] = f"wrong answer: {reason}"
            except Exception as reason:  # whatever a framework raises is an answer: it cannot
                record.refused[who.name] = _short(reason)
            else:
                turns[who.name, "warm"] = _turn(who, timed[who.name].turn)
        self._race(record, timed, turns, rounds)
        return record

    def _race(
        self, record: DeviceRecord, timed: dict[str, Timed], turns: dict[Key, Turn], rounds: int
    ) -> None:
        seconds = take_turns(turns, rounds)
        ours = seconds.get((OURS.name, "warm"))
        for (who, memory), values in seconds.items():
            record.runs.append(
                DeviceRun(
                    who,
                    memory,
                    Spread.of(values),
                    Spread.of([value / record.one_sweep for value in values]),
                    ratio(values, ours) if ours else None,
                    timed[who].how,
                )
            )
            if why := timed[who].why:
                record.notes[who] = why

    def _empty(self, verb: Verb) -> DeviceRecord:
        case, chip = self._case, self._chip
        moved, arrays = traffic(case, verb), 1 + verb.backward
        held = verb.training and is_held(case.block, case.bytes, chip.processors, arrays)
        return DeviceRecord(
            case.shape,
            case.layout,
            case.dtype,
            verb.name,
            case.bytes,
            floor="copy",
            one_sweep=moved.one_sweep / chip.copy,
            two_sweeps=moved.two_sweeps / chip.copy,
            held=held,
            slab=case.block[0] * _LINE * arrays,
        )


def _turn(who: Contestant, turn: Callable[[], float]) -> Turn:
    def run(_count: int) -> float:
        with road_of(who):  # which matters to calls that were not captured
            return turn()

    return run


def _short(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}".partition("\n")[0][:200]
