"""The device, measured before anybody is: how fast its memory is, what a launch and a wait cost.

Speeds are those of large arrays, which no cache holds: a copy counts what it reads and what it
writes. The best of two ways to copy and to write is taken, PyTorch's own and a kernel in Triton
(`probes`): a floor must not be higher than what somebody reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from fusebn.cli.bench.device import probes
from fusebn.cli.bench.device.clock import Call, Clock
from fusebn.cli.bench.results import Spread

LARGE = 1 << 30  # bytes of an array: tens of times the cache
SHARE = 16  # of the free memory, one part of so many is large enough where there is little
LAUNCHES = 64  # in a graph
BARRIERS = 64  # in a launch
REREAD = tuple(megabytes << 20 for megabytes in (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128))
REREADS = 16  # of a buffer, in a launch
TURNS = 7


@dataclass
class Chip:
    """What a device is, as it says, and what it does, as measured: bytes a second, and seconds."""

    name: str
    processors: int
    l2: int
    memory: int
    capability: str
    versions: dict[str, str]
    copy: float = 0.0
    read: float = 0.0
    write: float = 0.0
    launches: dict[str, float] = field(default_factory=dict)
    barriers: dict[int, float] = field(default_factory=dict)  # programs -> seconds of a wait
    rereads: dict[int, float] = field(default_factory=dict)  # bytes -> bytes a second
    spreads: dict[str, Spread] = field(default_factory=dict)  # quartiles of the speeds
    unable: dict[str, str] = field(default_factory=dict)  # what could not be measured, and why


def chip_of(device: torch.device) -> Chip:
    """Return what the device says of itself."""
    about = torch.cuda.get_device_properties(device)
    return Chip(
        about.name,
        about.multi_processor_count,
        about.L2_cache_size,
        about.total_memory,
        f"{about.major}.{about.minor}",
        {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        },
    )


def large_on(device: torch.device) -> int:
    """Return the bytes of an array that no cache holds and the memory easily does."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(LARGE, free // SHARE // 4096 * 4096)


def measure(
    chip: Chip, clock: Clock, device: torch.device, size: int, rereads: Sequence[int] = REREAD
) -> None:
    """Fill in what is measured, with arrays of so many bytes."""
    with clock.on():
        _speeds(chip, clock, device, size)
        for what, probe in {
            "launches": _launches,
            "barriers": _barriers,
        }.items():
            try:
                probe(chip, clock, device)
            except Exception as reason:  # whatever a driver raises: it cannot
                chip.unable[what] = f"{type(reason).__name__}: {reason}".partition("\n")[0][:200]
        for bytes_ in rereads:
            chip.rereads[bytes_] = _reread(clock, device, bytes_)
    clock.clear()


def _speeds(chip: Chip, clock: Clock, device: torch.device, size: int) -> None:
    x = torch.ones(size // 4, dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    found = x.new_empty(_programs(x))
    copies: list[Call] = [lambda: y.copy_(x), lambda: _over(probes.copy_kernel, x, y, x.numel())]
    writes: list[Call] = [lambda: y.fill_(1), lambda: _over(probes.write_kernel, y, y.numel())]
    chip.copy = _speed(chip, "copy", clock, copies, 2 * size)
    chip.read = _speed(chip, "read", clock, [lambda: _read(x, found)], size)
    chip.write = _speed(chip, "write", clock, writes, size)


def _speed(chip: Chip, what: str, clock: Clock, ways: Sequence[Call], moved: int) -> float:
    """Return the bytes a second of the fastest way."""
    spreads = [_timed(clock, [way], moved) for way in ways]
    chip.spreads[what] = best = max(spreads, key=lambda spread: spread.median)
    return best.median


def _timed(clock: Clock, calls: Sequence[Call], moved: int) -> Spread:
    turn = clock.prepare(calls).turn
    return Spread.of([moved / turn() for _ in range(TURNS)])


def _launches(chip: Chip, clock: Clock, device: torch.device) -> None:
    """Time kernels that do nothing: behind each other in a graph, and called from Python."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    everywhere = (chip.processors,)

    def plain() -> None:
        probes.empty_kernel[(1,)](x, num_warps=probes.WARPS)

    def cooperative() -> None:
        probes.empty_kernel[everywhere](x, num_warps=probes.WARPS, launch_cooperative_grid=True)

    for name, call in {"empty": plain, "cooperative": cooperative}.items():
        for how, captured in {"in a graph": True, "from Python": False}.items():
            timed = clock.prepare([call] * LAUNCHES, capture=captured)
            if (timed.how == "graph") is captured:
                chip.launches[f"{name}, {how}"] = _median(timed.turn)
            else:
                chip.unable[f"{name}, {how}"] = timed.why or ""


def _barriers(chip: Chip, clock: Clock, device: torch.device) -> None:
    """Time waits: of two launches with so many more of them, the difference."""
    for programs in dict.fromkeys((16, 32, 64, chip.processors)):
        if programs > chip.processors:
            continue
        arrived = torch.zeros(1, dtype=torch.int32, device=device)
        few, many = (
            _median(clock.prepare([_waits(arrived, programs, rounds)]).turn)
            for rounds in (1, 1 + BARRIERS)
        )
        chip.barriers[programs] = (many - few) / BARRIERS


def _waits(arrived: Tensor, programs: int, rounds: int) -> Call:
    def call() -> None:
        probes.barrier_kernel[(programs,)](
            arrived, rounds, programs, num_warps=probes.WARPS, launch_cooperative_grid=True
        )

    return call


def _reread(clock: Clock, device: torch.device, size: int) -> float:
    """Return the bytes a second of reading a buffer again and again."""
    x = torch.ones(size // 4, dtype=torch.int32, device=device)
    found = x.new_empty(_programs(x))
    return _timed(clock, [lambda: _read(x, found, REREADS)], REREADS * size).median


def _read(x: Tensor, found: Tensor, times: int = 1) -> None:
    _over(probes.read_kernel, x, found, x.numel(), _programs(x), times)


def _over(kernel: Any, like: Tensor, *arguments: Any) -> None:
    """Run a kernel over an array of words and whatever else it is told of."""
    grid = (_programs(like),)
    kernel[grid](like, *arguments, WORDS=probes.WORDS, num_warps=probes.WARPS)


def _programs(like: Tensor) -> int:
    return -(-like.numel() // probes.WORDS)


def _median(turn: Callable[[], float]) -> float:
    return Spread.of([turn() for _ in range(TURNS)]).median
