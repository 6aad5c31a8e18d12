"""What is asked: shapes, element types, layouts and verbs, and the data of a case."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EPSILON = 1e-3
LAYOUTS = ("channels-last", "channels-first")
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
USUAL_DTYPES = ("float32", "bfloat16", "float16")

# Batch, extents, channels, whatever the layout: every batch norm of ResNet-50 at batch 32.
RESNET50 = (
    "32x112x112x64",
    "32x56x56x64",
    "32x56x56x128",
    "32x56x56x256",
    "32x28x28x128",
    "32x28x28x256",
    "32x28x28x512",
    "32x14x14x256",
    "32x14x14x512",
    "32x14x14x1024",
    "32x7x7x512",
    "32x7x7x2048",
)
SHAPES = (
    *RESNET50,
    # dense layers and a volume
    "65536x256",
    "4096x1024",
    "2x64x64x64x32",
    # channels that fill no vector
    "32x224x224x3",
    "32x56x56x17",
    "32x28x28x100",
)
QUICK_SHAPES = ("32x56x56x64", "32x14x14x1024", "65536x256")


class Verb(NamedTuple):
    """What is computed: one of the library's two fused functions, and what is fused into it."""

    name: str
    backward: bool = False
    training: bool = True
    activation: str | None = None
    residual: bool = False


VERBS = {
    verb.name: verb
    for verb in (
        Verb("forward"),
        Verb("inference", training=False),
        Verb("backward", backward=True),
        Verb("forward+relu", activation="relu"),
        Verb("forward+residual+relu", activation="relu", residual=True),
        Verb("backward+relu", backward=True, activation="relu"),
        Verb("backward+residual+relu", backward=True, activation="relu", residual=True),
    )
}


class Case(NamedTuple):
    """One tensor: its shape as batch x extents x channels, its layout and its element type."""

    shape: str
    layout: str
    dtype: str

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape of the array, in the order of its memory."""
        batch, *extents, channels = parse(self.shape)
        if self.layout == "channels-last":
            return (batch, *extents, channels)
        return (batch, channels, *extents)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.dims)

    @property
    def axis(self) -> int:
        """The channel axis of `dims`."""
        return self.rank - 1 if self.layout == "channels-last" else 1

    @property
    def block(self) -> tuple[int, int, int]:
        """What the core calls outer, channels, inner."""
        dims, axis = self.dims, self.axis
        return math.prod(dims[:axis]), dims[axis], math.prod(dims[axis + 1 :])

    @property
    def bytes(self) -> int:
        """The size of one tensor."""
        return math.prod(self.dims) * DTYPES[self.dtype].itemsize


def parse(shape: str) -> tuple[int, ...]:
    """Read "32x56x56x64"."""
    parts = shape.split("x")
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in parts)
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1:
        raise ValueError(f"a shape is batch x extents x channels, 2 to 5 positive numbers: {shape}")
    return sizes


def layouts_of(shape: str) -> tuple[str, ...]:
    """Return the layouts that differ: without extents there is one."""
    return LAYOUTS if len(parse(shape)) > 2 else LAYOUTS[:1]


class Data(NamedTuple):
    """The tensors and parameters of a case; `mean` and `variance` are moving statistics."""

    x: Array
    dy: Array
    residual: Array
    scale: Array
    offset: Array
    mean: Array
    variance: Array


def data_of(case: Case) -> Data:
    """Return the same numbers in every process that asks."""
    rng = np.random.default_rng(sum(parse(case.shape)))
    dtype, channels = DTYPES[case.dtype], case.block[1]
    stat = np.float64 if case.dtype == "float64" else np.float32
    tensors = []
    for centre, width in ((0.5, 2), (0, 1), (0, 1)):
        # From float32 for each type: as pairs of floats, as the floors read them, float64 numbers
        # of few digits are neither subnormal nor NaN, which would slow some processors.
        values = rng.standard_normal(case.dims, dtype=np.float32)
        values *= np.float32(width)
        values += np.float32(centre)
        tensors.append(aligned(case))
        tensors[-1][...] = values.astype(dtype, copy=False)
    scale, offset = rng.uniform(0.5, 1.5, channels), rng.standard_normal(channels)
    mean, variance = rng.standard_normal(channels) / 8 + 0.5, rng.uniform(3, 5, channels)
    return Data(*tensors, *(vector.astype(stat) for vector in (scale, offset, mean, variance)))


def aligned(case: Case) -> Array:
    """Return an unwritten tensor that begins on a cache line and ends with whole ones."""
    lines = -(-case.bytes // 64)
    memory = np.empty(64 * lines + 64, np.uint8)
    start = -memory.ctypes.data % 64
    tensor: Array = memory[start : start + case.bytes].view(DTYPES[case.dtype])
    return tensor.reshape(case.dims)
