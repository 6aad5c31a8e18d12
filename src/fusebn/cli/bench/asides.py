"""What no table of tensors shows: the cost of a call, and of a neighbour who holds a core."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fusebn
from fusebn.cli.bench.cases import VERBS, Case, data_of
from fusebn.cli.bench.ours import Call, Ours

TINY = (8, 4)


def overhead(calls: int = 2000) -> dict[str, float]:
    """Return the seconds of calls on an array so small that only the call is left."""
    x = np.ones(TINY, np.float32)
    scale, offset = np.ones(TINY[1], np.float32), np.zeros(TINY[1], np.float32)
    mean, variance, y = offset.copy(), scale.copy(), np.empty_like(x)
    layer = fusebn.BatchNorm(TINY[1])
    timed: dict[str, Call] = {
        "fused_batch_norm, training": lambda: fusebn.fused_batch_norm(
            x, scale, offset, data_format="NC"
        ),
        "fused_batch_norm, training, out=": lambda: fusebn.fused_batch_norm(
            x, scale, offset, data_format="NC", out=y
        ),
        "fused_batch_norm, inference": lambda: fusebn.fused_batch_norm(
            x, scale, offset, mean, variance, data_format="NC", is_training=False
        ),
        "fused_batch_norm_grad": lambda: fusebn.fused_batch_norm_grad(
            x, x, scale, offset, mean, variance, data_format="NC"
        ),
        "BatchNorm, training": lambda: layer(x, training=True),
        "BatchNorm, inference": lambda: layer(x, training=False),
    }
    return {name: _each(call, calls) for name, call in timed.items()}


def _each(call: Call, calls: int) -> float:
    """Return the median over batches of calls: the clock itself costs a part of a microsecond."""
    seconds = []
    for _ in range(20):
        start = perf_counter()
        for _ in range(calls // 20):
            call()
        seconds.append((perf_counter() - start) / (calls // 20))
    return median(seconds)


def busy(shape: str = "32x56x56x256", steps: int = 60, turns: int = 4) -> dict[str, Any]:
    """Return how training-forward fares beside an endless loop that is pinned to one core.

    With two cores and two threads a half share of one of them is lost, so 1.33 is what a perfect
    split would give and 2 what one thread alone would. A library that waits at a barrier for a
    thread that has no core shows steps of whole scheduling slices: 8 ms and more.
    """
    case = Case(shape, "channels-last", "float32")
    call = Ours(case, data_of(case)).warm(VERBS["forward"])
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(turns):
        alone += _steps(call, steps // turns)
        loop = _busy_loop()
        try:
            beside += _steps(call, steps // turns)
        finally:
            loop.kill()
            loop.wait()
    return {
        "shape": shape,
        "alone": median(alone),
        "beside": median(beside),
        "worst_alone": max(alone),
        "worst_beside": max(beside),
    }


def _steps(call: Call, count: int) -> list[float]:
    call()
    seconds = []
    for _ in range(count):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return seconds


def _busy_loop() -> subprocess.Popen[bytes]:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    pin = f"os.sched_setaffinity(0, [{core}])" if hasattr(os, "sched_setaffinity") else "pass"
    program = f"import os\n{pin}\nprint(flush=True)\nwhile True: pass"
    loop = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert loop.stdout is not None
    with loop.stdout:
        loop.stdout.readline()  # it runs
    return loop
