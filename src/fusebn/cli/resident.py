"""How much memory a process holds while something runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fusebn

# What Linux tells of a process: https://docs.kernel.org/filesystems/proc.html
_PROCESS = Path("/proc/self")


class Resident(NamedTuple):
    """Bytes of the process in memory: before, and the most there were."""

    before: int
    peak: int


def resident(call: Callable[[], object]) -> Resident | None:
    """Return what was resident while a call ran; None where the system does not tell.

    What waits to be used again goes back to the system first.
    """
    fusebn.memory.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the high-water mark falls to what is there now
        before = _kilobytes("VmRSS")
        call()
        return Resident(before << 10, _kilobytes("VmHWM") << 10)
    except OSError:
        return None


def _kilobytes(name: str) -> int:
    status = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))
