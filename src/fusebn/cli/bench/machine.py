"""Where it was measured: what a number means nothing without."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import fusebn


def machine() -> dict[str, Any]:
    """Return the machine, the date and the versions."""
    info = fusebn.info()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": info["threads"],
        "instruction_set": info["instruction_set"],
        "caches": info["caches"],
        "memory": _memory(),
        # Runnable processes before the first measurement: others' work, which makes numbers worse.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "fusebn": info["version"],
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def file_stem(machine: dict[str, Any]) -> str:
    """Return a name for files about this machine, or the device it measured, and day."""
    if device := machine.get("device"):
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        return f"{machine['date'][:10]}-{name}"
    cpu = re.sub(r"[^a-z0-9]+", "-", str(machine["cpu"]).lower()).strip("-")
    return f"{machine['date'][:10]}-{cpu}-{machine['threads']}-threads"


def described(machine: dict[str, Any]) -> str:
    """Return the machine, or the device it measured, in a line."""
    if device := machine.get("device"):
        return f"{device}, beside {machine['cpu']}, {machine['date'][:10]}"
    last = max(machine["caches"].values(), default=0) >> 20
    return (
        f"{machine['cpu']}, {last} MiB of cache, {machine['threads']} threads, "
        f"{machine['instruction_set']}, {machine['date'][:10]}"
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        name.strip(): value.strip()
        for name, _, value in (
            line.partition(":") for line in text.partition("\n\n")[0].split("\n")
        )
    }
    name = fields.get("model name") or platform.machine()
    # A virtual machine may keep the name back; family and model tell the generation.
    if not re.search(r"\d", name) and "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields['model']}"
    return name


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
