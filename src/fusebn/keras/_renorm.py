"""Batch renormalization: a batch normalized as the moving averages would, gradients left alone.

::

    y = ((x - mean) / stddev * r + d) * scale + offset       stddev = sqrt(variance + epsilon)
    r = stddev / renorm_stddev,    clipped to [rmin, rmax]
    d = (mean - renorm_mean) / renorm_stddev,    clipped to [-dmax, dmax]

r and d are constants to the gradient, and use the averages as they were before this batch. So they
are a change of scale and offset, vectors of one value a channel.
Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from keras import ops

Tensor = Any


class Renorm(NamedTuple):
    """What a layer that renormalizes knows besides its averages."""

    decay: float  # of renorm_mean and renorm_stddev
    clipping: Mapping[str, Any]

    def correction(
        self,
        mean: Tensor,
        stddev: Tensor,
        renorm_mean: Tensor,
        renorm_stddev: Tensor,
        *,
        least: float,
    ) -> tuple[Tensor, Tensor]:
        """Return r and d; `least` bounds an average that may not have seen a batch yet."""
        average = ops.maximum(renorm_stddev, least)
        r, d = stddev / average, (mean - renorm_mean) / average
        rmin, rmax, dmax = map(self.clipping.get, ("rmin", "rmax", "dmax"))
        if rmin is not None:
            r = ops.maximum(r, rmin)
        if rmax is not None:
            r = ops.minimum(r, rmax)
        if dmax is not None:
            d = ops.clip(d, -dmax, dmax)
        return r, d


def transform(
    r: Tensor, d: Tensor, scale: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset that do ``(z * r + d) * scale + offset``."""
    if scale is not None:
        r, d = r * scale, d * scale
    return r, d if offset is None else d + offset
