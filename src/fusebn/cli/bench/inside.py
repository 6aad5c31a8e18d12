"""The only file of the command line that knows the private side of the library.

Three things a benchmark needs are no one else's business: the oracle, the memory floors, and the
gradient written into arrays that the caller keeps.
"""

from __future__ import annotations

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
