"""What was to be reached on an H200, set before any kernel had run; and whether it was.

Regimes are those of the bytes: whether a tensor's slab, 128 bytes of each of its rows, is held on
the chip, fits the L2 cache, or neither. Each goal is judged by the worst shape that it speaks of,
in bfloat16, channels last, unless it says otherwise. docs/gpu.md has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fusebn.cli.bench.cases import RESNET50
from fusebn.cli.bench.device.findings import DeviceRecord, DeviceResults, Goal, sums
from fusebn.cli.bench.results import mean

MB = 10**6
SMALL, LARGE = 6.5 * MB, 50 * MB  # tensors: of latency; of bandwidth
IN_CACHE = 60 * MB  # slabs: beyond the chip, within the L2 cache
BATCH = 256  # of the sum over ResNet-50
SHAPES = frozenset(shape.partition("x")[2] for shape in RESNET50)

# Times are over floors and over peers: a share of the speed of one sweep, or of two.
_FORMATS = {
    "µs": "{:.1f} µs",
    "x": "{:.2f} x",
    "one": "{:.0f} % of one sweep",
    "two": "{:.0f} % of two sweeps",
}

Select = Callable[[DeviceRecord], bool]
Judge = Callable[[DeviceRecord, DeviceResults], float | None]


class _Wish(NamedTuple):
    """A goal: of the records that it speaks of, the worst must be at least so good."""

    name: str
    verb: str
    select: Select
    judge: Judge
    bound: float
    at_least: bool
    unit: str  # of _FORMATS


def goals(results: DeviceResults) -> list[Goal]:
    """Return every goal with what was measured, in the order of docs/gpu.md."""
    found = [_judged(wish, results) for wish in WISHES]
    return [*found, *_totals(results), *_first_over_last(results), _training(results)]


# ---- what is judged ----


def _microseconds(record: DeviceRecord, _: DeviceResults) -> float | None:
    ours = record.run("fusebn")
    return 1e6 * ours.seconds.median if ours else None


def _share_of_one_sweep(record: DeviceRecord, _: DeviceResults) -> float | None:
    ours = record.run("fusebn")
    return 100 * record.one_sweep / ours.seconds.median if ours else None


def _share_of_two_sweeps(record: DeviceRecord, _: DeviceResults) -> float | None:
    ours = record.run("fusebn")
    return 100 * record.two_sweeps / ours.seconds.median if ours else None


def _over(peer: str) -> Judge:
    """Return how many times as fast as a peer ours is, in the same case."""

    def judge(record: DeviceRecord, _: DeviceResults) -> float | None:
        run = record.run(peer)
        return run.over_ours.median if run and run.over_ours else None

    return judge


def _over_cudnn(dtype: str, layout: str) -> Judge:
    """Return how many times as fast ours is as PyTorch's in another case, if cuDNN serves that."""

    def judge(record: DeviceRecord, results: DeviceResults) -> float | None:
        ours, other = record.run("fusebn"), _twin(record, results, dtype, layout)
        theirs = other.run("eager") if other and other.backend == "cudnn" else None
        return theirs.seconds.median / ours.seconds.median if ours and theirs else None

    return judge


def _twin(
    record: DeviceRecord, results: DeviceResults, dtype: str, layout: str
) -> DeviceRecord | None:
    key = (record.shape, record.verb, dtype, layout)
    return next((r for r in results.cases() if (r.shape, r.verb, r.dtype, r.layout) == key), None)


# ---- what of ----


def _all(_: DeviceRecord) -> bool:
    return True


def _latency(record: DeviceRecord) -> bool:
    return record.bytes <= SMALL


def _of_size(megabytes: float) -> Select:
    """Choose tensors of a size whose slab is held."""
    return lambda record: record.held and abs(record.bytes / MB - megabytes) < 0.2


def _held(record: DeviceRecord) -> bool:
    return record.held and record.bytes >= LARGE


def _in_cache(record: DeviceRecord) -> bool:
    return not record.held and record.bytes >= LARGE and record.slab <= IN_CACHE


def _larger(record: DeviceRecord) -> bool:
    return not record.held and record.bytes >= LARGE and record.slab > IN_CACHE


def _on_chip(record: DeviceRecord) -> bool:
    return record.held and record.bytes > SMALL


def _large(record: DeviceRecord) -> bool:
    return record.bytes >= LARGE


_CHAIN = "residual+relu"


def _both(
    name: str, select: Select, judge: Judge, forward: float, backward: float, unit: str
) -> tuple[_Wish, _Wish]:
    at_least = unit != "µs"
    return (
        _Wish(f"{name}, forward", "forward", select, judge, forward, at_least, unit),
        _Wish(f"{name}, backward", "backward", select, judge, backward, at_least, unit),
    )


WISHES = (
    *_both("up to 6.4 MB", _latency, _microseconds, 7, 9, "µs"),
    *_both("up to 6.4 MB, against PyTorch", _latency, _over("eager"), 2, 2, "x"),
    *_both("12.8 MB on the chip", _of_size(12.8), _microseconds, 10, 14, "µs"),
    *_both("25.7 MB on the chip", _of_size(25.7), _microseconds, 16, 25, "µs"),
    *_both("on the chip, against PyTorch", _on_chip, _over("eager"), 2, 2, "x"),
    *_both("on the chip, against torch.compile", _on_chip, _over("compile"), 1.3, 1.3, "x"),
    *_both(
        "on the chip, against cuDNN in float16",
        _on_chip,
        _over_cudnn("float16", "channels-last"),
        1.3,
        1.3,
        "x",
    ),
    *_both("50 MB and more, slabs on the chip", _held, _share_of_one_sweep, 82, 78, "one"),
    *_both("slabs in the L2 cache", _in_cache, _share_of_one_sweep, 68, 62, "one"),
    *_both("larger", _larger, _share_of_two_sweeps, 92, 90, "two"),
    _Wish("inference", "inference", _large, _share_of_one_sweep, 95, True, "one"),
    _Wish(
        "batch norm, add, ReLU, forward",
        f"forward+{_CHAIN}",
        _held,
        _share_of_one_sweep,
        80,
        True,
        "one",
    ),
    _Wish(
        "batch norm, add, ReLU, backward",
        f"backward+{_CHAIN}",
        _held,
        _share_of_one_sweep,
        75,
        True,
        "one",
    ),
    _Wish(
        "the same against PyTorch, forward",
        f"forward+{_CHAIN}",
        _held,
        _over("eager"),
        2.5,
        True,
        "x",
    ),
    *_both(
        "against cuDNN channels first, float16",
        _all,
        _over_cudnn("float16", "channels-first"),
        2,
        2,
        "x",
    ),
)


def _judged(wish: _Wish, results: DeviceResults) -> Goal:
    values = [
        (value, record.shape)
        for record in results.cases()
        if (record.dtype, record.layout, record.verb) == ("bfloat16", "channels-last", wish.verb)
        and record.shape.partition("x")[2] in SHAPES
        and wish.select(record)
        and (value := wish.judge(record, results)) is not None
    ]
    goal = Goal(wish.name, _target(wish.bound, wish.at_least, wish.unit))
    if values:
        worst, shape = (min if wish.at_least else max)(values)
        goal.measured = f"{_number(worst, wish.unit)}, {shape}"
        goal.met = worst >= wish.bound if wish.at_least else worst <= wish.bound
    return goal


# ---- those that are of several records ----


def _totals(results: DeviceResults) -> Iterator[Goal]:
    for verb, bound in (("forward", 3.3), ("backward", 5.6)):
        goal = Goal(f"all 53 of ResNet-50 at batch {BATCH}, {verb}", f"at most {bound} ms")
        for row in sums(results):
            kind = (row.dtype, row.layout, row.batch, row.verb)
            if kind == ("bfloat16", "channels-last", BATCH, verb) and "fusebn" in row.seconds:
                milliseconds = 1e3 * row.seconds["fusebn"]
                goal.measured, goal.met = f"{milliseconds:.2f} ms", milliseconds <= bound
        yield goal


def _first_over_last(results: DeviceResults) -> Iterator[Goal]:
    for verb in ("forward", "backward"):
        ratios = [
            first.seconds.median / last.seconds.median
            for record in results.cases()
            if (record.dtype, record.layout, record.verb) == ("bfloat16", "channels-last", verb)
            and (twin := _twin(record, results, "bfloat16", "channels-first"))
            and (first := twin.run("fusebn"))
            and (last := record.run("fusebn"))
        ]
        goal = Goal(f"channels first over channels last, {verb}", "at most 1.10 x")
        if ratios:
            ratio = mean(ratios)
            goal.measured, goal.met = f"{ratio:.2f} x, mean of {len(ratios)}", ratio <= 1.1
        yield goal


def _training(results: DeviceResults) -> Goal:
    goal = Goal("a training step of ResNet-50, against PyTorch", "at least 1.20 x")
    for record in results.training.records if results.training else []:
        run = record.run("eager", "fresh")
        if run and run.over_ours:
            ratio = run.over_ours.median
            goal.measured, goal.met = f"{ratio:.2f} x, {record.shape}", ratio >= 1.2
    return goal


def _target(bound: float, at_least: bool, unit: str) -> str:
    return f"{'at least' if at_least else 'at most'} {_number(bound, unit)}"


def _number(value: float, unit: str) -> str:
    return _FORMATS[unit].format(value)
