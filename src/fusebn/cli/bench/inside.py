"""The only file of the command line that knows the private side of the library.

What a benchmark needs is no one else's business: the oracle, the memory floors, the gradient
written into arrays that the caller keeps; and on a GPU the barrier, and what is done in one launch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusebn import _core, _reference, _spec
from fusebn.cli.bench.cases import EPSILON, Array, Case, Data, Verb

FLOORS = ("read", "copy", "stream", "read2", "copy2", "stream2")

oracle = _reference


def floor(
    kind: str, a: Array, b: Array | None = None, out: Array | None = None, ahead: int = 0
) -> None:
    """Do to memory what one pass of a kernel does, with its threads and without its arithmetic.

    What is read is asked for that many floats early.
    """
    _core.floor(FLOORS.index(kind), a, b, out, a.nbytes // 64 * 16, ahead)


def gradient_into(
    dx: Array,
    dresidual: Array | None,
    case: Case,
    data: Data,
    verb: Verb,
    mean: Array,
    variance: Array,
) -> tuple[Array, Array]:
    """Return dscale and doffset, and write the rest where the caller says: an `out=`."""
    dscale, doffset = np.empty_like(data.scale), np.empty_like(data.offset)
    _core.gradient(
        _spec.ELEMENT_TYPES[case.dtype],
        *case.block,
        data.dy,
        data.x,
        verb.training,
        mean,
        variance,
        None,
        data.scale,
        data.offset,
        data.residual if verb.residual else None,
        _spec.ACTIVATIONS[verb.activation],
        EPSILON,
        None,
        None,
        0.0,
        1.0,
        dx,
        dresidual,
        dscale,
        doffset,
        None,
        None,
    )
    return dscale, doffset


def serves_gpus() -> bool:
    """Say whether the kernels for GPUs take PyTorch's tensors in this process."""
    from fusebn.torch import _gpu

    return _gpu.WANTED


def grid_barrier() -> Any:
    """Return the Triton function by which the programs of a launch wait for each other."""
    from fusebn.triton._held import wait_for_all

    return wait_for_all


def is_held(block: tuple[int, int, int], bytes_: int, processors: int, arrays: int) -> bool:
    """Say whether a device with so many multiprocessors holds so many arrays of some bytes."""
    from fusebn.triton._plan import residency

    itemsize = bytes_ // max(math.prod(block), 1)
    return residency(*block, itemsize, processors, arrays) is not None
