"""The bytes that a verb must move between memory and chip: what a floor is made of.

E is the size of a tensor. What is read once and held on the chip until the statistics are known
costs one sweep; what is read again, because it does not fit, two. A kernel cannot beat the one, nor
a kernel of two sweeps the other. (Vectors of one value a channel are not counted.)

| verb | one sweep | two sweeps |
| --- | --- | --- |
| forward | read x, write y: 2 E | read x twice: 3 E |
| inference | read x, write y: 2 E | the same |
| backward | read dy and x, write dx: 3 E | read both twice: 5 E |
| forward+residual+relu | read x and residual, write y: 3 E | read x twice: 4 E |
| backward+residual+relu | read dy, x, a bit of each element, write dx and dresidual: 4 E | 6 E |

The last row with the mask of ReLU at a bit an element, which is the least it can be had for. In two
sweeps the first writes dresidual, and the second reads it instead of dy and the mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fusebn.cli.bench.cases import RESNET50, Case, Verb

# Of each batch norm of ResNet-50, in the order of RESNET50: how many layers have its shape.
COUNTS = dict(zip(RESNET50, (1, 6, 1, 4, 7, 1, 5, 11, 1, 7, 5, 4), strict=True))


class Traffic(NamedTuple):
    """Bytes."""

    one_sweep: int
    two_sweeps: int


def traffic(case: Case, verb: Verb) -> Traffic:
    """Return what a verb moves."""
    tensor = case.bytes
    beside = tensor if verb.residual else 0  # read forward, written backward
    if not verb.backward:
        again = tensor if verb.training else 0
        return Traffic(2 * tensor + beside, 2 * tensor + beside + again)
    mask = -(-math.prod(case.dims) // 8) if verb.residual and verb.activation else 0
    return Traffic(3 * tensor + beside + mask, 5 * tensor + beside + mask)


def at_batch(shape: str, batch: int) -> str:
    """Return a shape of RESNET50 at another batch."""
    return f"{batch}x{shape.partition('x')[2]}"
