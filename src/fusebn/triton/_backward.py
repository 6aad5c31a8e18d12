"""backward_sums and backward: the gradient of normalize and of the statistics behind it.

    z  = (x - mean) * scale * rstd + offset + residual          recomputed, not stored
    g  = dy * activation'(z)                                    this is dresidual, too
    sum_g = sum of g,   sum_g_x = sum of g * (x - mean)         backward_sums
    dx = a * g + w * (p + q * (x - mean))                       backward, with a = scale * rstd and
    p  = (dmean - a * sum_g) / count
    q  = (2 * dvariance - a * rstd^2 * sum_g_x) / count

as in csrc/core/backward.cpp. The sums are joined as the moments are (`_moments.py`). Where dy is 0,
x adds nothing to the sums, whatever it holds: the gradient of a masked position may sit beside a
NaN. What is written to G in the first pass is read for g in the second, which then needs neither
the residual nor the activation.
"""

import triton
import triton.language as tl

from fusebn.triton._tiles import (
    channel_of,
    constants,
    is_last,
    over_rows,
    positions,
    rounded,
    through_activation,
    tile_at,
)


@triton.jit
def backward_sums_kernel(
    DY, X, RESIDUAL, G, PARTIALS, FINISHED,
    COUNT, BATCH, SCALE, OFFSET, SUMS, DSCALE, DOFFSET,
    rows, tail, width, stride, channels, groups, chunks, tiles, parts, turns,
    FOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAT: tl.constexpr,
    EPSILON: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr,
    JOINED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Fill SUMS [2, channels], DSCALE and DOFFSET, and G where it is wanted."""
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, there = channel_of(group, channels, width, FOLD, WIDTH)
    mean, rstd, scale, offset = constants(
        BATCH, COUNT, SCALE, OFFSET, channel, there, channels, EPSILON, TRAINING
    )
    m, a, b = rounded(mean, rstd, scale, offset, STAT)
    sum_g = tl.zeros([ROWS, WIDTH], STAT)
    sum_g_x = sum_g
    for turn in range(0, turns, AHEAD):
        xs, dys, residuals = (), (), ()
        for k in tl.static_range(AHEAD):
            base, offsets, data, _row, _column = tile_at(
                (turn + k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            here = base + offsets
            xs = xs + (tl.load(X + here, mask=data, other=0.0),)
            dys = dys + (tl.load(DY + here, mask=data, other=0.0),)
            if RESIDUAL is not None:
                residuals = residuals + (tl.load(RESIDUAL + here, mask=data, other=0.0),)
        for k in tl.static_range(AHEAD):
            x, g = xs[k].to(STAT), dys[k].to(STAT)
            if ACTIVATION != "identity":
                z = (x - m) * a + b
                if RESIDUAL is not None:
                    z += residuals[k].to(STAT)
                g = through_activation(g, z, ACTIVATION)
            if G is not None:
                base, offsets, data, _row, _column = tile_at(
                    (turn + k) * parts + part, group,
                    rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
                )  # fmt: skip
                tl.store(G + base + offsets, g.to(G.dtype.element_ty), mask=data)
            sum_g += g
            sum_g_x += tl.where(g == 0, 0.0, g * (x - m))

    sum_g = over_rows(sum_g.to(tl.float64), FOLD)
    sum_g_x = over_rows(sum_g_x.to(tl.float64), FOLD)
    lanes: tl.constexpr = 1 if FOLD == 0 else WIDTH
    lane = tl.arange(0, lanes)
    kept: tl.constexpr = JOINED if FOLD > 1 else lanes
    if FOLD > 1:
        room = PARTIALS + (groups * parts + part) * 2 * lanes
        tl.store(room + lane, sum_g)
        tl.store(room + lanes + lane, sum_g_x)
        tl.debug_barrier()
        channel = tl.arange(0, JOINED)
        there = channel < channels
        sum_g, sum_g_x = join_sums(room, FOLD, channels, lanes, channel, there, JOINED)
    if parts > 1:
        here = tl.arange(0, kept)
        of_group = PARTIALS + group * parts * 2 * kept
        tl.store(of_group + part * 2 * kept + here, sum_g)
        tl.store(of_group + part * 2 * kept + kept + here, sum_g_x)
        if is_last(FINISHED, group, parts):
            sum_g, sum_g_x = join_sums(of_group, parts, 2 * kept, kept, here, here >= 0, kept)
            finish_sums(
                sum_g, sum_g_x, channel, there, channels, COUNT, BATCH, SCALE, OFFSET,
                SUMS, DSCALE, DOFFSET, STAT, EPSILON, TRAINING,
            )  # fmt: skip
    else:
        finish_sums(
            sum_g, sum_g_x, channel, there, channels, COUNT, BATCH, SCALE, OFFSET,
            SUMS, DSCALE, DOFFSET, STAT, EPSILON, TRAINING,
        )  # fmt: skip


@triton.jit
def join_sums(
    ROOM, rows, step, between, lane, there, LANES: tl.constexpr, AT_ONCE: tl.constexpr = 64
):  # fmt: skip
    """Add up rows of both sums: rows `step` apart, the two of them `between` apart."""
    at_once: tl.constexpr = max(1, min(AT_ONCE, 4096 // LANES))
    sum_g = tl.zeros([LANES], tl.float64)
    sum_g_x = sum_g
    for first in range(0, rows, at_once):
        row = first + tl.arange(0, at_once)
        mask = (row < rows)[:, None] & there[None, :]
        at = ROOM + row[:, None] * step + lane[None, :]
        sum_g += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        sum_g_x += tl.sum(tl.load(at + between, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return sum_g, sum_g_x


@triton.jit
def finish_sums(
    sum_g, sum_g_x, channel, there, channels, COUNT, BATCH, SCALE, OFFSET,
    SUMS, DSCALE, DOFFSET,
    STAT: tl.constexpr, EPSILON: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Store the sums of some channels, x taken from the mean itself, dscale and doffset."""
    mean, rstd, _scale, _offset = constants(
        BATCH, COUNT, SCALE, OFFSET, channel, there, channels, EPSILON, TRAINING
    )
    sum_g_x -= (mean - mean.to(STAT).to(tl.float64)) * sum_g
    if SUMS is not None:
        tl.store(SUMS + channel, sum_g, mask=there)
        tl.store(SUMS + channels + channel, sum_g_x, mask=there)
    if DSCALE is not None:
        tl.store(DSCALE + channel, rstd * sum_g_x, mask=there)
    if DOFFSET is not None:
        tl.store(DOFFSET + channel, sum_g, mask=there)


@triton.jit
def backward_kernel(
    DY, X, RESIDUAL, WEIGHTS, DX, DRESIDUAL, COUNT, BATCH, SCALE, OFFSET, SUMS, DMEAN, DVARIANCE,
    factor_high, factor_low,
    rows, tail, width, stride, channels, groups, chunks, tiles, parts, turns,
    FOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAT: tl.constexpr,
    EPSILON: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr,
    CORRECTION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Fill DX and DRESIDUAL."""
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, there = channel_of(group, channels, width, FOLD, WIDTH)
    mean, rstd, scale, offset = constants(
        BATCH, COUNT, SCALE, OFFSET, channel, there, channels, EPSILON, TRAINING
    )
    m, a, b = rounded(mean, rstd, scale, offset, STAT)
    if TRAINING:
        count = tl.load(COUNT)
        p, q = through_statistics(
            count, mean, rstd, scale, tl.load(SUMS + channel, mask=there, other=0.0),
            tl.load(SUMS + channels + channel, mask=there, other=0.0),
            DMEAN, DVARIANCE, channel, there, factor_high, factor_low, CORRECTION, STAT,
        )  # fmt: skip
    for turn in range(0, turns, AHEAD):
        xs, dys, residuals = (), (), ()
        for k in tl.static_range(AHEAD):
            base, offsets, data, _row, _column = tile_at(
                (turns - 1 - turn - k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            here = base + offsets
            xs = xs + (tl.load(X + here, mask=data, other=0.0, eviction_policy="evict_first"),)
            dys = dys + (tl.load(DY + here, mask=data, other=0.0, eviction_policy="evict_first"),)
            if RESIDUAL is not None:
                residuals = residuals + (tl.load(RESIDUAL + here, mask=data, other=0.0),)
        for k in tl.static_range(AHEAD):
            base, offsets, data, row, column = tile_at(
                (turns - 1 - turn - k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            x, g = xs[k].to(STAT), dys[k].to(STAT)
            if ACTIVATION != "identity":
                z = (x - m) * a + b
                if RESIDUAL is not None:
                    z += residuals[k].to(STAT)
                g = through_activation(g, z, ACTIVATION)
            dx = a * g
            if TRAINING:
                through = p + q * (x - m)
                if WEIGHTS is not None:
                    at = positions(row, column, width, channels, FOLD)
                    weight = tl.load(WEIGHTS + at, mask=data, other=0.0).to(STAT)
                    through = tl.where(weight > 0, weight * through, 0.0)
                dx += through
            here = base + offsets
            dx = dx.to(DX.dtype.element_ty)
            tl.store(DX + here, dx, mask=data, eviction_policy="evict_first")
            if DRESIDUAL is not None:
                tl.store(DRESIDUAL + here, g.to(DRESIDUAL.dtype.element_ty), mask=data)


@triton.jit
def through_statistics(
    count, mean, rstd, scale, sum_g, sum_g_x, DMEAN, DVARIANCE, channel, there,
    factor_high, factor_low, CORRECTION: tl.constexpr, STAT: tl.constexpr,
):  # fmt: skip
    """Return p and q of each channel, [1, channels], for x taken from the rounded mean."""
    n = tl.where(count > 0, count, 1.0)
    slope = scale * rstd
    p, q = -slope * sum_g, -slope * rstd * rstd * sum_g_x
    factor = tl.zeros([1], tl.float64) + factor_high + factor_low
    if DMEAN is not None:
        p += factor * tl.load(DMEAN + channel, mask=there, other=0.0)
    if DVARIANCE is not None:
        unbiased = tl.where(count > CORRECTION, count / (n - CORRECTION), 1.0)
        q += 2 * factor * unbiased * tl.load(DVARIANCE + channel, mask=there, other=0.0)
    # A batch of count 0 has no statistics that anything could flow through.
    p, q = tl.where(count > 0, p / n, 0.0), tl.where(count > 0, q / n, 0.0)
    p -= q * (mean - mean.to(STAT).to(tl.float64))
    return p.to(STAT)[None, :], q.to(STAT)[None, :]
