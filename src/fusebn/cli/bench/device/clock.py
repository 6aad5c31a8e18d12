"""How long a call takes on a GPU: events of the device, around the replay of a captured graph.

A call of some microseconds is launched by Python in some tens of them. A CUDA graph leaves out
Python, the dispatcher and the driver: what is left is the work of the device, one call after the
other, as in a network whose host runs ahead. Who cannot be captured is timed by the same events
around plain calls, and is said to be.

Calls go through several copies of their tensors in turn (`copies_for`), for a tensor that the last
call left in the L2 cache would be read faster than memory can deliver it, and it is memory that a
network's tensors come from: by the time a batch norm runs backward, the whole network has been
through the cache.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], Any]

# What the copies of all tensors of a call come to, in sizes of the L2 cache. Once might do for a
# cache that forgets what is oldest; caches of GPUs do not promise that, and keep two partitions.
ROTATION = 3
MOST_COPIES = 256  # so small a call is all latency, wherever its tensors are
CALLS = 8  # at least, in a graph: between two graphs the device pauses for some microseconds
WARM = 3  # calls before anything is timed: they compile, choose algorithms and find memory
TURN_SECONDS = 0.01  # of a turn, in which the pause before its first kernel is lost
MOST_REPLAYS = 1000


class Timed(NamedTuple):
    """A contestant that is ready for its turns."""

    how: str  # "graph", or "calls": not captured
    turn: Callable[[], float]  # seconds of a call, the mean of a turn
    why: str | None = None  # it was not captured


class Clock(Protocol):
    """What the measuring asks of a clock."""

    def on(self) -> AbstractContextManager[Any]:
        """Return what all calls, and whatever prepares them, run in."""

    def prepare(self, calls: Sequence[Call], *, capture: bool = True) -> Timed:
        """Make turns of calls possible, which do the same to different copies."""

    def clear(self) -> None:
        """Give back memory of contestants that are gone."""


class CudaClock:
    """The clock of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Not the default stream, which cannot be captured. Backward runs on the stream of its
        # forward, so one stream has it all.
        self._stream = torch.cuda.Stream(device)

    def on(self) -> AbstractContextManager[Any]:
        """See Clock."""
        return torch.cuda.stream(self._stream)

    def prepare(self, calls: Sequence[Call], *, capture: bool = True) -> Timed:
        """See Clock."""
        for call in calls[:WARM]:
            call()
        self._stream.synchronize()
        order = [calls[i % len(calls)] for i in range(max(len(calls), CALLS if capture else 1))]
        # What a call returns is kept as long as there are copies: so its memory rotates, too.
        kept: deque[Any] = deque(maxlen=len(calls))
        why = None
        if capture:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    _run(order, kept)
                return Timed("graph", self._turns(graph.replay, len(order), calls))
            except Exception as reason:  # whatever a framework raises: it cannot be captured
                kept.clear()
                why = str(reason).partition("\n")[0][:200]
                torch.cuda.synchronize(self._device)
        return Timed("calls", self._turns(partial(_run, order, kept), len(order), calls), why)

    def clear(self) -> None:
        """See Clock."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def _turns(self, once: Call, count: int, alive: object) -> Callable[[], float]:
        """Return a turn, so many replays that it lasts; what a graph reads stays alive with it."""
        once()
        seconds = self._elapsed(once, 1)
        replays = min(MOST_REPLAYS, max(1, round(TURN_SECONDS / max(seconds, 1e-9))))

        def turn(_alive: object = alive) -> float:
            return self._elapsed(once, replays) / (replays * count)

        return turn

    def _elapsed(self, once: Call, replays: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        for _ in range(replays):
            once()
        end.record(self._stream)
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def _run(order: Sequence[Call], kept: deque[Any]) -> None:
    for call in order:
        kept.append(call())


def copies_for(bytes_of_a_call: int, l2: int) -> int:
    """Return how many copies of its tensors a call goes through."""
    return max(1, min(MOST_COPIES, -(-ROTATION * l2 // max(bytes_of_a_call, 1))))
