"""How long a call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from time import perf_counter

# A turn ends when it has lasted this long, after one timed call at the least.
TURN_SECONDS = 0.1


def turn(call: Callable[[], object], count: int) -> float:
    """Return the median seconds of some calls, after one that warms the caches.

    What a call returns is let go within its time: a user pays for fresh memory when it is handed
    out and when it is given back.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = perf_counter()
        call()
        seconds: list[float] = []
        while not seconds or (len(seconds) < count and perf_counter() - start < TURN_SECONDS):
            before = perf_counter()
            call()
            seconds.append(perf_counter() - before)
        return median(seconds)
    finally:
        if enabled:
            gc.enable()
