"""gradient in one launch: x and dy are read once, dx is written once: see `_held.py`.

The formulas are those of `_backward.py`. With a residual, its gradient g is written in the first
phase and held in the place of dy, so that the second needs neither the residual nor the activation.
"""

import triton
import triton.language as tl

from fusebn.triton._backward import finish_sums, join_sums, through_statistics
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
from fusebn.triton._tiles import constants, rounded, through_activation

# Of the partial results that are joined: more would need registers that hold the batch.
_AT_ONCE = tl.constexpr(8)


@triton.jit
def gradient_kernel(
    DY, X, RESIDUAL, DX, DRESIDUAL, PARTIALS, ARRIVED,
    COUNT, BATCH, SCALE, OFFSET, DSCALE, DOFFSET, DMEAN, DVARIANCE, factor_high, factor_low,
    rows, words, channels, strips, teams, members,
    ROWS: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr, ELEMENT: tl.constexpr,
    EPSILON: tl.constexpr, ACTIVATION: tl.constexpr, CORRECTION: tl.constexpr,
):  # fmt: skip
    """Fill DX, DRESIDUAL, DSCALE and DOFFSET. All tensors of X's size are words of 4 bytes."""
    team, member = tl.program_id(0) // members, tl.program_id(0) % members
    lanes: tl.constexpr = WORDS if ELEMENT == tl.float32 else 2 * WORDS
    lane = tl.arange(0, lanes)
    # What activation the second phase has still to apply.
    left: tl.constexpr = ACTIVATION if RESIDUAL is None else "identity"
    for strip in range(team, strips, teams):
        channel = strip * lanes + lane
        mean, rstd, scale, offset = constants(
            BATCH, COUNT, SCALE, OFFSET, channel, lane >= 0, channels, EPSILON, False
        )
        m, a, b = rounded(mean, rstd, scale, offset, tl.float32)
        if ELEMENT != tl.float32:
            m, high_m = halves(m, WORDS)
            a, high_a = halves(a, WORDS)
            b, high_b = halves(b, WORDS)
        xs = load_strip(X, strip, member, rows, words, ROWS, WORDS, HELD)
        dys = load_strip(DY, strip, member, rows, words, ROWS, WORDS, HELD)
        base, offsets = place_of(strip, member, words, ROWS, WORDS, HELD)
        sum_g = tl.zeros([ROWS, WORDS], tl.float32)
        sum_g_x, high_sum_g, high_sum_g_x = sum_g, sum_g, sum_g
        gs = ()
        for k in tl.static_range(HELD):
            here = base + k * ROWS * words.to(tl.int64) + offsets
            data = rows_of(k, member, rows, ROWS, HELD)
            added = None
            if RESIDUAL is not None:
                added = tl.load(RESIDUAL + here, mask=data, other=0, eviction_policy="evict_first")
            centred = first_half(xs[k], ELEMENT) - m
            g = first_half(dys[k], ELEMENT)
            if ACTIVATION != "identity":
                z = centred * a + b
                if RESIDUAL is not None:
                    z += first_half(added, ELEMENT)
                g = through_activation(g, z, ACTIVATION)
            sum_g += g
            sum_g_x += tl.where(g == 0, 0.0, g * centred)
            if ELEMENT != tl.float32:
                centred = second_half(xs[k], ELEMENT) - high_m
                high_g = second_half(dys[k], ELEMENT)
                if ACTIVATION != "identity":
                    z = centred * high_a + high_b
                    if RESIDUAL is not None:
                        z += second_half(added, ELEMENT)
                    high_g = through_activation(high_g, z, ACTIVATION)
                high_sum_g += high_g
                high_sum_g_x += tl.where(high_g == 0, 0.0, high_g * centred)
            if RESIDUAL is not None:
                if ELEMENT != tl.float32:
                    word = packed(g, high_g, ELEMENT)
                else:
                    word = g.to(tl.int32, bitcast=True)
                if DRESIDUAL is not None:
                    tl.store(DRESIDUAL + here, word, mask=data, eviction_policy="evict_first")
                gs = gs + (word,)
            else:
                gs = gs + (dys[k],)
        sum_g = tl.sum(sum_g.to(tl.float64), 0)
        sum_g_x = tl.sum(sum_g_x.to(tl.float64), 0)
        if ELEMENT != tl.float32:
            sum_g = tl.interleave(sum_g, tl.sum(high_sum_g.to(tl.float64), 0))
            sum_g_x = tl.interleave(sum_g_x, tl.sum(high_sum_g_x.to(tl.float64), 0))
        of_strip = PARTIALS + strip * members * 2 * lanes
        mine = of_strip + member * 2 * lanes + lane
        tl.store(mine, sum_g)
        tl.store(mine + lanes, sum_g_x)
        wait_for_all(ARRIVED + team, member, members)
        sum_g, sum_g_x = join_sums(
            of_strip, members, 2 * lanes, lanes, lane, lane >= 0, lanes, _AT_ONCE
        )
        if member == 0:
            finish_sums(
                sum_g, sum_g_x, channel, lane >= 0, channels, COUNT, BATCH, SCALE, OFFSET,
                None, DSCALE, DOFFSET, tl.float32, EPSILON, False,
            )  # fmt: skip
        mean, rstd, scale, offset = constants(
            BATCH, COUNT, SCALE, OFFSET, channel, lane >= 0, channels, EPSILON, False
        )
        sum_g_x -= (mean - mean.to(tl.float32).to(tl.float64)) * sum_g
        p, q = through_statistics(
            tl.load(COUNT), mean, rstd, scale, sum_g, sum_g_x,
            DMEAN, DVARIANCE, channel, lane >= 0, factor_high, factor_low, CORRECTION, tl.float32,
        )  # fmt: skip
        if ELEMENT != tl.float32:
            p, high_p = halves(p, WORDS)
            q, high_q = halves(q, WORDS)
        for k in tl.static_range(HELD):
            here = base + k * ROWS * words.to(tl.int64) + offsets
            data = rows_of(k, member, rows, ROWS, HELD)
            x, dy = opaque(xs[k]), opaque(gs[k])
            centred, g = first_half(x, ELEMENT) - m, first_half(dy, ELEMENT)
            g = through_activation(g, centred * a + b, left)
            dx = a * g + (p + q * centred)
            if ELEMENT != tl.float32:
                centred, g = second_half(x, ELEMENT) - high_m, second_half(dy, ELEMENT)
                g = through_activation(g, centred * high_a + high_b, left)
                dx = packed(dx, high_a * g + (high_p + high_q * centred), ELEMENT)
            else:
                dx = dx.to(tl.int32, bitcast=True)
            tl.store(DX + here, dx, mask=data, eviction_policy="evict_first")
