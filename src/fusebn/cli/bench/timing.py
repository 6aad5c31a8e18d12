"""How long a call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from time import perf_counter

# A turn is over when it has lasted this long, after one timed call at the least,
TURN_SECONDS = 0.1
# and never before this: the first calls of a turn find cores that sleep and caches that others
# have filled, and take up to twice as long as those that follow.
LEAST_SECONDS = 0.02


def turn(call: Callable[[], object], count: int) -> float:
    """Return the median seconds of so many calls or more, after one that warms the caches.

    What a call returns is let go within its time: a user pays for fresh memory when it is handed
    out and when it is given back.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = perf_counter()
        call()
        seconds: list[float] = []
        lasted = 0.0
        while not seconds or (
            lasted < TURN_SECONDS and (len(seconds) < count or lasted < LEAST_SECONDS)
        ):
            before = perf_counter()
            call()
            after = perf_counter()
            seconds.append(after - before)
            lasted = after - start
        return median(seconds)
    finally:
        if enabled:
            gc.enable()
