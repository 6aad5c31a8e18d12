"""What the fused functions return, on any framework."""

from typing import Any, NamedTuple


class FusedBatchNorm(NamedTuple):
    """What :func:`fusebn.fused_batch_norm` returns."""

    y: Any
    mean: Any
    variance: Any


class FusedBatchNormGrad(NamedTuple):
    """What :func:`fusebn.fused_batch_norm_grad` returns."""

    dx: Any
    dscale: Any
    doffset: Any
    dresidual: Any
