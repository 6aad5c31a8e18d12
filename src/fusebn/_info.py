"""`info`: what runs here, and why."""

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fusebn import _core

# Framework -> what this version of fusebn does for it.
_SUPPORT = {
    "numpy": "native kernels",
    "torch": "native kernels on the CPU; PyTorch's own on other devices (untested), but Triton's "
    "on CUDA devices where FUSEBN_TRITON=1 asks for them (no GPU has run them yet)",
    "jax": "native calls and composite; info() after `import fusebn.jax` tells which",
    "keras": "a layer that runs as its backend's tensors do: TensorFlow's, JAX's or PyTorch's",
    "tensorflow": "native op and composite; info() after `import fusebn.tensorflow` tells which",
}

# tensorflow-cpu and its like install the same package.
_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-intel")}


def _version_of(framework: str) -> str | None:
    for name in _DISTRIBUTIONS.get(framework, (framework,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _support_of(framework: str) -> str:
    """Return what an adapter says of itself, once it is in use, or else what to expect of it."""
    support = getattr(sys.modules.get(f"fusebn.{framework}._ops"), "support", None)
    return _SUPPORT[framework] if support is None else str(support())


def cache_sizes() -> dict[str, int]:
    """Return the bytes of the data caches that core 0 sees, where the system tells."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
                sizes[f"L{level}"] = int(size[:-1]) * unit
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sizes


def cache_share() -> int | None:
    """Return the bytes from which on an output is stored past the cache.

    A third of the last cache holds an output and what it was made from. But a server's cache grows
    with its cores, about 4 MiB for each, and who runs on two of them has no claim to the rest. On
    an Intel Xeon with 480 MiB, storing past the cache wins from 4 MiB on; whoever reads the output
    at once pays that back up to some 24 MiB, a convolution, which waits for no memory, does not.
    """
    caches = cache_sizes()
    return min(max(caches.values()) // 3, _core.get_num_threads() * (4 << 20)) if caches else None


def physical_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def info() -> dict[str, Any]:
    """See :func:`fusebn.info`."""
    return {
        "version": metadata.version("fusebn"),
        "instruction_set": _core.instruction_set(),
        "instruction_sets": _core.instruction_sets(),
        "threads": _core.get_num_threads(),
        "caches": cache_sizes(),
        "frameworks": {
            name: {"version": _version_of(name), "support": _support_of(name)} for name in _SUPPORT
        },
    }
