"""moments: count, mean and biased variance of each channel; and what `forward` returns of them.

    count = sum of weight,   mean = sum of weight * x / count,
    variance = sum of weight * (x - mean)^2 / count

Method. A program has a running mean and m2 for each place of its tile (Welford 1962), of distances
from the first value there: a mean far from 0 costs no digits, whatever the type. At the end the
places are joined in float64, exactly (Chan, Golub, LeVeque 1983), and what the programs of a group
found by the last of them to finish, in the order of their numbers: the result does not depend on
who was last, and no float is ever added by an atomic.

Safety. A program stores its partial results before it counts itself as finished (release), and
reads the others' after it has seen the full count (acquire). The counter is 0 again when the last
one is done. Where one program has the whole group there are no partial results at all.
"""

import triton
import triton.language as tl

from fusebn.triton._tiles import channel_of, is_last, over_rows, positions, tile_at


@triton.jit
def moments_kernel(
    X, WEIGHTS, PARTIALS, FINISHED,
    COUNT, BATCH, MEAN, VARIANCE, MEAN_OUT, VARIANCE_OUT, factor_high, factor_low,
    rows, tail, width, stride, channels, groups, chunks, tiles, parts, turns,
    FOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAT: tl.constexpr,
    CORRECTION: tl.constexpr, MIXED: tl.constexpr, JOINED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Fill COUNT and BATCH [2, channels], and the returned statistics where they are wanted."""
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    first = tl.zeros([ROWS, WIDTH], STAT)  # the value at each place that distances are taken from
    mean, m2, total = first, first, first
    for turn in range(0, turns, AHEAD):
        xs = ()
        for k in tl.static_range(AHEAD):
            base, offsets, data, row, column = tile_at(
                (turn + k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            xs = xs + (tl.load(X + base + offsets, mask=data, other=0.0),)
        for k in tl.static_range(AHEAD):
            base, offsets, data, row, column = tile_at(
                (turn + k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            x = xs[k].to(STAT)
            if WEIGHTS is None:
                weight = data.to(STAT)
            else:
                at = positions(row, column, width, channels, FOLD)
                weight = tl.load(WEIGHTS + at, mask=data, other=0.0).to(STAT)
            counts = weight > 0
            first = tl.where(counts & (total == 0), x, first)
            total += weight
            # Where weight is 0, x has no part: not even a NaN.
            distance = tl.where(counts, x - first - mean, 0.0)
            mean += distance * (weight / tl.where(counts, total, 1.0))
            m2 += weight * distance * tl.where(counts, x - first - mean, 0.0)

    # The places of this program, joined.
    total, m2 = total.to(tl.float64), m2.to(tl.float64)
    mean = tl.where(total > 0, first.to(tl.float64) + mean.to(tl.float64), 0.0)
    count = over_rows(total, FOLD)
    joined = over_rows(total * mean, FOLD) / tl.where(count > 0, count, 1.0)
    away = mean - (tl.sum(joined, 0) if FOLD == 0 else joined[None, :])
    m2 = over_rows(m2 + total * away * away, FOLD)
    mean = joined
    lanes: tl.constexpr = 1 if FOLD == 0 else WIDTH
    lane = tl.arange(0, lanes)
    channel, there = channel_of(group, channels, width, FOLD, WIDTH)
    kept: tl.constexpr = JOINED if FOLD > 1 else lanes
    if FOLD > 1:
        # The same channel stands in several columns: put the columns down, take them up by channel.
        room = PARTIALS + (groups * parts + part) * 3 * lanes
        _store(room, lanes, lane, count, mean, m2)
        tl.debug_barrier()
        channel = tl.arange(0, JOINED)
        there = channel < channels
        count, mean, m2 = _join(room, FOLD, channels, lanes, channel, there, JOINED)
    if parts > 1:
        here = tl.arange(0, kept)
        of_group = PARTIALS + group * parts * 3 * kept
        _store(of_group + part * 3 * kept, kept, here, count, mean, m2)
        if is_last(FINISHED, group, parts):
            count, mean, m2 = _join(of_group, parts, 3 * kept, kept, here, here >= 0, kept)
            finish(
                count, mean, m2, channel, there, channels, COUNT, BATCH, MEAN, VARIANCE,
                MEAN_OUT, VARIANCE_OUT, factor_high, factor_low, CORRECTION, MIXED,
            )  # fmt: skip
    else:
        finish(
            count, mean, m2, channel, there, channels, COUNT, BATCH, MEAN, VARIANCE,
            MEAN_OUT, VARIANCE_OUT, factor_high, factor_low, CORRECTION, MIXED,
        )  # fmt: skip


@triton.jit
def _store(ROOM, between, lane, count, mean, m2):
    tl.store(ROOM + lane, count)
    tl.store(ROOM + between + lane, mean)
    tl.store(ROOM + 2 * between + lane, m2)


@triton.jit
def _join(ROOM, rows, step, between, lane, there, LANES: tl.constexpr):
    """Join rows of counts, means and m2s: rows `step` apart, the three of them `between` apart.

    Distances from the first mean are summed up, in float64: no digit that matters is lost.
    """
    origin = tl.load(ROOM + between + lane, mask=there, other=0.0, cache_modifier=".cg")
    at_once: tl.constexpr = max(1, min(64, 4096 // LANES))
    count = tl.zeros([LANES], tl.float64)
    total, squares, m2 = count, count, count
    for first in range(0, rows, at_once):
        row = first + tl.arange(0, at_once)
        mask = (row < rows)[:, None] & there[None, :]
        at = ROOM + row[:, None] * step + lane[None, :]
        counts = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        means = tl.load(at + between, mask=mask, other=0.0, cache_modifier=".cg")
        m2 += tl.sum(tl.load(at + 2 * between, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        away = tl.where(counts > 0, means - origin[None, :], 0.0)
        count += tl.sum(counts, 0)
        total += tl.sum(counts * away, 0)
        squares += tl.sum(counts * away * away, 0)
    shift = total / tl.where(count > 0, count, 1.0)
    return count, origin + shift, m2 + tl.maximum(squares - total * shift, 0.0)


@triton.jit
def finish(
    count, mean, m2, channel, there, channels, COUNT, BATCH, MEAN, VARIANCE,
    MEAN_OUT, VARIANCE_OUT, factor_high, factor_low,
    CORRECTION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store the statistics of some channels: what lies between the verbs, as in fused.cpp."""
    undefined = float("nan")
    # A channel that holds a NaN or an infinity has neither mean nor variance.
    finite = m2 - m2 == 0
    mean, m2 = tl.where(finite, mean, undefined), tl.where(finite, m2, undefined)
    some = count > 0
    n = tl.where(some, count, 1.0)
    batch_mean = tl.where(some, mean, undefined)
    variance = tl.where(some, m2 / n, undefined)
    tl.store(BATCH + channel, batch_mean, mask=there)
    tl.store(BATCH + channels + channel, variance, mask=there)
    tl.store(COUNT + channel * 0, count, mask=there & (channel == 0))
    if MEAN_OUT is not None:
        unbiased = tl.where(count > CORRECTION, count - CORRECTION, n)
        returned = tl.where(some, m2 / unbiased, undefined)
        if MIXED:
            factor = tl.zeros([1], tl.float64) + factor_high + factor_low
            old_mean = tl.load(MEAN + channel, mask=there, other=0.0).to(tl.float64)
            old_variance = tl.load(VARIANCE + channel, mask=there, other=0.0).to(tl.float64)
            # A factor of 0 does not make NaN of what is not finite.
            taken = some & (factor != 0)
            kept = tl.where(some, 1 - factor, 1.0)
            batch_mean = kept * old_mean + tl.where(taken, factor * mean, 0.0)
            returned = kept * old_variance + tl.where(taken, factor * returned, 0.0)
        tl.store(MEAN_OUT + channel, batch_mean, mask=there)
        tl.store(VARIANCE_OUT + channel, returned, mask=there)
