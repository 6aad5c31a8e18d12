"""What the quantised blocks of every framework share: the convolution before the batch norm, the
transforms, and what is compared of an answer.

A block is a 3x3 convolution, batch norm and ReLU in training: forward, the update of the moving
statistics, backward. The transforms are fake quantizers of 16 bits, so fine that all ways must
agree; what they cost is the same for 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import Array, Case

BITS = 16
VARIABLES = ("scale", "offset", "moving_mean", "moving_variance")


def options(step: str, quantize: Any, active: Any) -> dict[str, Any]:
    """Return the keywords of a layer, for a step by its name."""
    if step == "fusebn":
        return {}
    return {
        "transforms": {name: quantize() for name in VARIABLES},
        "transforms_active": active,
        "transform_batch_statistics": step != "transforms",
    }


def kernel(case: Case) -> Array:
    """Return the convolution's weights, [3, 3, channels in, channels out]."""
    channels = case.block[1]
    rng = np.random.default_rng(channels)
    weights = rng.standard_normal((3, 3, channels, channels)) / np.sqrt(9 * channels)
    kernel: Array = weights.astype("float32")
    return kernel


def answer(y: Any, dx: Any, axis: int) -> Answer:
    """Return y, and the root mean square of dx in each channel.

    Not dx itself: where y is 0 but for a rounding, ReLU may let a gradient pass or not.
    """
    y, dx = np.asarray(y), np.asarray(dx, np.float64)
    others = tuple(i for i in range(dx.ndim) if i != axis)
    return {"y": y, "dx": np.sqrt((dx**2).mean(others))}
