"""The table: the shapes and the data every backend must get right, each row with its reason.

A shape is a block ``(outer, channels, inner)``. Data is made as a block of doubles and rounded to
the element type; what the oracle sees is the rounded data, so a row is a fair question in every
type it names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusebn import _reference as reference

Array = NDArray[Any]
Block = tuple[int, int, int]

FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)

ACTIVATIONS = tuple(reference.ACTIVATIONS)

# data_format -> the shape it means for batch 3, channels 5 and spatial extents 4, 6, 2
FORMATS = {
    "NHWC": (3, 4, 6, 5),
    "NCHW": (3, 5, 4, 6),
    "NDHWC": (3, 4, 6, 2, 5),
    "NCDHW": (3, 5, 4, 6, 2),
    "NWC": (3, 4, 5),
    "NCW": (3, 5, 4),
    "NC": (3, 5),
}


class Shape(NamedTuple):
    block: Block
    why: str


SHAPES = (
    Shape((1, 1, 1), "one number is a batch"),
    Shape((1, 7, 1), "one value a channel: the variance is 0"),
    Shape((2, 1, 1), "the least batch with a variance"),
    Shape((1000, 1, 1), "one channel, and neither axis to walk along is the obvious one"),
    Shape((1, 1, 4097), "one channel along inner, one element past a power of two"),
    Shape((37, 3, 1), "fewer channels than any vector has lanes, channels last"),
    Shape((16, 3, 1024), "RGB images, channels first"),
    Shape((64, 7, 49), "an inner extent that is no multiple of a vector: 7x7 images"),
    Shape((33, 16, 1), "the channels of exactly one vector of floats"),
    Shape((31, 17, 4), "one channel past a vector, inner shorter than one"),
    Shape((50, 63, 1), "one channel short of a cache line of bytes"),
    Shape((40, 64, 1), "whole vectors only"),
    Shape((50, 65, 1), "one channel past whole vectors: the tail is a single one"),
    Shape((9, 100, 1), "more channels than batch"),
    Shape((3, 100, 49), "more channels than batch, channels first, odd inner"),
    Shape((2, 2048, 1), "the widest ResNet stage with the least batch"),
    Shape((2, 2048, 4), "the same, channels first, inner shorter than a vector"),
    Shape((4, 64, 1024), "inner of 4 KiB of floats: a whole number of runs"),
    Shape((200_003, 3, 1), "a huge, prime-ish outer: many runs, few channels, several threads"),
    Shape((10_007, 17, 1), "several runs and a tail in both directions"),
    Shape((520, 1103, 1), "several groups of channels, several tasks for each, a tail in both"),
)

EMPTY_SHAPES = (
    Shape((0, 5, 1), "no batch, channels last"),
    Shape((0, 5, 7), "no batch, channels first"),
    Shape((4, 5, 0), "no pixels"),
    Shape((4, 0, 1), "no channels"),
    Shape((0, 0, 0), "nothing at all"),
)


class Data(NamedTuple):
    name: str
    make: Callable[[np.random.Generator, Block, np.dtype[Any]], Array]
    why: str
    dtypes: tuple[np.dtype[Any], ...] = DTYPES


def _normal(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    return rng.standard_normal(block)


def _uniform(mean: float, radius: float) -> Callable[..., Array]:
    def make(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
        return rng.uniform(mean - radius, mean + radius, block)

    return make


def _constant(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    return np.full(block, 542.37)


def _subnormal(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    info = ml_dtypes.finfo(dtype)
    steps = int(float(info.smallest_normal) / float(info.smallest_subnormal))
    # Products of an integer and the smallest subnormal are exact: rounding to dtype keeps them.
    return rng.integers(1, min(steps, 2**40), block) * float(info.smallest_subnormal)


def _one(value: float) -> Callable[..., Array]:
    def make(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
        x = rng.standard_normal(block)
        outer, channels, inner = block
        x[outer // 2, channels // 3, inner - 1] = value
        return x

    return make


def _outlier_first(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    x = rng.standard_normal(block)
    x[0, :, 0] = 3e4
    return x


def _outlier_last(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    x = rng.standard_normal(block)
    x[-1, :, -1] = -3e4
    return x


def _sorted(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    outer, channels, inner = block
    rows = np.sort(rng.standard_normal((channels, outer * inner)) * 100, axis=1)
    return np.moveaxis(rows.reshape(channels, outer, inner), 0, 1)


def exact_pairs(block: Block) -> tuple[Array, Array, Array]:
    """Return x, its mean and its variance: each channel is a binary mean plus and minus 2^k.

    Half of the positions lie on either side, so both statistics are exact in any element type,
    but for an odd number of positions, of which the last lies on the mean itself.
    """
    outer, channels, inner = block
    n = outer * inner
    c = np.arange(channels)
    mean, distance = (-1.0) ** c * (16 + c % 8), 2.0 ** (c % 5 - 2)
    side = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    if n % 2:
        side[-1] = 0
    x = mean[:, None] + distance[:, None] * side
    variance = distance**2 * (n - n % 2) / n
    return np.moveaxis(x.reshape(channels, outer, inner), 0, 1), mean, variance


def _exact_pairs(rng: np.random.Generator, block: Block, dtype: np.dtype[Any]) -> Array:
    return exact_pairs(block)[0]


WIDE = (FLOAT32, FLOAT64)
DATA = (
    Data("standard_normal", _normal, "the usual case"),
    Data("ten_thousand", _uniform(1e4, 0.1), "|mean| / std of 1e5: E[x^2] - E[x]^2 errs by 1e3"),
    Data("million", _uniform(1e6, 1), "1e6 +- 1: as far as float32 can carry it", WIDE),
    Data("negative_mean", _uniform(-3e3, 10), "the running origin must take the sign along"),
    Data("constant", _constant, "no binary fraction: the variance must be 0 all the same"),
    Data("wide_float16", _uniform(0, 6e4), "variance 1.2e9, past float16's 65504", (FLOAT16,)),
    Data("huge", _uniform(0, 1e17), "squares near 1e34: float32's sums must not overflow", WIDE),
    Data("subnormal", _subnormal, "gradual underflow: a flush to zero would lose the mean"),
    Data("one_nan", _one(np.nan), "one channel is lost, the others are not"),
    Data("one_inf", _one(np.inf), "an infinity is no better than a NaN"),
    Data("outlier_first", _outlier_first, "a bad first value must not be the origin for good"),
    Data("outlier_last", _outlier_last, "nor may the last one find the run unprepared"),
    Data("sorted", _sorted, "the running mean drifts all the way"),
    Data("exact_pairs", _exact_pairs, "the answer is exact: no tolerance needed"),
)
DATA_BY_NAME = {data.name: data for data in DATA}


def make(name: str, block: Block, dtype: np.dtype[Any], seed: int = 0) -> Array:
    """Return the named data, read-only, in the element type."""
    data = DATA_BY_NAME[name]
    rng = np.random.default_rng([seed, *block])
    x = np.ascontiguousarray(data.make(rng, block, dtype)).astype(dtype)
    x.setflags(write=False)
    return x
