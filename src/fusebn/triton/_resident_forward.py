"""forward in one launch, of one read and one write: see `_held.py`.

The moments are those of `_moments.py`, but that a place has seen as many values as any other, so
that the factor of Welford's update is known when the kernel is compiled.
"""

import triton
import triton.language as tl

from fusebn.triton._held import (
    first_half,
    halves,
    load_strip,
    opaque,
    packed,
    place_of,
    rows_of,
    second_half,
    wait_for_all,
)
from fusebn.triton._moments import finish
from fusebn.triton._tiles import activated, parameters, rounded, rstd_of

# Of the partial results that are joined: more would need registers that hold the batch.
_AT_ONCE = tl.constexpr(8)


@triton.jit
def _of_columns(first, mean, m2, counts):
    """Join the places of a program: return of each column a value, the mean from there, and m2."""
    count = tl.sum(counts, 0)
    n = tl.where(count > 0, count, 1.0)
    # Near the mean, whatever the first value is: what is left is small and keeps its digits.
    origin = tl.sum(counts * (first + mean), 0) / n
    mean += first - origin[None, :]
    joined = tl.sum(counts * mean, 0) / n
    away = mean - joined[None, :]
    return origin, joined, tl.sum(m2 + counts * away * away, 0)


@triton.jit
def _join(
    PARTIALS, strip, members, rows,
    ROWS: tl.constexpr, HELD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Join what the programs of a team found: return mean and m2 of each channel, in float64.

    In float32, for registers are needed elsewhere, but of distances from the first mean.
    """
    lane = tl.arange(0, LANES)
    of_strip = PARTIALS + strip * members * 3 * LANES + lane
    origin = tl.load(of_strip, cache_modifier=".cg")
    offset = tl.load(of_strip + LANES, cache_modifier=".cg")
    total = tl.zeros([LANES], tl.float32)
    squares, m2 = total, total
    for first in range(0, members, _AT_ONCE):
        member = first + tl.arange(0, _AT_ONCE)
        mask = (member < members)[:, None]
        at = of_strip[None, :] + member[:, None] * 3 * LANES
        away = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg") - origin[None, :]
        away += tl.load(at + LANES, mask=mask, other=0.0, cache_modifier=".cg") - offset[None, :]
        m2 += tl.sum(tl.load(at + 2 * LANES, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        counts = tl.minimum(tl.maximum(rows - member * (HELD * ROWS), 0), HELD * ROWS)
        counts = counts.to(tl.float32)[:, None]
        away = tl.where(counts > 0, away, 0.0)
        total += tl.sum(counts * away, 0)
        squares += tl.sum(counts * away * away, 0)
    total = total.to(tl.float64)
    shift = total / rows
    m2 = m2.to(tl.float64) + tl.maximum(squares.to(tl.float64) - total * shift, 0.0)
    return origin.to(tl.float64) + (offset.to(tl.float64) + shift), m2


@triton.jit
def forward_kernel(
    X, RESIDUAL, Y, PARTIALS, ARRIVED,
    COUNT, BATCH, MEAN, VARIANCE, MEAN_OUT, VARIANCE_OUT, SCALE, OFFSET, factor_high, factor_low,
    rows, words, channels, strips, teams, members,
    ROWS: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr, ELEMENT: tl.constexpr,
    EPSILON: tl.constexpr, ACTIVATION: tl.constexpr, CORRECTION: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Fill Y, BATCH and what is returned. All tensors of X's size are words of 4 bytes."""
    team, member = tl.program_id(0) // members, tl.program_id(0) % members
    lanes: tl.constexpr = WORDS if ELEMENT == tl.float32 else 2 * WORDS
    lane = tl.arange(0, lanes)
    row = tl.arange(0, ROWS)
    # How many values each row of the tiles has seen: all as many, but at the end of the tensor.
    left = rows - member * (HELD * ROWS) - row
    counts = tl.minimum(tl.maximum((left + ROWS - 1) // ROWS, 0), HELD).to(tl.float32)[:, None]
    for strip in range(team, strips, teams):
        held = load_strip(X, strip, member, rows, words, ROWS, WORDS, HELD)
        first = first_half(held[0], ELEMENT)
        mean = tl.zeros([ROWS, WORDS], tl.float32)
        m2 = mean
        if ELEMENT != tl.float32:
            high_first = second_half(held[0], ELEMENT)
            high_mean, high_m2 = mean, mean
        for k in tl.static_range(HELD):
            data = rows_of(k, member, rows, ROWS, HELD)
            mean, m2 = _welford(mean, m2, first_half(held[k], ELEMENT) - first, data, k)
            if ELEMENT != tl.float32:
                value = second_half(held[k], ELEMENT) - high_first
                high_mean, high_m2 = _welford(high_mean, high_m2, value, data, k)
        origin, mean, m2 = _of_columns(first, mean, m2, counts)
        if ELEMENT != tl.float32:
            high_origin, high_mean, high_m2 = _of_columns(high_first, high_mean, high_m2, counts)
            origin = tl.interleave(origin, high_origin)
            mean, m2 = tl.interleave(mean, high_mean), tl.interleave(m2, high_m2)
        mine = PARTIALS + (strip * members + member) * 3 * lanes + lane
        tl.store(mine, origin)
        tl.store(mine + lanes, mean)
        tl.store(mine + 2 * lanes, m2)
        wait_for_all(ARRIVED + team, member, members)
        mean, m2 = _join(PARTIALS, strip, members, rows, ROWS, HELD, lanes)
        count = tl.zeros([lanes], tl.float64) + rows
        channel = strip * lanes + lane
        if member == 0:
            finish(
                count, mean, m2, channel, lane >= 0, channels, COUNT, BATCH, MEAN, VARIANCE,
                MEAN_OUT, VARIANCE_OUT, factor_high, factor_low, CORRECTION, MIXED,
            )  # fmt: skip
        variance = tl.where(m2 - m2 == 0, m2 / count, float("nan"))
        scale, offset = parameters(SCALE, OFFSET, channel, channel < channels)
        m, a, b = rounded(mean, rstd_of(variance, EPSILON), scale, offset, tl.float32)
        if ELEMENT != tl.float32:
            m, high_m = halves(m, WORDS)
            a, high_a = halves(a, WORDS)
            b, high_b = halves(b, WORDS)
        base, offsets = place_of(strip, member, words, ROWS, WORDS, HELD)
        for k in tl.static_range(HELD):
            data = rows_of(k, member, rows, ROWS, HELD)
            here = base + k * ROWS * words.to(tl.int64) + offsets
            v = opaque(held[k])
            z = (first_half(v, ELEMENT) - m) * a + b
            if ELEMENT != tl.float32:
                high_z = (second_half(v, ELEMENT) - high_m) * high_a + high_b
            if RESIDUAL is not None:
                added = tl.load(RESIDUAL + here, mask=data, other=0, eviction_policy="evict_first")
                z += first_half(added, ELEMENT)
                if ELEMENT != tl.float32:
                    high_z += second_half(added, ELEMENT)
            y = activated(z, ACTIVATION)
            if ELEMENT != tl.float32:
                y = packed(y, activated(high_z, ACTIVATION), ELEMENT)
            else:
                y = y.to(tl.int32, bitcast=True)
            tl.store(Y + here, y, mask=data, eviction_policy="evict_first")


@triton.jit
def _welford(mean, m2, value, data, K: tl.constexpr):
    """Take up the value number K + 1 of each place, where there is one."""
    distance = tl.where(data, value - mean, 0.0)
    mean += distance * (1.0 / (K + 1))
    m2 += distance * tl.where(data, value - mean, 0.0)
    return mean, m2
